"""The selective scan on one GPU: the Triton kernels against their peers, in one run.

    python benchmarks/bench_scan_gpu.py [--quick] [--dtype bfloat16]

Each row: milliseconds of the forward that saves for backward, and of the backward: both together less the forward.
Then how many times faster than `mamba_ssm`, or than `torch` where that is absent.

- `mamba_ssm`: state-spaces/mamba's CUDA kernels as a back end of ours. They want channels first and time forwards, so
  its times hold the copies into that layout, and a flip each way for a reversed direction.
- `its kernels`: the same without any of that: inputs that lie channels first already, every direction forwards.
- `torch`: the chunked pure torch of this package. `triton`: its kernels. `reference`: the loop over time (slow: one
  run, short sequences only).

All but the loop are timed as replays of a CUDA graph: launches are free.
"""

import argparse
import math
import statistics

import torch

from mamba_rsst.models.selective_scan import selective_scan
from mamba_rsst.training.graphed_step import capture


SHAPES = {  # directions, batch, length, channels, states
    "CIFAR, E 384": (2, 512, 65, 384, 16),
    "CIFAR, E 768": (2, 512, 65, 768, 16),
    "Vim-S": (2, 128, 197, 768, 16),
    "language model": (1, 8, 2048, 1536, 16),
}
LONGEST_FOR_THE_LOOP = 256
EXPONENTIALS_PER_SECOND = 3.8e12  # measured on an H200: one a state and step is the least that a forward takes


def make_inputs(shape, dtype):
    G, B, L, E, N = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device="cuda")

    inputs = [
        normal(G, B, L, E).to(dtype),
        (0.5 * normal(G, B, L, E)).to(dtype),
        -torch.arange(1.0, N + 1, device="cuda").expand(G, E, N).contiguous(),
        normal(G, B, L, N).to(dtype),
        normal(G, B, L, N).to(dtype),
        1 + 0.1 * normal(G, E),
        normal(G, E) - 4,
    ]
    return [x.requires_grad_() for x in inputs], normal(G, B, L, E).to(dtype)


def ours(implementation):
    """Prepares a scan of ours: (run, leaves, gradients of the outputs)."""

    def prepare(inputs, dy):
        reverse = (False, True)[: dy.shape[0]]
        options = dict(delta_softplus=True, reverse=reverse, implementation=implementation)
        return lambda: [selective_scan(*inputs, **options)], inputs, [dy]

    return prepare


def kernels_alone(inputs, dy):
    """mamba_ssm's own call for each direction; as `ours`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def first(x):
        return (x.transpose(1, 2) if x.dim() == 3 else x).contiguous()

    directions = [[first(x[g].detach()).requires_grad_() for x in inputs] for g in range(dy.shape[0])]

    def run():
        return [selective_scan_fn(u, dt, A, B, C, D, None, bias, True) for u, dt, A, B, C, D, bias in directions]

    return run, sum(directions, []), [first(x) for x in dy]


def why_absent(prepare):
    """None, or why that scan does not run here: by trying it on next to nothing."""
    try:
        run, *_ = prepare(*make_inputs((1, 1, 1, 1, 1), torch.float32))
        run()
    except (ImportError, OSError, ValueError) as error:
        return str(error)
    return None


def milliseconds(run, repeats):
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_scan(prepare, shape, dtype, graph=True):
    """(forward without gradients, forward that saves for a backward, backward), in ms."""
    run, leaves, gradients = prepare(*make_inputs(shape, dtype))

    def both():
        return torch.autograd.grad(run(), leaves, gradients)

    def inference():
        with torch.no_grad():
            return run()

    results = []
    for function in (inference, run, both):
        if not graph:
            results.append(milliseconds(function, 1))
            continue
        replay = capture(function, warmup=2)
        replay()
        results.append(milliseconds(replay, 30))
        del replay
    inference, forward, both = results
    return inference, forward, both - forward


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no loop over time")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    # The base comes first: the rows after it are compared with it.
    scans = {"mamba_ssm": ours("mamba_ssm"), "its kernels": kernels_alone}
    absent = {name: reason for name, prepare in scans.items() if (reason := why_absent(prepare))}
    scans |= {name: ours(name) for name in ("torch", "triton", "reference")}
    base = "torch" if "mamba_ssm" in absent else "mamba_ssm"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}")
    for title, shape in SHAPES.items():
        print(f"\n{title}: directions, batch, length, channels, states = {shape}")
        floor = 1e3 * math.prod(shape) / EXPONENTIALS_PER_SECOND
        print(f"  {'ms':11} {'inference':>9} {'forward':>9} {'backward':>9}   times faster than {base}")
        print(f"  {'exponentials':12} {floor:8.3f}   (the floor of a forward on an H200)")
        times = {}
        for name, prepare in scans.items():
            if name in absent:
                print(f"  {name:11} absent: {absent[name]}")
                continue
            if name == "reference" and (arguments.quick or shape[2] > LONGEST_FOR_THE_LOOP):
                continue
            times[name] = time_scan(prepare, shape, dtype, graph=name != "reference")
            ratios = [f"{b / own:.2f}x" for b, own in zip(times.get(base, ()), times[name])]
            print("  {:11} {:9.3f} {:9.3f} {:9.3f}   {}".format(name, *times[name], " / ".join(ratios)), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
