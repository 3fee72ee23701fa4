"""Inference of a whole image classifier: each scan back end, eager, compiled and as a CUDA graph, in one run.

    python benchmarks/bench_infer.py [--preset mamba_small] [--batch 1 64 512] [--skip reference] [--no-compile]

The same random weights in every row; `reference` is the sequential loop over time, which needs nothing beyond torch.
Rows take turns. Ratios are against the first row at the same batch. On CUDA in bf16 autocast, on the CPU in fp32.
`compiled`: torch.compile of each block; `graph`: the compiled forward replayed as a CUDA graph.
"""

import argparse
import copy

import torch

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig
from mamba_rsst.speed import compare_throughput, device_name
from mamba_rsst.training.compiling import compile_blocks_


def with_scan(model, scan, compiled):
    """A copy that runs this back end."""
    model = copy.deepcopy(model)
    for layer in model.backbone.layers:
        layer.mixer.scan_implementation = scan
    if compiled:
        compile_blocks_(model)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mamba_small")
    parser.add_argument("--batch", type=int, nargs="+", help="default 1 64 512; on the CPU 1 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--skip", nargs="+", default=[], choices=("reference", "torch", "triton"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    gpu = args.device == "cuda"
    scans = [s for s in ("reference", "torch", "triton")[: 3 if gpu else 2] if s not in args.skip]
    # Compiling the loop would unroll all its steps.
    rows = [(scan, how) for scan in scans for how in ("eager", "compiled") if how == "eager" or scan != "reference"]
    rows = [(scan, how) for scan, how in rows if args.compile or how == "eager"]
    torch.manual_seed(0)
    base = MambaForImageClassification(MambaRsstVisionConfig.preset(args.preset, num_labels=10)).to(args.device)
    models = {f"{scan}, {how}": with_scan(base, scan, how == "compiled") for scan, how in rows}
    dtype = torch.bfloat16 if gpu else None
    batches = args.batch or ([1, 64, 512] if gpu else [1, 64])
    size = (base.config.num_channels, base.config.image_size, base.config.image_size)

    cells = {}  # (row, batch): Timing
    for batch in batches:
        inputs = {"pixel_values": torch.randn(batch, *size, device=args.device)}
        for name, timing in compare_throughput(models, inputs, rounds=args.rounds, autocast_dtype=dtype).items():
            cells[name, batch] = timing
        if gpu:  # of the fastest way to run each scan; the loop's thousands of launches are what a graph hides best
            last = {name.split(",")[0]: name for name in models}
            graphs = {f"{name}, graph": models[name] for name in last.values()}
            timings = compare_throughput(graphs, inputs, rounds=args.rounds, autocast_dtype=dtype, graph=True)
            cells |= {(name, batch): timing for name, timing in timings.items()}
            torch.cuda.empty_cache()

    where = device_name(torch.device(args.device))
    print(f"{args.preset}, {'bf16 autocast' if gpu else 'fp32'}, {where}, torch {torch.__version__}, images/s")
    print(f"{'scan':<26}" + "".join(f"{f'batch {batch}':>22}" for batch in batches))
    names = sorted({name for name, _ in cells}, key=lambda name: (scans.index(name.split(",")[0]), len(name)))
    for name in names:
        line = ""
        for batch in batches:
            rate = cells[name, batch].items_per_s
            line += f"{rate:>13,.1f} {rate / cells[names[0], batch].items_per_s:>7.2f}x"
        print(f"{name:<26}{line}")


if __name__ == "__main__":
    main()
