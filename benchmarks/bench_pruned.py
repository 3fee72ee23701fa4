"""Is the pruned model really faster? Dense against cut, measured side by side.

    python benchmarks/bench_pruned.py [--preset mamba_small] [--sparsity 0.7] [--batch 64 1] [--dtype bfloat16]

Random weights: the time does not depend on them. The two models take turns, so that the machine's drift hits both.
On CUDA the table is printed twice, as launched and as CUDA graphs. For saved models there is `mamba-rsst bench`.
"""

import argparse
import copy

import torch
from rich.console import Console

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig, PruningConfig, prune_
from mamba_rsst.evaluation import count_macs_per_item, count_parameters
from mamba_rsst.report import speed_table
from mamba_rsst.speed import benchmark, device_name, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mamba_small")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = MambaForImageClassification(MambaRsstVisionConfig.preset(args.preset, num_labels=10))
    cut = copy.deepcopy(dense)
    pruning = PruningConfig(targets=["d_inner", "intermediate_size"], sparsity=args.sparsity, round_to=args.round_to)
    prune_(cut, pruning)
    models = {"dense": dense, "cut": cut}
    image = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    macs = {name: f"{count_macs_per_item(model, image):,}" for name, model in models.items()}
    print(f"{args.preset}, {args.sparsity:.0%} of d_inner and of the MLP neurons cut; MACs an image: {macs}")
    results = {
        "models": [{"name": name, "path": name, "parameters": count_parameters(m)} for name, m in models.items()],
        "dtype": args.dtype + " autocast" * (args.dtype != "float32"),
        "compiled": args.compile,
        "seq_len": None,
        "rounds": args.rounds,
        "versions": versions(),
    }
    for graph in (False, True)[: 2 if args.device == "cuda" else 1]:
        rows = benchmark(
            models,
            device=args.device,
            batch_sizes=args.batch,
            rounds=args.rounds,
            autocast_dtype=None if args.dtype == "float32" else torch.bfloat16,
            compiled=args.compile and not graph,  # the second table finds them compiled
            graph=graph,
        )
        place = {"name": device_name(torch.device(args.device)), "graph": graph, "rows": rows}
        Console(width=120).print(speed_table(results, place))


if __name__ == "__main__":
    main()
