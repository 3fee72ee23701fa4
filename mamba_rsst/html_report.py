"""`mamba-rsst report`: one HTML page about one run or several, which needs nothing outside itself."""

import shlex
from functools import partial
from pathlib import Path

from . import figures
from ._version import __version__
from .card import METHODS, SCRATCH, TARGETS, method_of
from .html_page import GENERATOR, Html, element, figure, page, table
from .report import MISSING, RECIPE_FILE, RESULTS_FILE, cells_of, columns_of, notes_of, write_atomic
from .saved_run import SavedRun, read_run
from .training.arguments import UNPRUNED
from .training.rounds import RunFolder


METHOD_NAMES = {
    "rsst": "RSST",
    "refill": "Refill",
    "prune": "Pruning by scores",
    "unstructured": "Unstructured masks",
    "dense": "Dense training",
    "scratch": "The pruned size from new weights",
}


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
    if len(runs) == 1:
        title = _title(runs[0])
        body = [element("h1", title), *_whole(runs[0], heading="h2")]
    else:
        title = f"{len(runs)} runs compared"
        body = [element("h1", title)]
        for number, run in enumerate(runs, 1):
            parts = [element("h2", f"{number}. {run.label}"), element("p", _title(run), class_="note")]
            body.append(element("section", *parts, *_whole(run, heading="h3"), id=f"run-{number}", class_="run"))
        body[1:1] = _comparison(runs)
    written = f"Written by mamba-rsst report, version {__version__}, from the runs' own files."
    return page(title, *body, element("footer", element("p", written, class_="note")))


# ---- one run ----
def _whole(run: SavedRun, heading: str) -> list[Html]:
    try:
        return [part for section in _sections(run, heading) for part in section]
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        # The readers have checked the outlines; a file written by hand can still hold a word in a number's place.
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"The files of the run {str(run.path)!r} do not fit together ({found}).") from error


def _sections(run: SavedRun, heading: str):
    title = partial(element, heading)
    yield element("p", _summary(run), class_="lead"), *_how(run)
    if run.finished:
        yield element("ul", *_tiles(run), class_="tiles"), title("Results"), _results(run)
    if run.widths:
        yield title("Channels kept in each layer"), _widths(run)
    yield title("Scores of the channels"), *_scores(run)
    yield title("Training"), _training(run)
    yield title("Stages"), _stages(run)
    yield title("How to reproduce it"), *_reproduce(run)


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
    dense, final = run.dense.get(key), run.final.get(key)
    if not run.finished:
        known = f"; its dense {title.lower()} is {text(dense)}" if dense is not None else ""
        return f"{_method(run)} of {what}, not finished{known}."
    quality = "not measured" if final is None else text(final)
    if run.final is run.dense:
        how = "was trained from new weights at a smaller size" if run.base else "was trained without pruning"
        return f"{what} {how}: {title.lower()} {quality}{_gains(run)}."
    removed = [
        f"{share:.1%} of the {TARGETS.get(target, 'channels')} ({target})"
        for target, share in (results.get("channel_sparsity") or {}).items()
    ]
    if "weight_sparsity" in results:
        removed.append(f"{results['weight_sparsity']:.1%} of the weights that may be masked")
    if dense is not None and final is not None:
        points = " points" if key == "accuracy" else ""
        quality = f"went from {text(dense)} to {quality} ({compared(final, dense)}{points})"
    done = f"removed {' and '.join(removed)} from" if removed else "of"
    return f"{_method(run)} {done} {what}: {title.lower()} {quality}{_gains(run)}."


def _gains(run: SavedRun) -> str:
    gains = []
    for key, words in (("parameters", "parameters"), ("macs", "multiply-accumulates")):
        if run.base.get(key) and run.final.get(key) is not None and run.final[key] != run.base[key]:
            less = 1 - run.final[key] / run.base[key]
            gains.append(f"{abs(less):.1%} {'fewer' if less > 0 else 'more'} {words}")
    for _, key, *_ in columns_of(run.results):
        if key.endswith("_per_s") and run.base.get(key) and run.final.get(key) is not None:
            gains.append(f"{run.final[key] / run.base[key]:.2f} times the {key.partition('_')[0]} a second")
    *others, last = gains or [""]
    return f", with {' and '.join([', '.join(others), last] if others else [last])}" if gains else ""


def _progress(run: SavedRun) -> str:
    stages, done, now = run.state.get("stages", []), run.state.get("done", 0), run.under_way
    if not stages:
        return "It has not begun its first stage; all that is there is its recipe."
    if done >= len(stages):
        return f"All its stages are done, but no {RESULTS_FILE} is there: its models have not been measured."
    names = f" ({', '.join(stages[:done])})" if done else ""
    far = "has left no checkpoint yet"
    if "steps" in now:
        far = f"had reached step {now['steps']:,} (epoch {now['epochs'] or 0:.1f}) at its last checkpoint"
    return f"{done} of its {len(stages)} stages are done{names}; {now.get('stage', stages[done])} {far}."


def _how(run: SavedRun) -> list[Html]:
    """What the method does; of an unfinished run, how far it came."""
    if not run.finished:
        stopped = element("strong", "This run has not finished.")
        return [element("p", stopped, " ", _progress(run), class_="warning")]
    method = method_of(run.results)
    words = SCRATCH if method == "scratch" else METHODS.get(method)
    return [element("p", words)] if words else []


def _tiles(run: SavedRun):
    base_name = "full size" if run.final is run.dense else "dense"
    against = {"accuracy": f" points against {base_name}", "perplexity": f" against {base_name}"}
    for title, key, text, compared in columns_of(run.results):
        value, base = run.final.get(key), run.base.get(key)
        if value is not None:
            lines = [element("span", title), " ", element("b", text(value))]
            if base:
                words = against.get(key, f" {base_name}" if key.endswith("_per_s") else f" of {base_name}")
                lines += [" ", element("span", compared(value, base) + words)]
            yield element("li", *lines)


def _results(run: SavedRun):
    titles = ["Model", *(title for title, *_ in columns_of(run.results))]
    return table(titles, [cells_of(row, run.results) for row in run.results["rows"]], notes_of(run.results))


def _widths(run: SavedRun):
    drawn = {target: both for target, both in run.widths.items() if sum(both["dense"])}
    kept = [f"{t} {sum(both['kept']):,} of {sum(both['dense']):,}" for t, both in drawn.items()]
    words = f"Channels kept in all layers together: {', '.join(kept)}."
    if not run.finished:
        words += " As the last choice leaves them: the run has not finished."
    layers = [f"{t}: {', '.join(map(str, both['kept']))}" for t, both in drawn.items()]
    return figure(figures.draw_widths(drawn), f"{words} Layer by layer, {'; '.join(layers)}.", words)


def _scores(run: SavedRun) -> list[Html]:
    if not run.scores:
        unpruned = run.results.get("method") in UNPRUNED
        return [element("p", "A run that prunes nothing scores no channels." if unpruned else "No scores were kept.")]
    normalised = {"mean": "divided by the mean of its layer", "max": "divided by the largest of its layer"}
    how = normalised.get(run.pruning.get("normalization", "mean"), "as it is")
    importance = run.pruning.get("importance") or "the default"
    if isinstance(importance, dict):
        importance = ", ".join(f"{name} for {target}" for target, name in importance.items())
    parts = [element("p", f"Score: {importance}, {how}; zeros stand at the left end of a logarithmic axis.")]
    for stage, scores in run.scores.items():
        counts = []
        for target, both in scores.items():
            kept, leaving = next(iter(both.values()))
            counts.append(f"{target}, {len(kept):,} kept and {len(leaving):,} leaving")
        words = f"Channels by score in stage {stage}: {'; '.join(counts)}."
        parts.append(figure(figures.draw_scores(scores), f"Histograms. {words}", words))
    return parts


def _training(run: SavedRun) -> Html:
    last = {key: entry[key] for entry in run.history if "epoch" in entry for key in entry if entry[key] is not None}
    if not {"loss", "eval_accuracy", "eval_perplexity", "lambda", "leaving_share"} & set(last):
        return element("p", "Nothing has been logged.")
    title, key, text, _ = run.quality
    words = "Loss and quality over the epochs of all stages"
    if "lambda" in last:
        words += "; below, the penalty λ and the norm of the leaving channels as a share of the norm of all"
    lasts = [("loss", "loss", "{:.4g}".format), (f"eval_{key}", title.lower(), text)]
    lasts.append(("leaving_share", "share of the leaving channels", "{:.3g}".format))
    told = ", ".join(f"{what} {form(last[name])}" for name, what, form in lasts if name in last)
    words += f". Last logged: {told}." if told else "."
    return figure(figures.draw_training(run.history), words, words)


def _stages(run: SavedRun) -> Html:
    if not run.state:
        return element("p", f"This folder holds no {RunFolder.STATE}, which would tell of them.")
    title, key, text, _ = run.quality
    whens = {"before_cut": "before the cut", "after_cut": "after the cut", "end": "at the end"}
    titles = ["Stage", "Epochs", "Steps", "Seconds", *(f"{title} {words}" for words in whens.values())]
    rows = []
    for index, name in enumerate(run.state["stages"]):
        spent = run.under_way if index == run.state["done"] else run.state.get("spent", {}).get(name, {})
        row = [name, *(_number(spent.get(what), form) for what, form in SPENT.items())]
        metrics = run.state.get("metrics", {}).get(name, {})
        values = [metrics.get(when, {}).get(f"eval_{key}") for when in whens]
        rows.append([*row, *(MISSING if value is None else text(value) for value in values)])
    return table(titles, rows, "A dash: it does not apply, was not recorded, or is still to come.")


SPENT = {"epochs": ".4g", "steps": ",.0f", "seconds": ",.1f"}


def _number(value, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _reproduce(run: SavedRun) -> list[Html]:
    path = run.path if run.path.name not in ("", "..") else run.path.resolve()
    parts, recipe = [], path / RECIPE_FILE
    if recipe.is_file():
        again = ["mamba-rsst", "train", str(recipe), f"training.output_dir={path}-again"]
        parts.append(element("pre", element("code", shlex.join(again))))
        if not run.finished:
            resumed = shlex.join(["mamba-rsst", "train", str(recipe), "--resume"])
            parts += [element("p", "To go on with it where it stopped:"), element("pre", element("code", resumed))]
    results = run.results
    seconds = results.get("seconds", run.state.get("seconds"))
    facts = {"Seed": results.get("seed"), "Device": results.get("device")}
    facts |= {name.title(): version for name, version in (results.get("versions") or {}).items()}
    facts["Training took"] = None if seconds is None else f"{seconds:,.1f} seconds"
    known = {name: value for name, value in facts.items() if value is not None}
    pairs = [(element("dt", name), element("dd", str(value))) for name, value in known.items()]
    parts += [element("dl", *(part for pair in pairs for part in pair))] if pairs else []
    written = element("pre", element("code", run.recipe.strip("\n")))
    return [*parts, element("details", element("summary", "The resolved recipe"), written)]


# ---- several runs ----
def _comparison(runs: list[SavedRun]) -> list[Html]:
    """A table and a figure for each kind of run: accuracy and perplexity have no common axis."""
    kinds = {}
    for number, run in enumerate(runs, 1):
        kinds.setdefault(tuple(title for title, *_ in columns_of(run.results)), {})[number] = run
    return [part for numbered in kinds.values() for part in _compare(numbered)]


def _compare(numbered: dict[int, SavedRun]):
    columns = columns_of(next(iter(numbered.values())).results)
    (title, key, text, compared), costs = columns[0], [column for column in columns[1:] if column[1] != "peak_memory"]
    titles = ["Run", "Method", f"Dense {title.lower()}", "Final", "Change", *(name for name, *_ in costs), "Seconds"]
    rows = []
    for number, run in numbered.items():
        dense, final, pruned = run.dense.get(key), run.final.get(key), run.final is not run.dense
        cells = cells_of(run.final, run.results)[1:] if run.finished else [MISSING] * len(columns)
        known = {column[1]: cell for column, cell in zip(columns, cells)}
        rows.append(
            [
                element("span", f"{number}. ", element("a", run.label, href=f"#run-{number}")),
                _method(run),
                MISSING if dense is None else text(dense),
                "not finished" if not run.finished else MISSING if final is None else text(final),
                compared(final, dense) if dense and pruned and final is not None else MISSING,
                *(known[cost] for _, cost, *_ in costs),
                _number(run.results.get("seconds", run.state.get("seconds")), ",.0f"),
            ]
        )
    change = "in points" if key == "accuracy" else "relative"
    note = f"Change: against the run's own dense model, {change}. In brackets: against that model, and quartiles."
    yield table(titles, rows, f"{note} Speeds of different runs were measured at different times.", words=1)
    finished = {number: run for number, run in numbered.items() if run.finished}
    if warning := _differences(list(finished.values())):
        yield element("p", warning, class_="warning")
    known = [run.final for run in finished.values() if run.final.get(key) is not None]
    costs = [(cost, name) for name, cost, *_ in costs if any(row.get(cost) is not None for row in known)]
    if costs:
        axis = f"{title.lower()} (%)" if key == "accuracy" else title.lower()
        drawn = figures.draw_comparison(_points(finished, key), (key, axis), costs)
        names = ", ".join(name for _, name in costs)
        words = f"{title} against {names}: a disc with the number of each run, a ring for its own dense model. "
        words += "The figures stand in the table above."
        yield figure(drawn, words, words)


def _points(numbered: dict[int, SavedRun], key: str) -> list[dict]:
    """As `figures.draw_comparison` takes them, accuracy in percent."""

    def shown(row):
        return row | {key: 100 * row[key]} if key == "accuracy" and row.get(key) is not None else row

    return [
        {
            "number": number,
            "label": run.label,
            "dense": shown(run.dense) if run.final is not run.dense else {},
            "final": shown(run.final),
        }
        for number, run in numbered.items()
    ]


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
