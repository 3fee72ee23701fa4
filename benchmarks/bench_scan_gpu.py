"""The selective scan on one GPU: the Triton kernels against their peers, in one run.

    python benchmarks/bench_scan_gpu.py [--quick] [--dtype bfloat16]

Each row: milliseconds of the forward that saves for backward / of forward and backward together, and how many times
faster than `torch`, the chunked pure torch of this package. `reference` is the loop over time (slow: one run, short
sequences only). `mamba_ssm` is state-spaces/mamba's CUDA kernels, a call and two flips for a reversed direction; it is
listed as absent where it is not installed. All but the loop are timed as replays of a CUDA graph: launches are free.
"""

import argparse
import statistics

import torch

from mamba_rsst.models.selective_scan import selective_scan


SHAPES = {  # directions, batch, length, channels, states
    "CIFAR, E 384": (2, 512, 65, 384, 16),
    "CIFAR, E 768": (2, 512, 65, 768, 16),
    "Vim-S": (2, 128, 197, 768, 16),
    "language model": (1, 8, 2048, 1536, 16),
}
LONGEST_FOR_THE_LOOP = 256


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
    def scan(*inputs):
        reverse = (False, True)[: inputs[0].shape[0]]
        return selective_scan(*inputs, delta_softplus=True, reverse=reverse, implementation=implementation)

    return scan


def mamba_ssm_scan():
    """Its kernels behind our signature, or None."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def scan(u, delta, A, B, C, D, bias):
        ys = []
        for g in range(u.shape[0]):
            x, dt, b, c = ((v[g].flip(1) if g else v[g]).transpose(1, 2) for v in (u, delta, B, C))
            y = selective_scan_fn(x, dt, A[g], b, c, D[g], None, bias[g], True).transpose(1, 2)
            ys.append(y.flip(1) if g else y)
        return torch.stack(ys)

    return scan


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


def time_scan(scan, shape, dtype, graph=True):
    """(forward, forward and backward), in ms."""
    inputs, dy = make_inputs(shape, dtype)

    def forward():
        return scan(*inputs)

    def both():
        return torch.autograd.grad(scan(*inputs), inputs, dy)

    results = []
    for function in (forward, both):
        if not graph:
            results.append(milliseconds(function, 1))
            continue
        stream = torch.cuda.Stream()  # as graphs of autograd want it: warmed up on a stream of its own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        captured.replay()
        results.append(milliseconds(captured.replay, 30))
        del captured
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no loop over time")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    scans = {"torch": ours("torch"), "triton": ours("triton"), "mamba_ssm": mamba_ssm_scan()}
    if not arguments.quick:
        scans["reference"] = ours("reference")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}")
    for title, shape in SHAPES.items():
        print(f"\n{title}: directions, batch, length, channels, states = {shape}")
        base = None
        for name, scan in scans.items():
            if scan is None:
                print(f"  {name:10} absent")
                continue
            if name == "reference" and shape[2] > LONGEST_FOR_THE_LOOP:
                continue
            forward, both = time_scan(scan, shape, getattr(torch, arguments.dtype), graph=name != "reference")
            base = base or (forward, both)
            print(
                f"  {name:10} {forward:9.3f} / {both:9.3f} ms   {base[0] / forward:6.1f}x / {base[1] / both:6.1f}x",
                flush=True,
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
