"""Which widths a device likes: what `round_to` buys, measured on one mixer and one MLP.

    python benchmarks/bench_widths.py [--device cuda] [--targets d_inner] [--samples 2] [--no-compile] [--all]

Times the forward, and forward and backward, at widths sampled from each class: the widths whose largest divisor among
1, 2, 4, ... 64 is that number. fp32 and eager on the CPU; on CUDA bf16 autocast, compiled and replayed as CUDA graphs,
so that launches do not hide the rest. The widths take turns, best of many runs.

Wider takes longer whatever the divisor. So each window of widths gets a straight line, time over width, by least
squares; a class's number is the mean of its widths' times over that line, divided by the best class's. 1.10 says: a
channel of such a width costs 10% more than a channel of the best one.
"""

import argparse
import time

import torch

from mamba_rsst import MambaMixer, MambaRsstVisionConfig
from mamba_rsst.models.modeling_mamba_rsst_vision import MambaMLP
from mamba_rsst.speed import capture, device_name


MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
WINDOWS = {  # target: (first width, last width) of each window
    "d_inner": [(96, 128), (192, 256), (352, 416)],
    "intermediate_size": [(96, 128), (192, 256), (352, 416)],
    "d_state": [(8, 32)],
}
HIDDEN, TOKENS = 192, 65
BATCH = {"cpu": 16, "cuda": 512}
RUN_SECONDS = 0.03


def class_of(width):
    return max(m for m in MULTIPLES if width % m == 0)


def sample(low, high, count):
    """Up to `count` widths of each class, spread over low..high, in order."""
    chosen = []
    for multiple in MULTIPLES:
        widths = [w for w in range(low, high + 1) if class_of(w) == multiple]
        picks = min(count, len(widths))
        chosen += [widths[round((i + 0.5) * len(widths) / picks - 0.5)] for i in range(picks)]
    return sorted(set(chosen))


def make_module(target, width):
    """A mixer or an MLP of this width, the other widths fixed."""
    sizes = {"d_inner": 256, "d_state": 16, "intermediate_size": 0, target: width}
    config = MambaRsstVisionConfig(hidden_size=HIDDEN, num_hidden_layers=1, **sizes)
    return MambaMLP(config, 0) if target == "intermediate_size" else MambaMixer(config, 0)


def make_runs(target, width, args, pool):
    """(forward, forward and backward) as functions of nothing."""
    module = make_module(target, width).to(args.device)
    gpu = args.device == "cuda"
    run = torch.compile(module, dynamic=False) if gpu and args.compile else module
    x = torch.randn(args.batch, TOKENS, HIDDEN, device=args.device, requires_grad=True)
    dy = torch.randn_like(x).to(torch.bfloat16 if gpu else torch.float32)
    wanted = [x, *module.parameters()]

    def forward():
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=gpu):
            run(x)

    def both():
        with torch.autocast(args.device, torch.bfloat16, enabled=gpu):
            y = run(x)
        torch.autograd.grad(y, wanted, dy)

    # One pool: the graphs are replayed in the order of their capture and nobody reads what they leave.
    return [capture(function, pool=pool) if gpu else function for function in (forward, both)]


def seconds(run, repeats, device):
    run()  # untimed: the width before left the caches and the allocator as it needed them
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def line(points):
    """The straight line through (width, time) by least squares, as a function of the width."""
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    slope = sum((x - sx / n) * y for x, y in points) / sum((x - sx / n) ** 2 for x, _ in points)
    return lambda x: sy / n + slope * (x - sx / n)


def excess(best, window):
    """{multiple: mean time over the line} of the widths of one window."""
    points = [(w, t) for w, t in best.items() if window[0] <= w <= window[1]]
    trend = line(points)
    by_class = {m: [t / trend(w) for w, t in points if class_of(w) == m] for m in MULTIPLES}
    return {m: sum(values) / len(values) for m, values in by_class.items() if values}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--targets", nargs="+", default=list(WINDOWS), choices=list(WINDOWS))
    parser.add_argument("--samples", type=int, help="widths of each class and window (default 3; 2 when compiling)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, help="images of 65 tokens (default 16; 512 on CUDA)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA")
    parser.add_argument("--all", action="store_true", help="print every width too")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.batch = args.batch or BATCH[args.device]
    args.samples = args.samples or (2 if gpu and args.compile else 3)
    for name in ("recompile_limit", "accumulated_recompile_limit"):  # every width is a new shape of the same code
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 10_000)
    how = ("bf16 autocast, CUDA graphs" + ", compiled" * args.compile) if gpu else "fp32"
    print(f"{device_name(torch.device(args.device))}, torch {torch.__version__}, {how}, batch {args.batch}")
    for target in args.targets:
        windows = WINDOWS[target]
        widths = sorted({w for window in windows for w in sample(*window, args.samples)})
        pool = torch.cuda.graph_pool_handle() if gpu else None
        runs = {width: make_runs(target, width, args, pool) for width in widths}
        for index, what in enumerate(("forward", "forward + backward")):
            repeats, best = {}, {}
            for width, pair in runs.items():
                best[width] = seconds(pair[index], 1, args.device)
                repeats[width] = max(1, round(RUN_SECONDS / best[width]))
            for _ in range(args.rounds):
                for width, pair in runs.items():
                    best[width] = min(best[width], seconds(pair[index], repeats[width], args.device))
            columns = [excess(best, window) for window in windows]
            means = {m: [c[m] for c in columns if m in c] for m in MULTIPLES}
            means = {m: sum(values) / len(values) for m, values in means.items() if values}
            print(f"\n{target}, {what}: time of a channel relative to the best class, by the width's largest divisor")
            print(f"{'divisor':>8} {'widths':>7}" + "".join(f"{f'{a}..{b}':>10}" for a, b in windows) + f"{'mean':>8}")
            for m, mean in means.items():
                cells = "".join(f"{c[m] / min(c.values()):>10.3f}" if m in c else f"{'–':>10}" for c in columns)
                count = sum(class_of(w) == m for w in widths)
                print(f"{m:>8} {count:>7}{cells}{mean / min(means.values()):>8.3f}", flush=True)
            if args.all:
                print(" ".join(f"{w}:{1e3 * t:.3f}" for w, t in best.items()), "ms")


if __name__ == "__main__":
    main()
