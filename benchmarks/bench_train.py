"""What a training step costs: by the way it is run, and what RSST's penalties add to it. Two tables, one run.

    python benchmarks/bench_train.py [--preset mamba_small] [--no-mlp] [--batch 512] [--steps 20]

1. Images a second of a whole step (forward, backward, clipping, AdamW): with the sequential scan of the reference, the
   pure torch scan, and on a GPU the Triton scan; eager, with compiled blocks, and recorded as a CUDA graph. On a GPU
   in bf16 autocast, on the CPU in fp32.
2. The same step with and without the penalty. Steps alternate, so that the machine's drift hits all alike; the penalty
   is measured apart too, since it can be smaller than the noise of a whole step.
"""

import argparse
import statistics
import time

import torch

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig, PruningConfig, find_groups, select_channels
from mamba_rsst.pruning.penalty import decay_, group_lasso
from mamba_rsst.training.compiling import compile_blocks_
from mamba_rsst.training.graphed_step import GraphedStep, capture


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--preset", default="mamba_small" if cuda else "mamba_tiny")
    parser.add_argument("--no-mlp", action="store_true", help="blocks without MLP, as Vim's")
    parser.add_argument("--batch", type=int, default=512 if cuda else 32)
    parser.add_argument("--steps", type=int, default=20 if cuda else 5)
    parser.add_argument("--no-reference", action="store_true", help="leave out the sequential scan, which is slow")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    dtype = "bf16 autocast" if device.type == "cuda" else "fp32"
    mlp = ", no MLP" if args.no_mlp else ""
    print(f"{args.preset}{mlp}, batch {args.batch}, {dtype}, {where}, torch {torch.__version__}\n")
    ways_of_running(args, device)
    print()
    cost_of_penalties(args, device)


def make_step(args, device, scan):
    """(model, forward_backward(inputs) -> loss, update(), inputs)."""
    torch.manual_seed(0)
    overrides = {"intermediate_size": 0} if args.no_mlp else {}
    config = MambaRsstVisionConfig.preset(args.preset, num_labels=10, scan_implementation=scan, **overrides)
    model = MambaForImageClassification(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    inputs = {
        "pixel_values": torch.randn(args.batch, 3, 32, 32, device=device),
        "labels": torch.randint(0, 10, (args.batch,), device=device),
    }

    def forward_backward(inputs, extra=None):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs).loss
        if extra is not None:
            loss = loss + extra()
        loss.backward()
        return loss.detach()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, forward_backward, update, inputs


def ways_of_running(args, device):
    ways = [] if args.no_reference else [("reference", "eager")]
    if device.type == "cuda":
        ways += [("torch", "eager"), ("triton", "eager"), ("triton", "compiled"), ("triton", "compiled + graph")]
    else:
        ways += [("torch", "eager")]
    print(f"{'scan':<10} {'step':<17} {'ms':>9} {'images/s':>10} {'x first':>8} {'peak MiB':>9} {'first steps s':>14}")
    first = None
    for scan, way in ways:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model, forward_backward, update, inputs = make_step(args, device, scan)
        if "compiled" in way:
            compile_blocks_(model)
        step = GraphedStep(forward_backward, list(model.parameters())) if "graph" in way else forward_backward
        start = time.perf_counter()
        warmup, steps = (1, 3) if scan == "reference" else (4, args.steps)
        for _ in range(warmup):
            step(inputs)
            update()
        synchronise(device)
        ready = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(steps):
            step(inputs)
            update()
        synchronise(device)
        seconds = (time.perf_counter() - start) / steps
        first = first or seconds
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}" if device.type == "cuda" else "n/a"
        print(
            f"{scan:<10} {way:<17} {1e3 * seconds:9.1f} {args.batch / seconds:10,.0f} {first / seconds:7.1f}x "
            f"{memory:>9} {ready:14.1f}",
            flush=True,
        )
        del model, forward_backward, update, step
        torch._dynamo.reset()


def cost_of_penalties(args, device):
    """On a GPU the steps are recorded, as are the penalties: what launching them costs would hide what they do."""
    model, forward_backward, update, inputs = make_step(args, device, "auto")
    pruning = PruningConfig(targets=["d_inner"] + ["intermediate_size"] * (not args.no_mlp), sparsity=0.7)
    masks = {name: mask.to(device) for name, mask in select_channels(model, pruning).items()}
    groups = find_groups(model, pruning.targets)
    gpu = device.type == "cuda"
    if gpu:
        compile_blocks_(model)
    amount = torch.full((), 1e-6, device=device)
    weight = torch.full((), 1e-6, device=device)

    def record(function):
        return GraphedStep(function, list(model.parameters())) if gpu else function

    def decay():
        decay_(groups, masks, amount)

    if gpu:
        decay = capture(decay)
    plain = record(forward_backward)
    with_lasso = record(lambda inputs: forward_backward(inputs, lambda: weight * group_lasso(groups, masks)))

    def lasso_alone():
        (weight * group_lasso(groups, masks)).backward()

    def step(penalty):
        (with_lasso if penalty == "group_lasso" else plain)(inputs)
        update()
        if penalty == "growing_l2":
            decay()

    def timed(function):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        return time.perf_counter() - start

    kinds = ("none", "growing_l2", "group_lasso")
    for _ in range(4 if gpu else 1):
        for kind in kinds:
            step(kind)
    times = {kind: [] for kind in kinds}
    for _ in range(args.steps):
        for kind in kinds:
            times[kind].append(timed(lambda kind=kind: step(kind)))
    model.zero_grad()
    alone = {"growing_l2": decay, "group_lasso": capture(lasso_alone) if gpu else lasso_alone}
    alone = {kind: statistics.median(timed(function) for _ in range(30)) for kind, function in alone.items()}
    base = statistics.median(times["none"])
    print(f"{'penalty':<12} {'step ms':>9} {'of none':>9} {'penalty alone ms':>17} {'of a step':>10}")
    for kind in kinds:
        middle, own = statistics.median(times[kind]), alone.get(kind, 0.0)
        print(f"{kind:<12} {1e3 * middle:9.1f} {middle / base:8.1%} {1e3 * own:17.2f} {own / base:9.2%}")


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
