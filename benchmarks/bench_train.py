"""What RSST costs a training step: the same optimizer step with and without the penalty, in one run.

    python benchmarks/bench_train.py [--preset mamba_tiny] [--batch 32] [--steps 8]

Steps with and without the penalty alternate, so that the machine's drift hits both alike; medians are compared. The
penalty's own time is measured apart too, since it can be smaller than the noise of a whole step.
"""

import argparse
import statistics
import time

import torch

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig, PruningConfig, find_groups, select_channels
from mamba_rsst.pruning.penalty import decay_, group_lasso


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mamba_tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = MambaForImageClassification(MambaRsstVisionConfig.preset(args.preset, num_labels=10)).to(device).train()
    pruning = PruningConfig(targets=["d_inner", "intermediate_size"], sparsity=0.7)
    masks, groups = select_channels(model, pruning), find_groups(model, pruning.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(args.batch, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (args.batch,), device=device)

    def synchronise():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed(function):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        return time.perf_counter() - start

    def step(penalty):
        optimizer.zero_grad()
        loss = model(pixel_values=images, labels=labels).loss
        if penalty == "group_lasso":
            loss = loss + 1e-6 * group_lasso(groups, masks)
        loss.backward()
        optimizer.step()
        if penalty == "growing_l2":
            decay_(groups, masks, 1e-6)

    kinds = ("none", "growing_l2", "group_lasso")
    for kind in kinds:
        step(kind)
    times = {kind: [] for kind in kinds}
    for _ in range(args.steps):
        for kind in kinds:
            times[kind].append(timed(lambda kind=kind: step(kind)))
    alone = {
        "growing_l2": [timed(lambda: decay_(groups, masks, 1e-6)) for _ in range(30)],
        "group_lasso": [timed(lambda: group_lasso(groups, masks).backward()) for _ in range(30)],
    }
    base = statistics.median(times["none"])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.preset}, batch {args.batch}, fp32, {where}, medians of {args.steps} alternating steps")
    print(f"{'penalty':<12} {'step ms':>9} {'of none':>9} {'penalty alone ms':>17} {'of a step':>10}")
    for kind in kinds:
        middle = statistics.median(times[kind])
        own = statistics.median(alone[kind]) if kind in alone else 0.0
        print(f"{kind:<12} {1e3 * middle:9.1f} {middle / base:8.1%} {1e3 * own:17.2f} {own / base:9.2%}")


if __name__ == "__main__":
    main()
