"""HTML that needs nothing outside itself: elements, tables, figures, and the page around them. All text is escaped."""

import html

from .figures import svg_uri


GENERATOR = '<meta name="generator" content="mamba-rsst report">'
"""Stands in the first lines of a page: by it a later page knows that it may take an earlier one's place."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page asks for nothing, and nothing that a file might smuggle in would run."""
STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 1rem/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; }
section.run { border-top: 2px solid #1a1a1a; margin-top: 3rem; }
section.run > h2 { margin-top: 1.2rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: #0072B2; }
.lead { font-size: 1.1rem; }
.note, caption, figcaption { color: #555; font-size: .875rem; line-height: 1.45; }
.warning { border-left: .3rem solid #D55E00; background: #FBEEDB; padding: .6rem .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.2rem 0;
  padding: 0; list-style: none; }
.tiles li { border: 1px solid #d4d4d4; border-radius: .4rem; padding: .6rem .9rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { display: block; color: #555; font-size: .875rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; min-width: 18rem; }
caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
tbody th { white-space: nowrap; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #d4d4d4; }
th:first-child, td.words, th.words { text-align: left; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
td small { display: block; color: #555; font-size: .8rem; white-space: nowrap; }
figure { margin: .8rem 0; }
figure img { display: block; max-width: 100%; min-width: 34rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .8rem 0; }
dt { color: #555; }
dd { margin: 0; }
pre { background: #f5f5f5; padding: .7rem .9rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.45; }
summary { cursor: pointer; }
footer { margin-top: 3rem; border-top: 1px solid #d4d4d4; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } a { color: inherit; text-decoration: none; }
  figure, .tiles, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } figure img { min-width: 0; }
  .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; } section.run { break-before: page; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


class Html(str):
    """Text that is HTML already; every other string is escaped on its way into an element."""


def element(name: str, *children: str, **attributes: str) -> Html:
    """<name attributes>children</name>; `class_` for class, aria_label for aria-label."""
    attributes = {key.rstrip("_").replace("_", "-"): html.escape(value) for key, value in attributes.items()}
    opening = "".join([name, *(f' {key}="{value}"' for key, value in attributes.items())])
    inner = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    return Html(f"<{opening}>{inner}</{name}>" + "\n" * (name not in INLINE))


INLINE = ("a", "b", "code", "small", "span", "strong")


def table(titles: list[str], rows: list[list[str]], caption: str, words: int = 0) -> Html:
    """The first column names its row; the `words` columns behind it hold words. "value (more)" takes two lines."""
    name = titles[0]
    titles = [element("th", title, scope="col", **_aligned(i, words)) for i, title in enumerate(titles)]
    lines = []
    for first, *others in rows:
        cells = (element("td", *_two_lines(cell), **_aligned(i, words)) for i, cell in enumerate(others, 1))
        lines.append(element("tr", element("th", first, scope="row"), *cells))
    parts = (
        element("caption", element("span", caption)),
        element("thead", element("tr", *titles)),
        element("tbody", *lines),
    )
    return element("div", element("table", *parts), **_scrolling(f"Table by {name.lower()}"))


def _scrolling(label: str) -> dict:
    """What is too wide for the screen scrolls by itself, by keyboard too."""
    return {"class_": "scroll", "role": "region", "aria_label": label, "tabindex": "0"}


def _aligned(column: int, words: int) -> dict:
    return {"class_": "words"} if 0 < column <= words else {}


def _two_lines(cell: str) -> list[str]:
    if isinstance(cell, Html) or not cell.endswith(")"):
        return [cell]
    value, _, more = cell.partition(" (")
    return [value, " ", element("small", f"({more}")]


def figure(drawn, alt: str, caption: str) -> Html:
    """A matplotlib figure in its own size, or the page's width; `alt` says in words what it shows."""
    width, height = (f"{96 * inches:.0f}" for inches in drawn.get_size_inches())
    source = f'src="{svg_uri(drawn)}" width="{width}" height="{height}"'
    image = Html(f'<img {source} alt="{html.escape(alt)}">')
    scroll = element("div", image, **_scrolling("Figure"))
    return element("figure", scroll, element("figcaption", caption))


def page(title: str, *body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{element("title", title)}<style>{STYLE}</style>
</head>
<body>
{element("main", *body)}</body>
</html>
"""
