"""The selective scan on this machine's CPU: each back end against the sequential scans, in one run.

    python benchmarks/bench_scan.py [--quick] [--threads N]

`transformers` is transformers' own sequential scan, which materialises (B, L, E, N) and then loops, as mamba_ssm's
selective_scan_ref does; `reference` is this package's loop, which does not. `mambapy` is mamba.py's parallel scan.
Ratios are against `transformers`. Times are the best of several runs, alternating between the back ends so that the
machine's drift hits all alike. Peak memory is that of a process of its own for each back end and shape, above what the
inputs take.
"""

import argparse
import subprocess
import sys
import time

import torch


# directions, batch, length, channels, states
SHAPES = [
    (1, 4, 197, 768, 16),
    (1, 32, 65, 384, 16),
    (2, 32, 65, 384, 16),
    (1, 1, 1024, 1536, 16),
    (2, 1, 65, 384, 16),
]
IMPLEMENTATIONS = ("transformers", "reference", "torch", "mambapy")
BASE = IMPLEMENTATIONS[0]


def make_inputs(G, B, L, E, N, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [
        normal(G, B, L, E),
        0.5 * normal(G, B, L, E),
        -torch.arange(1.0, N + 1).expand(G, E, N).contiguous(),
        normal(G, B, L, N),
        normal(G, B, L, N),
        torch.ones(G, E),
        torch.full((G, E), -4.0),
    ]
    return [x.to(device).requires_grad_() for x in inputs]


def runner(implementation, shape, device="cpu"):
    """A function that runs one forward, or forward and backward."""
    from mamba_rsst.models.selective_scan import selective_scan

    inputs = make_inputs(*shape, device)
    reverse = (False, True)[: shape[0]]
    if implementation == "mambapy":
        from mambapy.pscan import pscan

        def forward():
            outputs = []
            u, delta, A, B, C, D, bias = inputs
            for g, backwards in enumerate(reverse):
                flip = (lambda x: x.flip(1)) if backwards else (lambda x: x)
                x, dt, b, c = flip(u[g]), flip(delta[g]), flip(B[g]), flip(C[g])
                dt = torch.nn.functional.softplus(dt + bias[g])
                decay = torch.exp(dt.unsqueeze(-1) * A[g])
                states = pscan(decay, (dt * x).unsqueeze(-1) * b.unsqueeze(2))
                outputs.append(flip((states @ c.unsqueeze(-1)).squeeze(-1) + D[g] * x))
            return torch.stack(outputs)
    elif implementation == "transformers":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        def forward():
            outputs = []
            u, delta, A, B, C, D, bias = inputs
            for g, backwards in enumerate(reverse):
                flip = (lambda x: x.flip(1)) if backwards else (lambda x: x)
                x, dt, b, c = (flip(v[g]).transpose(1, 2) for v in (u, delta, B, C))
                y = mamba_selective_scan(x, dt, A[g], b, c, D[g], delta_bias=bias[g], delta_softplus=True)
                outputs.append(flip(y.transpose(1, 2)))
            return torch.stack(outputs)
    else:

        def forward():
            return selective_scan(*inputs, True, reverse=reverse, implementation=implementation)

    def run(backward):
        if backward:
            torch.autograd.grad(forward().sum(), inputs)
        else:
            with torch.no_grad():
                forward()

    return run


def seconds(run, backward):
    start = time.perf_counter()
    run(backward)
    return time.perf_counter() - start


MEASURE = """
import re, sys
sys.path.insert(0, "benchmarks")
import torch
import bench_scan
def peak():  # VmHWM rather than getrusage: the latter is inherited from the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads({threads})
bench_scan.runner({name!r}, (1, 1, 2, 4, 2))({backward})  # libraries allocate their own things once
run = bench_scan.runner({name!r}, {shape})
before = peak()
run({backward})
print((peak() - before) / 1024)
"""


def peak_memory(implementation, shape, backward):
    """MiB that one run takes above its inputs, in a process of its own (Linux)."""
    code = MEASURE.format(threads=torch.get_num_threads(), name=implementation, backward=backward, shape=shape)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        import mambapy.pscan  # noqa: F401

        names, absent = list(IMPLEMENTATIONS), []
    except ImportError:
        names, absent = list(IMPLEMENTATIONS[:3]), ["mambapy (pip install mambapy)"]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}, fp32")
    print(f"{'G B L E N':<18} {'pass':<8} {'back end':<12} {'ms':>9} {'x base':>8} {'MiB':>8} {'of base':>8}")
    for shape in [(1, 32, 65, 384, 16)] if args.quick else SHAPES:
        for backward in (False, True):
            runs = {name: runner(name, shape) for name in names}
            # The materialising loop's backward is quadratic in L: at length 1024 one run takes more than a minute.
            slow = {n for n in names if n == "transformers" and backward and shape[2] > 500}
            best = {name: float("inf") for name in names if name not in slow}
            for name in best:
                runs[name](backward)
            for _ in range(2 if args.quick else 5):
                for name in best:
                    best[name] = min(best[name], seconds(runs[name], backward))
            memory = {name: peak_memory(name, shape, backward) for name in best}
            for name, value in best.items():
                speed = f"{best[BASE] / value:7.1f}x" if BASE in best else f"{'–':>8}"
                share = f"{memory[name] / memory[BASE]:7.1%}" if BASE in memory else f"{'–':>8}"
                label = f"{' '.join(map(str, shape)):<18} {'fwd+bwd' if backward else 'fwd':<8} {name:<12}"
                print(f"{label} {1e3 * value:9.1f} {speed} {memory[name]:8.0f} {share}", flush=True)
    for name in absent:
        print(f"absent: {name}")


if __name__ == "__main__":
    main()
