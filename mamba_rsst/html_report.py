"""`mamba-rsst report`: one HTML page about one run or several, which needs nothing outside itself."""

import html
import shlex
from pathlib import Path

from . import figures
from ._version import __version__
from .card import METHODS, TARGETS, method_of
from .report import ACCURACY, MISSING, RECIPE_FILE, RESULTS_FILE, cells_of, columns_of, notes_of, write_atomic
from .saved_run import SavedRun, read_run


GENERATOR = '<meta name="generator" content="mamba-rsst report">'
METHOD_NAMES = {"rsst": "RSST", "refill": "Refill", "one shot": "One-shot pruning", "dense": "Dense training"}
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
th, td { padding: .4rem .9rem .4rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #d4d4d4; }
th:first-child, td.words, th.words { text-align: left; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
td small { display: block; color: #555; font-size: .8rem; white-space: nowrap; }
figure { margin: .8rem 0; }
figure img { display: block; width: 100%; min-width: 34rem; height: auto; }
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


def write_report(folders: list[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about the runs in `folders` to `out`; default report.html in the folder of one run, or here.

    Raises FileNotFoundError or ValueError, with nothing written, for what is no run's folder, for damaged files, and
    where `out` is there and is no report.
    """
    out = Path(out) if out is not None else Path(folders[0] if len(folders) == 1 else "", "report.html")
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; the report is one file.")
    if out.is_file() and GENERATOR.encode() not in out.read_bytes()[:1000]:
        raise ValueError(f"{str(out)!r} is there and is no report; choose another file.")
    return write_atomic(out, report_page(read_runs(folders)))


def read_runs(folders: list[str | Path]) -> list[SavedRun]:
    """The runs, called by their folder's name, or by the path as given where two have the same."""
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise ValueError(f"{str(path)!r} is given twice.")
    return [read_run(p, label=name if names.count(name) == 1 else str(p)) for p, name in zip(paths, names)]


def report_page(runs: list[SavedRun]) -> str:
    """The page. Raises ValueError for a run whose files hold something that cannot be shown."""
    body = []
    for number, run in enumerate(runs, 1):
        try:
            sections = _sections(run, heading="h2" if len(runs) == 1 else "h3")
            title = _title(run)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
            # The readers have checked what they know; a file written by hand can still hold a word for a number.
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"The files of the run {str(run.path)!r} do not fit together ({found}).") from error
        if len(runs) == 1:
            body = [_el("h1", title), *sections]
        else:
            heading = _el("h2", f"{number}. {run.label}")
            body.append(
                _el("section", heading, _el("p", title, class_="note"), *sections, id=f"run-{number}", class_="run")
            )
    title = _title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs compared"
    if len(runs) > 1:
        body = [_el("h1", title), *_comparison(runs), *body]
    footer = _el("p", f"Written by mamba-rsst report, version {__version__}, from the runs' own files.", class_="note")
    # The policy keeps what a file might smuggle in from running, and the page from asking for anything.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{_el("title", title)}
<style>{STYLE}</style>
</head>
<body>
{_el("main", *body, _el("footer", footer))}
</body>
</html>
"""


# ---- one run ----
def _sections(run: SavedRun, heading: str) -> list:
    parts = [_el("p", _summary(run), class_="lead")]
    if not run.finished:
        parts.append(_el("p", _el("strong", "This run has not finished."), " ", _progress(run), class_="warning"))
    else:
        method = METHODS.get(method_of(run.results)) if run.final is not run.dense else None
        parts += [_el("p", method)] if method else []
        columns = zip(columns_of(run.results), cells_of(run.final, run.results)[1:])
        tiles = [_tile(title, cell) for (title, *_), cell in columns if cell not in (MISSING, "n/a")]
        parts += [_el("ul", *tiles, class_="tiles"), _el(heading, "Results"), _results(run)]
    if run.widths:
        parts += [_el(heading, "Channels kept in each layer"), _widths(run)]
    parts.append(_el(heading, "Scores of the channels"))
    parts += _scores(run) if run.scores else [_el("p", _no_scores(run))]
    parts.append(_el(heading, "Training"))
    parts.append(_training(run) if _drawable(run.history) else _el("p", "Nothing has been logged."))
    parts += [_el(heading, "Stages"), _stages(run)] if run.state else []
    parts += [_el(heading, "How to reproduce it"), *_reproduce(run)]
    return parts


def _title(run: SavedRun) -> str:
    method, data = _method(run), run.results.get("dataset")
    return f"{run.results.get('model', run.label)}{f' on {Path(data).name}' if data else ''}: {method}"


def _method(run: SavedRun) -> str:
    method = method_of(run.results)
    return METHOD_NAMES.get(method, method or "method not known")


def _summary(run: SavedRun) -> str:
    """One sentence: what was done, what was removed, what it cost, what it brought."""
    results, (title, key, text, compared) = run.results, run.quality
    model, data = results.get("model", "The model"), results.get("dataset")
    what = f"{model} on {Path(data).name}" if data else model
    if not run.finished:
        known = f"; its dense {title.lower()} is {text(run.dense[key])}" if run.dense.get(key) is not None else ""
        return f"{_method(run)} of {what}, not finished{known}."
    final, dense = run.final, run.dense
    quality = text(final[key]) if final.get(key) is not None else "not measured"
    if final is dense:
        return f"{what} was trained without pruning: {title.lower()} {quality}."
    removed = [
        f"{share:.1%} of the {TARGETS.get(target, 'channels')} ({target})"
        for target, share in (results.get("channel_sparsity") or {}).items()
    ]
    sentence = f"{_method(run)} removed {' and '.join(removed) or 'nothing'} from {what}: {title.lower()} "
    if dense.get(key) is not None and final.get(key) is not None:
        points = " points" if key == "accuracy" else ""
        sentence += f"went from {text(dense[key])} to {quality} ({compared(final[key], dense[key])}{points})"
    else:
        sentence += quality
    gains = []
    for name, words in (("parameters", "parameters"), ("macs", "multiply-accumulates")):
        if dense.get(name) and final.get(name) is not None:
            less = 1 - final[name] / dense[name]
            gains.append(f"{abs(less):.1%} {'fewer' if less >= 0 else 'more'} {words}")
    speed = next((key for _, key, *_ in columns_of(results) if key.endswith("_per_s")), None)
    if dense.get(speed) and final.get(speed):
        gains.append(f"{final[speed] / dense[speed]:.2f} times the {speed.partition('_')[0]} a second")
    return sentence + (f", with {', '.join(gains[:-1])} and {gains[-1]}" if len(gains) > 1 else "") + "."


def _progress(run: SavedRun) -> str:
    stages, done, now = run.state.get("stages", []), run.state.get("done", 0), run.under_way
    if not stages:
        return "It has not begun its first stage; all that is there is its recipe."
    if done >= len(stages):
        return f"All its stages are done, but no {RESULTS_FILE} is there: its models have not been measured."
    names = f" ({', '.join(stages[:done])})" if done else ""
    far = "has left no checkpoint yet"
    if "steps" in now:
        far = f"had reached step {now['steps']:,} (epoch {now['epochs']:.1f}) at its last checkpoint"
    return f"{done} of its {len(stages)} stages are done{names}; {now.get('stage', stages[done])} {far}."


def _tile(title: str, cell: str):
    value, _, more = cell.partition(" (")
    return _el("li", _el("span", title), _el("b", value), *[_el("span", _against(more))] * bool(more))


def _against(more: str) -> str:
    compared = more.rstrip(")").split(", ")[0]
    return f"{compared} of dense" if compared.endswith(("%", "×")) and compared[0].isdigit() else compared


def _results(run: SavedRun):
    titles = ["Model", *(title for title, *_ in columns_of(run.results))]
    return _table(titles, [cells_of(row, run.results) for row in run.results["rows"]], notes_of(run.results))


def _widths(run: SavedRun):
    drawn = {target: both for target, both in run.widths.items() if sum(both["dense"])}
    kept = [f"{t} {sum(both['kept']):,} of {sum(both['dense']):,}" for t, both in drawn.items()]
    words = f"Channels kept in all layers together: {', '.join(kept)}."
    if not run.finished:
        words += " Chosen, and not yet measured: the run has not finished."
    layers = [f"{t}: {', '.join(map(str, both['kept']))}" for t, both in drawn.items()]
    return _figure(figures.draw_widths(drawn), f"{words} Layer by layer, {'; '.join(layers)}.", words)


def _scores(run: SavedRun) -> list:
    normalised = {"mean": "divided by the mean of its layer", "max": "divided by the largest of its layer"}
    how = normalised.get(run.pruning.get("normalization", "mean"), "as it is")
    importance = run.pruning.get("importance") or "magnitude_l2"
    if isinstance(importance, dict):
        importance = ", ".join(f"{name} for {target}" for target, name in importance.items())
    parts = [_el("p", f"Score: {importance}, {how}. Channels that leave in orange, channels that stay in blue.")]
    for stage, scores in run.scores.items():
        counts = [
            f"{t}: {len(k):,} kept, {len(x):,} leaving" for t, both in scores.items() for k, x in [[*both.values()][0]]
        ]
        words = f"Stage {stage}. {'; '.join(counts)}."
        parts.append(_figure(figures.draw_scores(scores), f"Histograms of scores. {words}", words))
    return parts


def _no_scores(run: SavedRun) -> str:
    if run.results.get("method") == "dense":
        return "A dense run scores no channels."
    return "This run's folder keeps no scores."


def _drawable(history: list[dict]) -> bool:
    keys = ("loss", "eval_accuracy", "eval_perplexity", "lambda", "leaving_share")
    return any(entry.get(key) is not None for entry in history if "epoch" in entry for key in keys)


def _training(run: SavedRun):
    last = {key: entry[key] for entry in run.history for key in entry if entry[key] is not None}
    words = "Loss and quality over the epochs of all stages"
    if "lambda" in last:
        words += "; below, the penalty λ and the leaving channels' share of the norm of all channels"
    title, key, text, _ = run.quality
    told = f" Last {title.lower()}: {text(last[f'eval_{key}'])}." if f"eval_{key}" in last else ""
    told += f" Last loss: {last['loss']:.4g}." if "loss" in last else ""
    told += f" Last share of the leaving channels: {last['leaving_share']:.3g}." if "leaving_share" in last else ""
    return _figure(figures.draw_training(run.history), f"{words}.{told}", f"{words}.{told}")


def _stages(run: SavedRun):
    title, key, text, _ = run.quality
    titles = [
        "Stage",
        "Epochs",
        "Steps",
        "Seconds",
        *(f"{title} {when}" for when in ("before the cut", "after it", "at the end")),
    ]
    rows = []
    for index, name in enumerate(run.state["stages"]):
        spent = run.state.get("spent", {}).get(name, {})
        metrics = run.state.get("metrics", {}).get(name, {})
        if index == run.state["done"]:
            spent = run.under_way
        values = [metrics.get(when, {}).get(f"eval_{key}") for when in ("before_cut", "after_cut", "end")]
        row = [
            name,
            *(
                _number(spent.get(what), form)
                for what, form in (("epochs", ".4g"), ("steps", ",d"), ("seconds", ",.1f"))
            ),
        ]
        rows.append([*row, *(MISSING if value is None else text(value) for value in values)])
    return _table(titles, rows, "A dash: does not apply to this stage, was not recorded, or is still to come.")


def _number(value, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _reproduce(run: SavedRun) -> list:
    results, parts = run.results, []
    if (run.path / RECIPE_FILE).is_file():
        again = f"training.output_dir={str(run.path)}-again"
        command = shlex.join(["mamba-rsst", "train", str(run.path / RECIPE_FILE), again])
        parts.append(_el("pre", _el("code", command)))
        if not run.finished:
            command = shlex.join(["mamba-rsst", "train", str(run.path / RECIPE_FILE), "--resume"])
            parts += [_el("p", "To go on with it where it stopped:"), _el("pre", _el("code", command))]
    facts = {"Seed": results.get("seed"), "Device": results.get("device")}
    facts |= {name.title(): version for name, version in (results.get("versions") or {}).items()}
    seconds = results.get("seconds", run.state.get("seconds"))
    facts["Training"] = None if seconds is None else f"{seconds:,.1f} seconds"
    shown = [
        _el(tag, words)
        for name, value in facts.items()
        if value is not None
        for tag, words in (("dt", name), ("dd", str(value)))
    ]
    parts += [_el("dl", *shown)] if shown else []
    parts.append(
        _el("details", _el("summary", "The resolved recipe"), _el("pre", _el("code", run.recipe.strip("\n"))))
    )
    return parts


# ---- several runs ----
def _comparison(runs: list[SavedRun]) -> list:
    """A table and a figure for each kind of run: an accuracy and a perplexity have no common axis."""
    kinds = {}
    for number, run in enumerate(runs, 1):
        kinds.setdefault(tuple(title for title, *_ in columns_of(run.results)), []).append((number, run))
    parts = []
    for numbered in kinds.values():
        parts += [*_compare(numbered)]
    return parts


def _compare(numbered: list[tuple[int, SavedRun]]):
    (title, key, text, compared), *costs = columns_of(numbered[0][1].results)
    costs = [column for column in costs if column[1] != "peak_memory"]
    titles = ["Run", "Method", f"Dense {title.lower()}", "Final", "Change", *(name for name, *_ in costs), "Seconds"]
    rows, points = [], []
    for number, run in numbered:
        dense, final = run.dense.get(key), run.final.get(key)
        changed = run.final is not run.dense and dense and final is not None
        cells = (
            dict(zip([k for _, k, *_ in columns_of(run.results)], cells_of(run.final, run.results)[1:]))
            if run.finished
            else {}
        )
        rows.append(
            [
                _el("span", f"{number} ", _el("a", run.label, href=f"#run-{number}")),
                _method(run),
                MISSING if dense is None else text(dense),
                (MISSING if final is None else text(final)) if run.finished else "not finished",
                compared(final, dense) if changed else MISSING,
                *(cells.get(cost, MISSING) for _, cost, *_ in costs),
                _number(run.results.get("seconds", run.state.get("seconds")), ",.0f"),
            ]
        )
        if run.finished:
            points.append(
                {
                    "number": number,
                    "label": run.label,
                    "final": run.final,
                    "dense": run.dense if run.final is not run.dense else {},
                }
            )
    change = "in points" if key == "accuracy" else "in percent"
    yield _table(
        titles,
        rows,
        f"Change: against the run's own dense model, {change}. In brackets: against dense, and quartiles.",
        words=1,
    )
    if warning := _differences([run for _, run in numbered if run.finished]):
        yield _el("p", warning, class_="warning")
    if not points:
        return
    scale = 100 if (title, key) == ACCURACY[:2] else 1
    for point in points:
        for name in ("dense", "final"):
            point[name] = point[name] | ({key: scale * point[name][key]} if point[name].get(key) is not None else {})
    drawn = [(cost, name) for name, cost, *_ in costs if any(p["final"].get(cost) is not None for p in points)]
    if not drawn or all(point["final"].get(key) is None for point in points):
        return
    words = f"{title} against {', '.join(name for _, name in drawn)}: a numbered disc a run, and a line from its dense model."
    figure = figures.draw_comparison(points, (key, f"{title.lower()} (%)" if scale == 100 else title.lower()), drawn)
    yield _figure(figure, f"{words} The figures are those of the table above.", words)


def _differences(runs: list[SavedRun]) -> str:
    """What speaks against comparing the runs, "" where nothing does."""
    reasons = {
        "dataset": "the data, so that their quality cannot be compared",
        "device": "the device that the speed was measured on",
        "batch_size": "the batch that the speed was measured with",
        "seq_len": "the length of the sequences",
    }
    differing = [words for key, words in reasons.items() if len({str(run.results.get(key)) for run in runs}) > 1]
    return f"Not the same in all these runs: {'; '.join(differing)}." if differing else ""


# ---- HTML ----
class _Html(str):
    """Text that is HTML already; every other string is escaped on its way into the page."""


def _el(name: str, *children: str, **attributes: str) -> _Html:
    """An element; `class_` for class."""
    attributes = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    inner = "".join(child if isinstance(child, _Html) else html.escape(str(child)) for child in children)
    return _Html(
        f"<{name}{attributes}>{inner}</{name}>" + "\n" * (name not in ("a", "b", "code", "small", "span", "strong"))
    )


def _table(titles: list[str], rows: list[list], caption: str, words: int = 0) -> _Html:
    """The first column names its row; the `words` columns behind it hold words. "value (more)" takes two lines."""
    align = lambda column: {"class_": "words"} if 0 < column <= words else {}  # noqa: E731

    def cell(content):
        if isinstance(content, _Html) or not content.endswith(")"):
            return [content]
        value, _, more = content.partition(" (")
        return [value, " ", _el("small", f"({more}")]

    head = _el("tr", *(_el("th", title, scope="col", **align(i)) for i, title in enumerate(titles)))
    body = []
    for first, *others in rows:
        cells = (_el("td", *cell(content), **align(i)) for i, content in enumerate(others, 1))
        body.append(_el("tr", _el("th", first, scope="row"), *cells))
    table = _el("table", _el("caption", caption), _el("thead", head), _el("tbody", *body))
    return _el("div", table, class_="scroll", role="region", aria_label=f"Table: {titles[0]}", tabindex="0")


def _figure(figure, alt: str, caption: str) -> _Html:
    image = _Html(f'<img src="{figures.svg_uri(figure)}" alt="{html.escape(alt)}">')
    return _el("figure", _el("div", image, class_="scroll"), _el("figcaption", caption))
