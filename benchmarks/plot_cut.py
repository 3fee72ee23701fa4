"""What a cut costs and what training gives back: accuracy right after the cut and at the end, against the dense one's.

    python benchmarks/plot_cut.py FIGURE.png SWEEP/results.json ...

From the results of one or several sweeps; the runs of one name and size are averaged, bars are their range. Each run
is compared with the dense network that it was cut from, so that runs from several may stand in one line.
"""

import argparse
import json
from collections import defaultdict

from matplotlib.figure import Figure


LINES = ("o-", "s-", "^-", "D-", "v-", "P-", "X-", "*-", "<-")


def read(files):
    """{name: {parameters: [(after the cut, at the end)]}}, accuracies less that of the dense network."""
    runs = defaultdict(lambda: defaultdict(list))
    for file in files:
        with open(file, encoding="utf-8") as text:
            results = json.load(text)
        for run in results["runs"]:
            if run["status"] == "finished" and run.get("dense") is not None:
                ends = [None if run.get(key) is None else run[key] - run["dense"] for key in ("cut", "final")]
                runs[run["name"]][run["parameters"]].append(ends)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", help="PNG to write")
    parser.add_argument("results", nargs="+", help="results.json of sweeps")
    args = parser.parse_args()
    runs = read(args.results)
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    for i, (panel, title) in enumerate(zip(panels, ("right after the cut", "at the end"))):
        panel.set_title(title)
        panel.set_xlabel("parameters, millions")
        panel.grid(color="#E0E0E0", linewidth=0.6)
        for line, (name, sizes) in zip(LINES, runs.items()):
            found = {size: [100 * pair[i] for pair in pairs if pair[i] is not None] for size, pairs in sizes.items()}
            points = sorted((size / 1e6, min(ys), sum(ys) / len(ys), max(ys)) for size, ys in found.items() if ys)
            if not points:
                continue
            xs, low, mean, high = zip(*points)
            bars = [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]]
            panel.errorbar(xs, mean, yerr=bars, fmt=line, capsize=2, linewidth=1, markersize=5, label=name)
        panel.axhline(0, color="black", linewidth=1)
    panels[0].set_ylabel("accuracy against the dense network, points")
    panels[1].legend(fontsize=8, loc="lower right")
    figure.savefig(args.figure)
    print(f"Written to {args.figure}.")


if __name__ == "__main__":
    main()
