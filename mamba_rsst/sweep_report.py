"""What a person looks at after a sweep: one table and one figure, over seeds and against the dense network."""

import io
import json
import statistics
from collections import Counter
from itertools import cycle
from pathlib import Path

from .figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from .report import MISSING, columns_of, human, plain_console, write_atomic
from .training.first_stage import LATER


SEED = "training.seed"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#B8860B", "#3A8FC4", "#222222")
MARKERS = "os^DvP<X>p"


# ---- numbers ----
def collect(runs: list[dict], firsts: list[dict]) -> dict:
    """A sweep's results, as JSON holds them.

    runs: {name, point, folder, seed, method, network, beginning} and, once it is there, the run's `results` or why it
    `failed`. firsts: the dense runs that trained first stages for others: {folder, seed, network, beginning, results}.
    Returns {task, metric, speed, devices, dense, runs, table}: `dense` a dict a seed, network and beginning, `runs`
    one a run with its status, `table` one a name and budget, its numbers {mean, std, n} over seeds (std None for one).
    """
    done = [entry["results"] for entry in [*firsts, *runs] if "results" in entry]
    metric = speed = None
    if done:
        columns = columns_of({**done[0], "rows": [row for results in done for row in results["rows"]]})
        metric, speed = columns[0][1], columns[3][1]
    dense = _dense(firsts, runs, metric, speed)
    numbers = [_run(entry, dense, metric, speed) for entry in runs]
    return {
        "task": done[0].get("task") if done else None,
        "metric": metric,
        "speed": speed,
        "devices": sorted({results["device"] for results in done if "device" in results}),
        "dense": list(dense.values()),
        "runs": numbers,
        "table": _table(numbers, list(dense.values()), metric),
    }


def _dense(firsts, runs, metric, speed) -> dict[tuple, dict]:
    """(network, beginning, seed) -> the dense network that runs are compared with: a shared first stage's, else a
    run's own."""
    dense = {}
    for entry in (*firsts, *(entry for entry in runs if entry["method"] != "scratch")):
        if "results" in entry:
            row, alone = entry["results"]["rows"][0], len(entry["results"]["rows"]) == 1
            about = {name: entry[name] for name in ("network", "beginning", "seed")}
            numbers = {**about, "folder": entry["folder"]}
            numbers |= {"final": row.get(metric), "parameters": row["parameters"], "macs": row["macs"]}
            numbers |= {"speed": row[speed], "seconds": entry["results"]["seconds"] if alone else None}
            dense.setdefault(tuple(about.values()), numbers)
    return dense


def _run(entry, dense, metric, speed) -> dict:
    run = {name: entry[name] for name in ("name", "point", "seed", "folder", "method", "network", "beginning")}
    if "results" not in entry:
        failed = {"status": "failed", "reason": entry["failed"]} if "failed" in entry else {"status": "not finished"}
        return {**run, **failed}
    results = entry["results"]
    first, *others = results["rows"]
    last = others[-1] if others else first
    # Size and speed against what was measured beside them; the quality against the network that was cut.
    base = results.get("full_size", first)
    # One built small began otherwise: the dense network of its seed, where there is only one.
    same = [d for d in dense.values() if (d["network"], d["seed"]) == (entry["network"], entry["seed"])]
    reference = first if others else same[0] if len(same) == 1 else {}
    return {
        **run,
        "status": "finished",
        "dense": reference.get(metric, reference.get("final")),
        "cut": others[0].get(metric) if len(others) > 1 else None,
        "final": last.get(metric),
        "parameters": last["parameters"],
        "parameters_share": last["parameters"] / base["parameters"],
        "macs": last["macs"],
        "macs_share": last["macs"] / base["macs"],
        "speed": last[speed],
        "speed_ratio": last[speed] / base[speed],
        "seconds": results["seconds"],
    }


def _table(runs, dense, metric) -> list[dict]:
    """Rows over seeds: the dense networks, then name by name and budget by budget in the order of the runs."""
    rows = []
    for network, beginning in dict.fromkeys((entry["network"], entry["beginning"]) for entry in dense):
        of = [entry for entry in dense if (entry["network"], entry["beginning"]) == (network, beginning)]
        cut = (run for run in runs if run["method"] != "scratch")
        run = next(run for run in cut if (run["network"], run["beginning"]) == (network, beginning))
        point = {k: v for k, v in run["point"].items() if _decides_dense(k)}
        twin = any(row["point"] == point for row in rows)  # trained otherwise by what a name stands for
        row = {"name": f"dense of {run['name']}" if twin else "dense", "point": point}
        row |= {"network": network, "seeds": [entry["seed"] for entry in of]}
        numbers = {name: _over_seeds(of, name) for name in ("final", "parameters", "macs", "speed", "seconds")}
        rows.append({**row, "baseline": True, **numbers})
    groups = {}
    for run in runs:
        point = {key: value for key, value in run["point"].items() if key != SEED}
        groups.setdefault(json.dumps([run["name"], point]), (point, []))[1].append(run)
    for point, group in groups.values():
        if not (of := [run for run in group if run["status"] == "finished"]):
            continue
        row = {"name": group[0]["name"], "point": point, "network": group[0]["network"]}
        row["seeds"] = [run["seed"] for run in of]
        names = ("final", "cut", "parameters", "parameters_share", "macs", "macs_share", "speed", "speed_ratio")
        row |= {name: _over_seeds(of, name) for name in (*names, "seconds")}
        compared = [run for run in of if None not in (run["final"], run["dense"])]
        change = [
            run["final"] / run["dense"] - 1 if metric == "perplexity" else run["final"] - run["dense"]
            for run in compared
        ]
        rows.append({**row, "change": _mean(change)})
    return rows


def _decides_dense(key: str) -> bool:
    """Whether a key of the grid decides what the dense network is, but for the seed."""
    section, _, name = key.partition(".")
    return section != "pruning" and key != SEED and not (section == "training" and name in LATER)


def _over_seeds(entries, name):
    return _mean([entry[name] for entry in entries if entry.get(name) is not None])


def _mean(values):
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


# ---- the table ----
def _cells(results: dict) -> tuple[list[str], list[list[str]]]:
    """(titles, one line of texts a row)."""
    rows, percent = results["table"], results["metric"] != "perplexity"
    keys = list(dict.fromkeys(key for row in rows for key in row["point"]))
    several = any(len(row["seeds"]) > 1 for row in rows)
    quality = ("Accuracy, %", "Against dense, points") if percent else ("Perplexity", "Against dense")

    def metric(stat, signed=False):
        if stat is None:
            return MISSING
        factor = 100 if percent or signed else 1
        unit = "%" if signed and not percent else ""
        text = f"{factor * stat['mean']:{'+' if signed else ''},.2f}{unit}"
        return text if stat["std"] is None else f"{text} ± {factor * stat['std']:,.2f}{unit}"

    def size(row, name):
        share = row.get(f"{name}_share")
        return f"{share['mean']:.1%}" if share else human(row[name]["mean"])

    def ratio(row):
        if (stat := row.get("speed_ratio")) is None:
            return MISSING
        return f"{stat['mean']:.2f}×" + (f" ± {stat['std']:.2f}" if stat["std"] is not None else "")

    titles = ["Run", *(key.rpartition(".")[2] for key in keys), *["n"] * several, *quality, "Right after the cut"]
    titles += ["Params", "MACs", "Speed", "Time, s"]
    lines = []
    for row in rows:
        cells = [row["name"], *(str(row["point"].get(key, MISSING)) for key in keys)]
        cells += [str(len(row["seeds"]))] * several
        cells += [metric(row["final"]), metric(row.get("change"), signed=True), metric(row.get("cut"))]
        seconds = MISSING if row["seconds"] is None else f"{row['seconds']['mean']:,.0f}"
        lines.append([*cells, size(row, "parameters"), size(row, "macs"), ratio(row), seconds])
    return titles, lines


def _notes(results: dict) -> list[str]:
    notes = ["Mean ± standard deviation over n seeds."] if any(len(r["seeds"]) > 1 for r in results["table"]) else []
    what = "image" if results["speed"] == "images_per_s" else "token"
    notes.append(f"Params, MACs / {what} and speed ({what}s / s): against the dense network, measured side by side.")
    notes.append("Time: of all training, a first stage that several runs share included in each.")
    if results["devices"]:
        notes.append(f"Measured on {'; '.join(results['devices'])}.")
    counts = Counter(run["status"] for run in results["runs"])
    if counts["not finished"]:
        notes.append(f"{counts['not finished']} of {len(results['runs'])} runs are not finished.")
    return notes


def _failures(results: dict) -> list[str]:
    return [f"{run['folder']} failed: {run['reason']}" for run in results["runs"] if run["status"] == "failed"]


def markdown(results: dict) -> str:
    """The table in Markdown, with its notes and what failed."""
    titles, lines = _cells(results)
    first = next(i for i, title in enumerate(titles) if title in ("n", "Accuracy, %", "Perplexity"))
    rule = [":--"] * first + ["--:"] * (len(titles) - first)
    table = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (titles, rule, *lines)
    )
    failures = "".join(f"\n- {line}" for line in _failures(results))
    return f"{table}\n\n{' '.join(_notes(results))}\n{failures}" + "\n" * bool(failures)


def print_table(results: dict, console=None) -> None:
    from rich import box
    from rich.table import Table

    console = console or plain_console()
    titles, lines = _cells(results)
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=" ".join(_notes(results)))
    for i, title in enumerate(titles):
        words = f"{title} {' '.join(line[0] for line in lines)}" if i == 0 else title
        table.add_column(title, justify="right" if i else "left", overflow="fold", min_width=min(_longest(words), 9))
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for line in _failures(results):
        console.print(line, style="bold", markup=False, highlight=False)


def _longest(text: str) -> int:
    """Characters of the longest word, which a column should not break."""
    return max(map(len, text.split()))


# ---- the figure ----
def plot(results: dict, path) -> Path:
    """PNG: quality against parameters, multiply-accumulates and measured speed; bars: standard deviation over seeds.

    The dense network is a star, and where all runs have the same one a line with a band. Points of equal size that
    would hide one another are moved sideways; those of a speed never.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rows = [row for row in results["table"] if row["final"] is not None]
    baselines = [row for row in rows if row.get("baseline")]
    names = list(dict.fromkeys(row["name"] for row in rows if not row.get("baseline")))
    percent = results["metric"] != "perplexity"
    factor = 100 if percent else 1
    figure = Figure(figsize=(14, max(4.8, 0.27 * len(names) + 2)), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, sharey=True)
    what = "image" if results["speed"] == "images_per_s" else "token"
    axes = (("parameters", "parameters"), ("macs", f"multiply-accumulates / {what}"), ("speed_ratio", f"{what}s / s"))
    ys = [factor * (row["final"]["mean"] + side * (row["final"]["std"] or 0)) for row in rows for side in (-1, 1)]
    for panel, (key, label) in zip(panels, axes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#D9D9D9", linewidth=0.6)
        panel.set_axisbelow(True)
        xs = [_x(row, key) for row in rows]
        if key == "speed_ratio":
            room = 0.08 * (max(xs) - min(xs)) or 0.1
            panel.set_xlim(min(xs) - room, max(xs) + room)
        else:
            panel.set_xlim(0, 1.08 * max(xs))
        panel.xaxis.set_major_locator(MaxNLocator(5))
        if key == "speed_ratio":
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
            label += ", against dense"
        else:
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value) if value else "0"))
        panel.set_xlabel(label, fontsize=11)
    if not percent and min(ys) > 0 and max(ys) > 10 * min(ys):
        panels[0].set_yscale("log")
        panels[0].set_ylim(min(ys) / 1.2, max(ys) * 1.2)
    else:
        room = 0.06 * (max(ys) - min(ys)) or 0.5
        panels[0].set_ylim(min(ys) - room, max(ys) + room)
    panels[0].set_ylabel("accuracy (%)" if percent else "perplexity (lower is better)", fontsize=11)
    looks = dict(zip(names, zip(cycle(COLOURS), cycle(MARKERS))))
    handles = [
        panels[0].plot([], [], marker=marker, linestyle="", color=colour, label=name)[0]
        for name, (colour, marker) in looks.items()
    ]
    if baselines:
        handles.insert(
            0, panels[0].plot([], [], marker="*", linestyle="", color=GREY, markersize=11, label="dense")[0]
        )
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=10)
    note = "Bars: standard deviation over seeds. " * any(len(row["seeds"]) > 1 for row in rows)
    note += "Dashed: dense. " * (len(baselines) == 1)
    note += "At equal sizes points stand side by side where they would hide one another."
    figure.supxlabel(note, fontsize=9, color=GREY)
    figure.draw_without_rendering()  # the layout, in which distances on paper are measured
    for panel, (key, _) in zip(panels, axes):
        if len(baselines) == 1:
            _band(panel, baselines[0]["final"], factor)
        own = [_x(row, key) for row in rows]
        places = own if key == "speed_ratio" else _places(panel, rows, key, factor)  # a speed was measured
        for name, (colour, _) in looks.items():
            line = sorted((places[i], factor * row["final"]["mean"]) for i, row in enumerate(rows) if _is(row, name))
            panel.plot(*zip(*line), color=colour, linewidth=1, alpha=0.6)
        for x, row in zip(places, rows):
            star = row.get("baseline")
            colour, marker = (GREY, "*") if star else looks[row["name"]]
            spread = row.get(key) if key == "speed_ratio" else None
            panel.errorbar(
                x,
                factor * row["final"]["mean"],
                yerr=None if star and len(baselines) == 1 else factor * (row["final"]["std"] or 0) or None,
                xerr=(spread and spread["std"]) or None,
                color=colour,
                marker=marker,
                markersize=_size(row),
                linestyle="",
                elinewidth=1.2,
                capsize=2,
                markeredgecolor="white",
                markeredgewidth=0.5,
                clip_on=False,
                zorder=3,
            )
    figure.savefig(png := io.BytesIO(), format="png")
    return write_atomic(path, png.getvalue())


def _is(row, name) -> bool:
    return row["name"] == name and not row.get("baseline")


def _x(row, key) -> float:
    return 1.0 if key == "speed_ratio" and row.get("baseline") else row[key]["mean"]


def _band(panel, stat, factor) -> None:
    mean, std = factor * stat["mean"], factor * (stat["std"] or 0)
    panel.axhline(mean, color=GREY, linewidth=1, linestyle="--", zorder=1)
    if std:
        panel.axhspan(mean - std, mean + std, color=GREY, alpha=0.15, lw=0, zorder=0)


def _size(row) -> float:
    return 12 if row.get("baseline") else 7


def _places(panel, rows, key, factor) -> list[float]:
    """Where along x each row's point is drawn: as far beside its own place as it takes to hide none before it."""
    places, taken, to_points = [], [], 72 / panel.figure.dpi
    for row in rows:
        x, y, std = _x(row, key), factor * row["final"]["mean"], factor * (row["final"]["std"] or 0)
        (own, low), (_, high) = (to_points * panel.transData.transform((x, y + side * std)) for side in (-1, 1))
        size = _size(row)
        low, high = low - size / 2, high + size / 2
        for shift in sorted(range(-40, 41), key=lambda n: (abs(n), n < 0)):
            at = own + shift * (size + 1.5)
            if not any(abs(at - x0) < size + 1.5 and low < y1 and y0 < high for x0, y0, y1 in taken):
                break
        taken.append((at, low, high))
        places.append(panel.transData.inverted().transform((at / to_points, 0))[0])
    return places
