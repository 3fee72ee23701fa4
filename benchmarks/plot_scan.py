"""How the selective scan's time and memory grow with L, E, N and B: one PNG of four panels.

    python benchmarks/plot_scan.py FILE.png [--device cuda] [--quick] [--seconds 5]

Each panel varies one size about (B, L, E, N) = (8, 128, 384, 16), on CUDA (64, 256, 768, 16), one direction. Solid
lines, left axis: milliseconds of forward and backward, best of several. Dashed, right axis: MiB that one run takes
above its inputs. Both logarithmic: a slope of one is linear growth. `transformers` is its sequential scan, whose
backward is quadratic in L. A back end stops where a run would take longer than `--seconds`, judged from its last two.
"""

import argparse
import time

import torch
from bench_scan import runner

from mamba_rsst.report import write_atomic
from mamba_rsst.speed import device_name, peak_above


CENTRE = {"cpu": dict(B=8, L=128, E=384, N=16), "cuda": dict(B=64, L=256, E=768, N=16)}
FACTORS = {"B": (1 / 8, 1 / 4, 1 / 2, 1, 2, 4), "L": (1 / 4, 1 / 2, 1, 2, 4, 8), "E": (1 / 4, 1 / 2, 1, 2, 4)}
FACTORS["N"] = (1 / 4, 1 / 2, 1, 2, 4)
NAMES = {"B": "batch B", "L": "length L", "E": "channels E (d_inner)", "N": "states N (d_state)"}
COLOURS = {"transformers": "#D55E00", "reference": "#AA4499", "torch": "#0072B2", "triton": "#00785A"}


def seconds(run, device, runs):
    """Best of `runs` forward-and-backward passes, after one untimed."""
    best = float("inf")
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(True)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure(name, axis, args):
    """[(size, ms, MiB)] of one back end along one axis, as far as it gets within the limit."""
    points, last = [], []
    for factor in FACTORS[axis]:
        sizes = CENTRE[args.device] | {axis: max(1, round(CENTRE[args.device][axis] * factor))}
        # Growth from the last two points: a run that would take too long is not begun.
        if len(last) > 1 and last[-1] * last[-1] / last[-2] > args.seconds:
            break
        shape = (1, sizes["B"], sizes["L"], sizes["E"], sizes["N"])
        try:
            run = runner(name, shape, args.device)
            last.append(seconds(run, args.device, 1))  # the first run, which warms up
            if last[-1] < args.seconds:
                last[-1] = min(last[-1], seconds(run, args.device, 2 if args.quick or last[-1] > 1 else 5))
            memory = peak_above(lambda run=run: run(True), torch.device(args.device))
            memory = float("nan") if memory is None else memory / 2**20
        except torch.OutOfMemoryError:
            print(f"{name:<13} {axis} = {sizes[axis]:>5}: out of memory", flush=True)
            break
        points.append((sizes[axis], 1e3 * last[-1], memory))
        print(f"{name:<13} {axis} = {sizes[axis]:>5}: {points[-1][1]:10.2f} ms {memory:9.1f} MiB", flush=True)
        if last[-1] > args.seconds:
            break
    return points


def draw(curves, args):
    """curves: {(name, axis): [(size, ms, MiB)]}."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 8), dpi=150, layout="constrained", facecolor="white")
    centre = ", ".join(f"{k} {v}" for k, v in CENTRE[args.device].items())
    where = device_name(torch.device(args.device))
    figure.suptitle(f"Selective scan, fp32, {where}, torch {torch.__version__}; around {centre}", fontsize=11)
    for panel, axis in zip(figure.subplots(2, 2).flat, NAMES, strict=True):
        right = panel.twinx()
        for (name, along), points in curves.items():
            if along == axis and points:
                sizes, ms, memory = zip(*points)
                panel.plot(sizes, ms, "o-", color=COLOURS[name], markersize=4)
                kept = [(s, m) for s, m in zip(sizes, memory) if m > 0]  # not 0 (below a page), not unknown
                right.plot(*zip(*kept), "s--", color=COLOURS[name], markersize=3, alpha=0.55) if kept else None
        ticks = [max(1, round(CENTRE[args.device][axis] * factor)) for factor in FACTORS[axis]]
        for side in (panel, right):
            side.set_xscale("log", base=2)
            side.set_yscale("log")
            side.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.yaxis.set_major_formatter("{x:g}")
            side.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set(xlabel=NAMES[axis], ylabel="forward + backward, ms")
        right.set_ylabel("memory above the inputs, MiB", color="#777777")
        panel.grid(color="#E3E3E3", linewidth=0.6)
    names = list(dict.fromkeys(name for name, _ in curves))
    lines = [Line2D([], [], color=COLOURS[name], marker="o", label=name) for name in names]
    lines += [Line2D([], [], color="#777777", label="time"), Line2D([], [], color="#777777", ls="--", label="memory")]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(png := io.BytesIO(), format="png")
    return png.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="few runs")
    parser.add_argument("--seconds", type=float, default=5.0, help="longest run (default 5)")
    args = parser.parse_args()
    names = [name for name in COLOURS if name != "triton" or args.device == "cuda"]
    curves = {(name, axis): measure(name, axis, args) for axis in NAMES for name in names}
    print(f"Saved to {write_atomic(args.file, draw(curves, args))}.")


if __name__ == "__main__":
    main()
