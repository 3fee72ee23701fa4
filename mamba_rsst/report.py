"""What a person looks at: result tables. Also how files are written.

`results` is the content of results.json. Its `rows` ("dense", "cut", "recovered") hold accuracy (a fraction),
perplexity, parameters, macs (of one image or token), images_per_s or tokens_per_s (_low and _high: quartiles),
peak_memory (bytes); a dash where missing.
"""

import os
from itertools import groupby
from pathlib import Path


MISSING = "–"

RECIPE_FILE, RESULTS_FILE, LOG_FILE = "recipe.yaml", "results.json", "training_log.jsonl"
"""In a run's folder: the first says that it is one, the second that the run is finished."""
SWEEP_FILE = "sweep.yaml"
"""In a sweep's folder."""


def check_writable(path: Path, name: str) -> Path:
    """The path, if the folder that it would stand in can be written to. Raises ValueError that calls it `name`."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ValueError(f"{name!r} cannot be written: {str(parent)!r} is a file.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{name!r} cannot be written: {str(parent)!r} is read-only.")
    return path


def write_atomic(path, content: bytes | str) -> Path:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def human(number) -> str:
    """Three significant digits and a unit: 1234567 -> 1.23M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or unit == "P":
            return f"{number:.3g}{unit}"
        number /= 1000


# ---- tables ----
def _share(value, dense) -> str:
    return f"{value / dense:.1%}"


def _speed_columns(item: str, key: str, text) -> tuple:
    return (
        ("Params", "parameters", human, _share),
        (f"MACs / {item}", "macs", human, _share),
        (f"{item.title()}s / s", key, text, lambda v, dense: f"{v / dense:.2f}×"),
        ("Peak memory", "peak_memory", lambda v: f"{v / 2**20:,.1f} MiB", _share),
    )


ACCURACY = ("Accuracy", "accuracy", "{:.2%}".format, lambda v, dense: f"{100 * (v - dense):+.2f}")
PERPLEXITY = ("Perplexity", "perplexity", lambda v: f"{v:,.2f}", lambda v, dense: f"{v / dense - 1:+.1%}")
COLUMNS = {  # task -> its columns: title, key, the value as text, how it compares with the dense row's
    "image-classification": (
        ACCURACY,
        *_speed_columns("image", "images_per_s", lambda v: f"{v:,.{0 if v >= 100 else 1}f}"),
    ),
    "causal-lm": (PERPLEXITY, *_speed_columns("token", "tokens_per_s", human)),
}


def columns_of(results: dict) -> tuple:
    """The columns of a run's table; a run without a `task` is one of images. A language model whose answers were
    counted, as those of generated tasks are, is judged by them."""
    first, *others = COLUMNS[results.get("task", "image-classification")]
    if first is PERPLEXITY and any("accuracy" in row for row in results["rows"]):
        first = ACCURACY
    return (first, *others)


def results_table(results: dict):
    """A rich Table, one line a row of `results`, each compared with the dense row."""
    from rich import box
    from rich.table import Table

    title = " ".join(str(results[key]) for key in ("model", "dataset", "method") if results.get(key))
    table = Table(title=title, caption=notes_of(results), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("Model", no_wrap=True)
    for title, key, *_ in columns_of(results):
        least = len(title) if key in ("accuracy", "perplexity") else None  # one word, which would be cut off
        # On a narrow screen the others wrap.
        table.add_column(title, justify="right", min_width=least, no_wrap=key.endswith("_per_s"))
    for row in results["rows"]:
        table.add_row(*cells_of(row, results))
    return table


def plain_console():
    """A rich console that prints names and paths as they are: what stands in brackets in one is no markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def print_results(results: dict, console=None):
    (console or plain_console()).print(results_table(results))


def results_markdown(results: dict) -> str:
    """The same table in Markdown, without its title."""
    columns = columns_of(results)
    lines = [["Model", *(column[0] for column in columns)], [":--", *["--:"] * len(columns)]]
    lines += [cells_of(row, results) for row in results["rows"]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + notes_of(results)


def cells_of(row, results) -> list[str]:
    """The row's name and values, each with (compared with dense, quartiles) as far as they are known."""
    dense = next((other for other in results["rows"] if other["name"] == "dense"), {})
    cells = [row["name"]]
    for _, key, text, compared in columns_of(results):
        value, base, more = row.get(key), dense.get(key), []
        if value is None:
            cells.append("n/a" if key in row else MISSING)  # could not be measured; was not
            continue
        if base and row is not dense:
            more.append(compared(value, base))
        if row.get(f"{key}_low") is not None:
            more.append(f"{text(row[f'{key}_low'])}–{text(row[f'{key}_high'])}")
        cells.append(text(value) + (f" ({', '.join(more)})" if more else ""))
    return cells


def notes_of(results) -> str:
    batch, device = results.get("batch_size", MISSING), results.get("device", MISSING)
    accuracy = columns_of(results)[0] is ACCURACY
    notes = ["In brackets: against dense" + " (accuracy in points)" * accuracy + "."]
    if results.get("task") == "causal-lm":
        length = results.get("seq_len", MISSING)
        quality = "Accuracy: of the answers" if accuracy else "Perplexity: exp of the mean loss a token"
        notes.append(f"{quality}, on sequences held out.")
        notes.append(f"Tokens / s: prefill, median and quartiles, batch {batch} of {length} tokens, on {device}.")
    else:
        notes.append(f"Images / s: median and quartiles, batch {batch}, on {device}.")
    notes.append("Peak memory: the weights, and the peak of one inference forward on top.")
    return " ".join(notes)


def speed_table(results: dict, device: dict):
    """A rich Table of what `mamba-rsst bench` measured on one device: a line a measurement, a column a model.

    results: {models: [{name, path, parameters}], dtype, compiled, seq_len, rounds, versions}, seq_len None for images.
    device: {name, graph, rows}, rows as `speed.benchmark` returns them.
    """
    from rich import box
    from rich.table import Table

    models = [model["name"] for model in results["models"]]
    how = [results["dtype"], *["compiled blocks"] * results["compiled"], *["CUDA graph"] * device["graph"]]
    how += [f"prompt of {results['seq_len']} tokens"] if results["seq_len"] else []
    versions = ", ".join(" ".join(item) for item in results["versions"].items())
    table = Table(
        title=f"{' against '.join(reversed(models))} on {device['name']}\n{', '.join(how)}; {versions}",
        caption=f"Medians and quartiles of {results['rounds']} rounds in which the models take turns. "
        "Peak memory: the weights, and the peak of one forward on top.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for column in ("Batch", *models, *["Speed-up"] * (len(models) > 1)):
        table.add_column(column, justify="right")
    first, *others = (model["parameters"] for model in results["models"])
    compared = [f"{first / other:.2f}× fewer" for other in others]
    table.add_row("parameters", "", *(f"{count:,}" for count in (first, *others)), *compared)
    for (measure, batch), group in groupby(device["rows"], key=lambda row: (row["measure"], row["batch_size"])):
        rows, memory = list(group), measure.endswith(", bytes")
        better = [row["times_better"] for row in rows[1:]]
        better = [MISSING if b is None else f"{b:.2f}×" + " less" * memory for b in better]
        table.add_row(measure.removesuffix(", bytes"), f"{batch}", *(_speed(row, memory) for row in rows), *better)
    return table


def _speed(row, memory) -> str:
    if row["value"] is None:
        return "n/a"
    if memory:
        return f"{row['value'] / 2**20:,.1f} MiB"
    digits = 0 if row["value"] >= 1000 else 1 if row["value"] >= 100 else 2 if row["value"] >= 10 else 3
    value, low, high = (f"{row[key]:,.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def inspect_tables(found: dict) -> list:
    """What `mamba-rsst inspect` prints, rich tables and lines; `found` as `inspect_model` returns it."""
    from rich import box
    from rich.table import Table

    widths = Table(title=f"{found['path']} ({found['class']})")
    targets = [t for t in found["prunable"] if any(t in sizes for sizes in found["layers"])]
    for column in ("Layer", *targets):
        widths.add_column(column, justify="right")
    for layer, sizes in enumerate(found["layers"]):
        widths.add_row(str(layer), *(f"{sizes[t]:,}" if t in sizes else MISSING for t in targets))
    tied = "; tied embeddings counted once" if found.get("tied_embeddings") else ""
    lines = [f"parameters  {found['parameters']:,}  (torch.{found['dtype']}{tied})"]
    for what in ("image", "token"):
        if f"macs_per_{what}" in found:
            article = "an" if what == "image" else "a"
            lines.append(f"MACs        {found[f'macs_per_{what}']:,} {article} {what}")
    if "state_bytes" in found:
        lines.append(f"state       {found['state_bytes'] / 1024:,.1f} KiB a sequence, of any length")
    lines.append(f"hidden_size {found['hidden_size']:,}")
    lines.append(f"prunable    {', '.join(found['prunable'])}")
    places = Table("Runs as it is in", "", "Why, and what would make it so", box=box.SIMPLE_HEAD)
    places.caption = "vLLM, llama.cpp and mamba_ssm: as their code says; it was not run."
    for place in found["runs_in"]:
        more = f"\n→ {place['command']}" if place["command"] else ""
        places.add_row(place["where"], "yes" if place["runs"] else "no", place["why"] + more)
    return [widths, *lines, places]


def lm_table(models: list[dict], rows: dict[str, list[dict]], version: str = ""):
    """A rich Table of language models on lm-eval's tasks: a line a metric, a column a model.

    models: [{name, parameters}], the one to compare with first. rows: {name: rows as `lm_evaluation.metric_rows`
    gives them}. version: lm-eval's.
    """
    from rich import box
    from rich.table import Table

    names = [model["name"] for model in models]
    counted = {(row["task"], row["samples"]): None for row in rows[names[0]] if row["samples"] is not None}
    documents = ", ".join(f"{task} {samples:,}" for task, samples in counted)
    table = Table(
        title=" against ".join(reversed(names)),
        caption=f"± standard error, where lm-eval {version} gives one. Documents: {documents or MISSING}.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Task")
    table.add_column("Metric", no_wrap=True)
    for column in (*names, *["Change"] * (len(names) - 1)):
        table.add_column(column, justify="right")
    first, *others = (model["parameters"] for model in models)
    compared = [f"{other / first - 1:+.1%}" for other in others]
    table.add_row("", "parameters", *(f"{count:,}" for count in (first, *others)), *compared, end_section=True)
    scores = {name: {(r["task"], r["metric"], r["filter"]): r for r in rows[name]} for name in names}
    for key, row in scores[names[0]].items():
        task, metric, filtered = key
        arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
        cells = [scores[name].get(key) for name in names]
        digits = _digits(row["value"])
        changes = [MISSING if c is None else f"{c['value'] - row['value']:+,.{digits}f}" for c in cells[1:]]
        metric += "" if filtered == "none" else f" ({filtered})"
        table.add_row(task, metric + arrow, *(_score(cell) for cell in cells), *changes)
    return table


def _score(row) -> str:
    if row is None:
        return MISSING
    value, stderr, digits = row["value"], row["stderr"], _digits(row["value"])
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def _digits(value) -> int:
    """Behind the point: four for an accuracy or a perplexity that says something, none for one of thousands."""
    return 4 if abs(value) < 100 else 2 if abs(value) < 1000 else 0


def widths_table(table: list[dict]):
    """A rich Table of {layer, target, before, after}, then the total of each target with its sparsity."""
    from rich.table import Table

    if not table:
        raise ValueError("The table of widths is empty: nothing would be pruned.")
    shown = Table(title="Channels before and after")
    for column in ("Layer", "Target", "Before", "After", "Sparsity"):
        shown.add_column(column, justify="left" if column == "Target" else "right")
    totals = []
    for target in dict.fromkeys(row["target"] for row in table):
        rows = [row for row in table if row["target"] == target]
        totals.append({"layer": "total", "target": target} | {k: sum(r[k] for r in rows) for k in ("before", "after")})
    for row in (*table, *totals):
        before, after, style = row["before"], row["after"], "bold" if row["layer"] == "total" else None
        cells = (row["target"], f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else MISSING)
        layer = "all" if row["layer"] is None else str(row["layer"])
        shown.add_row(layer, *cells, style=style, end_section=row is table[-1])
    return shown
