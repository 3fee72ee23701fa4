"""Is the pruned model really faster? Dense against cut, measured side by side.

    python benchmarks/bench_pruned.py [--preset mamba_small] [--sparsity 0.7] [--batch 64 1]

Random weights: the time does not depend on them. The two models take turns, so that the machine's drift hits both.
"""

import argparse
import copy

import torch

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig, PruningConfig, prune_
from mamba_rsst.evaluation import compare_throughput, count_macs_per_item, count_parameters, measure_peak_memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mamba_small")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = MambaForImageClassification(MambaRsstVisionConfig.preset(args.preset, num_labels=10)).to(args.device)
    cut = copy.deepcopy(dense)
    prune_(cut, PruningConfig(targets=["d_inner", "intermediate_size"], sparsity=args.sparsity))
    models = {"dense": dense, "cut": cut}
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.preset}, {args.sparsity:.0%} of d_inner and of the MLP neurons cut, fp32, {where}")
    columns = f"{'batch':>5} {'model':<6} {'parameters':>11} {'MACs/image':>13} {'images/s':>22} {'x dense':>8}"
    print(f"{columns} {'peak MiB':>9}")
    for batch in args.batch:
        inputs = {"pixel_values": torch.randn(batch, 3, 32, 32, device=args.device)}
        timings = compare_throughput(models, inputs, rounds=args.rounds)
        for name, model in models.items():
            timing, memory = timings[name], measure_peak_memory(model, inputs)
            spread = f"{timing.items_per_s:.1f} ({timing.low:.1f}–{timing.high:.1f})"
            print(
                f"{batch:>5} {name:<6} {count_parameters(model):>11,} {count_macs_per_item(model, inputs):>13,} "
                f"{spread:>22} {timing.items_per_s / timings['dense'].items_per_s:>7.2f}x "
                f"{'n/a' if memory is None else f'{memory / 2**20:.0f}':>9}"
            )


if __name__ == "__main__":
    main()
