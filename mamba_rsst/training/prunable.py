"""What would fail at the first cut, hours later, fails before the first step."""

import dataclasses
import inspect

import torch
from transformers import Trainer

from ..errors import one_line
from ..pruning import PruningConfig, find_groups, select_channels
from ..pruning.config import BUDGETS
from ..pruning.weight_masks import check_weight_pruning
from .arguments import UNPRUNED, RSSTConfig
from .leaving import Leaving
from .rounds import plan_stages


def check_run(model, args: RSSTConfig, pruning: PruningConfig | None, samples=None) -> None:
    """Raises ValueError for a run that would fail later: before, or hours into, its training.

    model: what the run starts from; None where that is not known. samples: the training set.
    """
    if args.method not in UNPRUNED:
        if pruning is None:
            raise ValueError(f"method={args.method!r} needs `pruning`, a PruningConfig.")
        if model is not None:
            check_prunable(model, args, pruning)
            check_taught(model, args)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(samples, "__len__") and len(samples) < batch:
        raise ValueError(f"`dataloader_drop_last` leaves nothing of {len(samples)} samples in batches of {batch}.")
    if args.cuda_graphs and (args.device.type != "cuda" or args.world_size * args.n_gpu > 1):
        here = f"{args.world_size * max(1, args.n_gpu)} x {args.device.type}"
        raise ValueError(f"`cuda_graphs` needs one process on one CUDA GPU; this run has {here}.")
    _check_optimizer(args, model)
    stages, leaving = plan_stages(args), Leaving(args)
    if hasattr(samples, "__len__"):
        leaving.check(stages, len(samples))


def _check_optimizer(args: RSSTConfig, model) -> None:
    """Trainer makes it when the first stage begins, which is after the run's folder was taken."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not options.keys() & {"params", "model", "optimizer_dict"}:  # those are bound to the model's own weights
            kind([torch.zeros(1, requires_grad=True, device=args.device)], **options)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        optim = getattr(args.optim, "value", args.optim)
        raise ValueError(f"`optim` {optim!r} cannot be made: {one_line(error)}") from error


def removed_by(round_rate: float, num_rounds: int) -> float:
    """The sparsity that rounds come to which each remove the same fraction of what is left."""
    return 1.0 - (1.0 - round_rate) ** num_rounds


def check_agreement(method: str, pruning: PruningConfig, round_rate: float | None = None, num_rounds: int = 1) -> None:
    """Raises ValueError where the training's settings and those of the pruning contradict each other on any model."""
    if pruning.budget == "latency" and method not in ("dense", "unstructured"):
        others = [name for name in BUDGETS if name != "latency"]
        raise ValueError(
            f"A run cannot follow budget='latency', measured for one cut (mamba-rsst prune): choose from {others}."
        )
    if method in UNPRUNED:
        return
    if round_rate is not None:
        removed = removed_by(round_rate, num_rounds)
        if isinstance(pruning.sparsity, dict) or abs(pruning.sparsity - removed) > 1e-3:
            raise ValueError(
                f"`round_rate` {round_rate} removes {removed:.4f} in {num_rounds} rounds, but the pruning "
                f"config's `sparsity` is {pruning.sparsity}: give it that number."
            )
    if method == "unstructured":
        check_weight_pruning(pruning)


def check_taught(model, args: RSSTConfig) -> None:
    """Raises ValueError for a model that cannot be compared with a teacher."""
    if not args.is_taught:
        return
    if not getattr(model.config, "return_dict", True):
        raise ValueError("A model with `return_dict=False` in its config cannot be taught: its outputs have no names.")
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "output_hidden_states" or p.kind is p.VAR_KEYWORD for p in parameters)
    if args.distillation_hidden_weight > 0 and not takes:
        raise ValueError(f"`distillation_hidden_weight`: {type(model).__name__} gives no hidden states.")


def check_prunable(model, args: RSSTConfig, pruning: PruningConfig) -> None:
    """What would fail at the first cut, hours later, fails now: a target that is not there, a budget out of reach."""
    check_agreement(args.method, pruning, args.round_rate, args.num_rounds)
    if args.method == "unstructured":
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
