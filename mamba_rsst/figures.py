"""Figures of runs: `plot_*` writes a PNG, `draw_*` gives the figure that it writes.

`history` is a Trainer's `log_history`, each entry with its `stage` and an `epoch` that never restarts.
"""

import base64
import io
from itertools import groupby
from pathlib import Path

from .report import write_atomic


# Okabe and Ito's palette (two of them darker, for text), which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#00785A", "#AA4499", "#555555"
CURVES = ("loss", "eval_accuracy", "eval_perplexity", "lambda", "leaving_share")
"""What of a history is drawn."""
TINTS = {"train": "#E4ECF4", "rsst": "#FBEEDB", "recover": "#E3F2EA"}


def plot_widths(widths: dict, path) -> Path:
    return _save(draw_widths(widths), path)


def draw_widths(widths: dict):
    """One panel a target, one bar a layer, the dense width in outline and the kept width filled.

    widths: {"d_inner": {"dense": [one int a layer], "kept": [one int a layer]}, ...}
    """
    for target, both in widths.items():
        if len(both["dense"]) != len(both["kept"]):
            raise ValueError(f"{target}: {len(both['dense'])} dense widths but {len(both['kept'])} kept ones.")
    widths = {target: both for target, both in widths.items() if sum(both["dense"])}  # no MLP: no panel
    if not widths:
        raise ValueError("There are no widths to plot.")

    layers = max(len(both["dense"]) for both in widths.values())
    figure, panels = _figure(min(max(3 + 0.42 * layers, 6), 11), 0.5 + 2.6 * len(widths), len(widths))
    for panel, (target, both) in zip(panels, widths.items(), strict=True):
        dense, kept, top = both["dense"], both["kept"], max(*both["dense"], *both["kept"])
        bars = panel.bar(range(len(kept)), kept, width=0.8, color=BLUE, label="kept")
        panel.bar(range(len(kept)), dense, width=0.8, fill=False, edgecolor=GREY, linewidth=0.9, label="dense")
        if layers <= 24:  # the number inside its bar, or above a bar too low for it
            size = 9 if layers <= 16 else 7.5
            for inside, padding, colour in ((False, 1, "black"), (True, -size - 4, "white")):
                numbers = [width if (width > 0.2 * top) == inside else "" for width in kept]
                panel.bar_label(bars, numbers, padding=padding, fontsize=size, color=colour)
            panel.set_xticks(range(layers))
        share = f"{sum(kept) / sum(dense):.1%}"
        panel.set_title(f"{target}: {sum(kept):,} of {sum(dense):,} channels kept ({share})", loc="left")
        panel.set(ylabel="channels", ylim=(0, 1.08 * top), xlim=(-0.7, layers - 0.3))
    panels[-1].set_xlabel("layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def has_curves(history: list[dict]) -> bool:
    """Whether `draw_training` finds anything in it."""
    return any("epoch" in entry and key in entry for entry in history for key in CURVES)


def plot_training(history: list[dict], path) -> Path:
    return _save(draw_training(history), path)


def draw_training(history: list[dict]):
    """Over cumulative epochs, the stages shaded: loss and quality; below, lambda and the leaving channels' share.

    Quality is the accuracy, or where there is none the perplexity.

    What the history lacks is left out, and with it the lower panel (a baseline has no lambda).
    """
    history = [entry for entry in history if "epoch" in entry]
    series = {key: _series(history, key) for key in CURVES}
    quality = ("eval_accuracy", "eval accuracy (%)", ORANGE, "o--")
    if not series["eval_accuracy"][0]:
        quality = ("eval_perplexity", "eval perplexity", ORANGE, "o--")
    plan = [
        [("loss", "train loss", BLUE, ".-"), quality],
        [("lambda", "penalty λ", GREEN, ".-"), ("leaving_share", "leaving channels' share", PURPLE, "o--")],
    ]
    plan = [lines for lines in ([line for line in panel if series[line[0]][0]] for panel in plan) if lines]
    if not plan:
        raise ValueError("The history holds neither loss nor quality nor penalty: there is nothing to plot.")

    figure, panels = _figure(10, 4.2 if len(plan) == 1 else 6.6, len(plan), height_ratios=[3, 2][: len(plan)])
    for panel, lines in zip(panels, plan, strict=True):
        for index, (key, label, colour, style) in enumerate(lines):
            axis = panel.twinx() if index else panel
            axis.spines["top"].set_visible(False)
            epochs, values = series[key]
            axis.plot(epochs, values, style, color=colour, markersize=4 if len(epochs) <= 100 else 0, clip_on=False)
            axis.set_ylabel(label, color=colour, fontsize=11)
            positive = [value for value in values if value > 0]  # nan, which breaks the line, is not
            if (
                key in ("eval_perplexity", "lambda", "leaving_share")
                and positive
                and max(positive) > 10 * min(positive)
            ):
                axis.set_yscale("log", nonpositive="mask")
            axis.tick_params(axis="y", which="both", colors=colour, labelsize=10)
    _shade_stages(history, panels, inches=8)
    panels[-1].set_xlabel("epoch, all stages together")
    return figure


def draw_scores(scores: dict):
    """Histograms of the channels' scores, a row a target: when the channels were chosen, and at the stage's end.

    scores: {target: {"before": (kept, leaving), "after": (kept, leaving)}}, arrays of scores as they were compared;
    "after" may be missing. Where they span orders of magnitude the axis is logarithmic, zeros at its left end.
    """
    import numpy as np
    from matplotlib.figure import Figure

    moments = [m for m in MOMENTS if any(m in both for both in scores.values())]
    figure = Figure(figsize=(9.6, 0.6 + 2.6 * len(scores)), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(len(scores), len(moments), squeeze=False)
    for row, (target, both) in zip(panels, scores.items(), strict=True):
        for panel, moment in zip(row, moments, strict=True):
            _plain(panel)
            if moment not in both:
                panel.set_axis_off()
                continue
            bins, logarithmic = _bins(np.concatenate(both[moment]))
            kept, leaving = (np.clip(part, bins[0], bins[-1]) for part in both[moment])
            labels = ["leaving", "kept"]
            panel.hist([leaving, kept], bins, stacked=True, color=[ORANGE, BLUE], label=labels, linewidth=0)
            panel.set_title(f"{target}, {MOMENTS[moment]}", loc="left", fontsize=11)
            if logarithmic:
                panel.set_xscale("log")
        row[0].set_ylabel("channels")
    for panel in panels[-1]:
        panel.set_xlabel("score", fontsize=11)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


MOMENTS = {"before": "when they were chosen", "after": "at the stage's end"}


def _bins(values):
    """(edges of 40 bins, whether they are spaced in proportion): over eight orders of magnitude at most."""
    import numpy as np

    high, positive = values.max(), values[values > 0]
    if values.min() < 0 or not len(positive) or high <= 100 * positive.min():
        low = values.min()
        return np.linspace(low, high if high > low else low + 1, 41), False
    return np.geomspace(max(positive.min(), 1e-8 * high), high, 41), True


def draw_comparison(points: list[dict], quality: tuple[str, str], costs: list[tuple[str, str]]):
    """Quality against each cost, a panel a cost: a numbered disc a run, a line from its dense model (a ring).

    points: [{number, label, dense: {key: value}, final: {key: value}}], what is None or missing is not drawn; `dense`
    is {} for a run that has no other model.  quality and costs: (key, title).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = -(-len(points) // 3)
    figure = Figure(figsize=(9.6, 3.6 + 0.24 * rows), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    key, title = quality
    for panel, (cost, name) in zip(panels, costs, strict=True):
        _plain(panel)
        for point in points:
            colour = RUN_COLOURS[(point["number"] - 1) % len(RUN_COLOURS)]
            known = [p for p in (point["dense"], point["final"]) if p.get(key) is not None and p.get(cost) is not None]
            xs, ys = [p[cost] for p in known], [p[key] for p in known]
            panel.plot(xs, ys, "-", color=colour, linewidth=1, alpha=0.6)
            if point["dense"] in known:
                panel.plot(xs[:1], ys[:1], "o", color=colour, markerfacecolor="white", markersize=7)
            if point["final"] in known:
                panel.plot(xs[-1:], ys[-1:], "o", color=colour, markersize=13, markeredgecolor="white")
                style = {
                    "color": "white",
                    "fontsize": 8,
                    "fontweight": "bold",
                    "ha": "center",
                    "va": "center_baseline",
                }
                panel.annotate(f"{point['number']}", (xs[-1], ys[-1]), **style)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlabel(name, fontsize=11)
        panel.margins(0.12)
        panel.set_xlim(left=0)
    panels[0].set_ylabel(title, fontsize=11)
    figure.legend(handles=_legend(points), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


RUN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#000000", "#0A6E8A", "#8A5A00", GREY)
"""Dark enough for a white number on them; where they begin again, the number tells."""


def _legend(points):
    from matplotlib.lines import Line2D

    style = {"marker": "o", "linestyle": "", "markersize": 7}
    colours = [RUN_COLOURS[(point["number"] - 1) % len(RUN_COLOURS)] for point in points]
    lines = [Line2D([], [], color=c, label=f"{p['number']} {p['label']}", **style) for c, p in zip(colours, points)]
    if any(point["dense"] for point in points):
        lines.append(Line2D([], [], color=GREY, markerfacecolor="white", label="the run's dense model", **style))
    return lines


def _series(history, key) -> tuple[list, list]:
    """Epochs and values of `key` (accuracy in percent), a nan between two stages so that the line breaks there."""
    epochs, values = [], []
    for _, entries in groupby(history, key=lambda entry: entry.get("stage")):
        points = [(entry["epoch"], entry[key]) for entry in entries if entry.get(key) is not None]
        for epoch, value in [(points[0][0], float("nan")), *points] if points else ():
            epochs.append(epoch)
            values.append(100 * value if key == "eval_accuracy" else value)
    return epochs, values


def _shade_stages(history, panels, inches):
    """Tint each stage in every panel and name it above the first, upright where the names would not fit."""
    spans, start = [], 0.0
    for stage, entries in groupby(history, key=lambda entry: entry.get("stage")):
        end = max(entry["epoch"] for entry in entries)
        if stage and end > start:
            spans.append((stage, start, end))
        start = max(start, end)
    panels[0].set_xlim(0, start or 1)
    scale, last = inches / (start or 1), -1.0
    upright = any(0.09 * len(stage) > scale * (end - begin) for stage, begin, end in spans)
    style = {"ha": "center", "va": "bottom", "rotation": 90 if upright else 0, "fontsize": 10, "color": GREY}
    for stage, begin, end in spans:
        for panel in panels:
            panel.axvspan(begin, end, color=TINTS.get(stage.split("-")[0], "#EFEFEF"), lw=0, zorder=-1)
            panel.axvline(end, color="white", linewidth=1.5, zorder=-1)
        middle = (begin + end) / 2
        if not upright or scale * middle - last > 0.18:
            panels[0].text(middle, 1.02, stage, transform=panels[0].get_xaxis_transform(), **style)
            last = scale * middle


def _figure(width, height, rows, **options):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, sharex=True, squeeze=False, **options)[:, 0]
    for panel in panels:
        _plain(panel)
        panel.xaxis.label.set_size(11)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, panels


def _plain(panel):
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#D9D9D9", linewidth=0.6)
    panel.set_axisbelow(True)


def svg_uri(figure) -> str:
    """The figure as a data URI of SVG, the same characters for the same figure."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "mamba_rsst"}):
        figure.savefig(svg := io.BytesIO(), format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()


def _save(figure, path) -> Path:
    figure.savefig(png := io.BytesIO(), format="png")
    return write_atomic(path, png.getvalue())
