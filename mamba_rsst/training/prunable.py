"""What would fail at the first cut, hours later, fails before the first step."""

import dataclasses

import torch

from ..pruning import PruningConfig, find_groups, select_channels
from ..pruning.weight_masks import check_weight_pruning
from .arguments import RSSTConfig


def check_prunable(model, args: RSSTConfig, pruning: PruningConfig) -> None:
    """What would fail at the first cut, hours later, fails now: a target that is not there, a budget out of reach."""
    if args.round_rate is not None:
        removed = 1.0 - (1.0 - args.round_rate) ** args.num_rounds
        if isinstance(pruning.sparsity, dict) or abs(pruning.sparsity - removed) > 1e-3:
            raise ValueError(
                f"`round_rate` {args.round_rate} removes {removed:.4f} in {args.num_rounds} rounds, but the pruning "
                f"config's `sparsity` is {pruning.sparsity}: give it that number."
            )
    if args.method == "unstructured":
        check_weight_pruning(pruning)
        find_groups(model, pruning.targets)
        return
    one_width = not hasattr(model.config, "set_widths")
    if one_width and (pruning.scope == "global" or pruning.allocation == "weights"):
        raise ValueError(f"{type(model).__name__} holds one width for all layers; prune it with scope='layer'.")
    select_channels(model, dataclasses.replace(pruning, importance="magnitude_l2"))
    scored = [v.parameter for g in find_groups(model, pruning.targets) for v in g.scored_views()]
    if (args.method == "rsst" and args.penalty == "growing_l2") or args.spread_epochs > 0:
        for parameter in scored:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"growing_l2 on {parameter.dtype} weights would round its small steps away; load the model with "
                    "dtype=torch.float32 (and train with bf16=True for bf16 arithmetic)."
                )
