"""The causal convolution with its SiLU on one GPU: the fused kernels against plain torch, in one run.

    python benchmarks/bench_conv_gpu.py

Milliseconds of the forward, and of forward and backward, bf16 with fp32 taps. `floor`: the bytes that must be read and
written at the speed at which an H200 copies. `causal_conv1d` is Dao-AILab's CUDA package: channels first, a call and
two flips for a reversed direction; listed as absent where it is not installed.
"""

import math

import torch

from mamba_rsst.models import causal_conv1d
from mamba_rsst.training.graphed_step import capture


SHAPES = {  # directions, batch, length, channels
    "CIFAR, E 384": (2, 512, 65, 384),
    "Vim-S": (2, 128, 197, 768),
    "language model": (1, 8, 2048, 1536),
}
BYTES_PER_SECOND = 4.2e12


def plain(x, taps, bias, reverse):
    ys = [causal_conv1d._convolve(x, taps[g], bias[g], backwards) for g, backwards in enumerate(reverse)]
    return torch.stack([torch.nn.functional.silu(y) for y in ys])


def peer():
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None

    def run(x, taps, bias, reverse):
        ys = []
        for g, backwards in enumerate(reverse):
            line = (x.flip(1) if backwards else x).transpose(1, 2)
            y = causal_conv1d_fn(line, taps[g].t().to(x.dtype), bias[g].to(x.dtype), activation="silu").transpose(1, 2)
            ys.append(y.flip(1) if backwards else y)
        return torch.stack(ys)

    return run


def milliseconds(function, repeats=50):
    """Of a CUDA graph's replay: launches are free."""
    replay = capture(function)
    replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def time_way(way, shape):
    """(forward, forward and backward), in ms."""
    G, B, L, E = shape
    wide = torch.randn(B, L, 2 * E, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # as in_proj makes it
    taps = torch.randn(G, 4, E, device="cuda", requires_grad=True)
    bias = torch.randn(G, E, device="cuda", requires_grad=True)
    du = torch.randn(G, B, L, E, device="cuda", dtype=torch.bfloat16)

    def forward():
        return way(wide[..., :E], taps, bias, (False, True)[:G])

    def both():
        torch.autograd.grad(forward(), [wide, taps, bias], du)

    return milliseconds(torch.no_grad()(forward)), milliseconds(both)


def main():
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16\n")
    ways = {"plain": plain, "plain, compiled": torch.compile(plain, dynamic=False)}
    ways |= {"fused": causal_conv1d.causal_conv1d_silu, "causal_conv1d": peer()}
    for title, shape in SHAPES.items():
        G, *sizes = shape
        unit = 1e3 * 2 * math.prod(sizes) / BYTES_PER_SECOND  # one pass over one direction
        print(f"{title}: {shape}; floor {unit * (1 + G):.3f} / {unit * (3 + 2 * G):.3f}")
        base = None
        for name, way in ways.items():
            if way is None:
                print(f"  {name:16} absent")
                continue
            times = time_way(way, shape)
            base = base or times
            ratios = [f"{b / own:.1f}x" for b, own in zip(base, times)]
            print(f"  {name:16} {times[0]:7.3f} / {times[1]:7.3f}   {' / '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
