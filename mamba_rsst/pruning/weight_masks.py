"""Unstructured masks: one bool per weight, True = keep, over the same slices that the channels' scores look at.

A model whose masked weights are zero IS the sparse model: it saves and loads as it stands, and its masks can be read
off again. Training needs them beside it, to put the zeros back after every step. No width changes and nothing becomes
faster: the method is there to be compared with.
"""

import dataclasses
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import PruningConfig
from .groups import Group, find_groups


WeightMasks = dict[str, Tensor]
"""Parameter name -> bool of its shape, on the CPU. What no producer or consumer slice covers is kept."""

WEIGHT_SCORES = (None, "magnitude_l1", "random")


@torch.no_grad()
def choose_weights(model: nn.Module, config: PruningConfig) -> WeightMasks:
    """Masks of the largest weights: exactly `sparsity` of each target's weights goes. The model stays as it is.

    Global L1 pruning: one order of |w| over all layers; with scope="layer" one in each group; importance="random"
    draws the order. Ties go to the earlier weight. A weight of two targets stays only if both keep it, so that of
    targets that overlap (x_proj's rows of d_state or dt_rank, its columns of d_inner) a little more goes. The config's
    floor, round_to, allocation and normalization are about channels, and say nothing here.
    Raises ValueError for what only channels can follow: another importance or budget, and whole blocks.
    """
    check_weight_pruning(config)
    parameters = dict(model.named_parameters())
    masks: WeightMasks = {}
    generator = torch.Generator().manual_seed(config.seed)
    for target in config.targets:
        groups = find_groups(model, [target])
        for part in [groups] if config.scope == "global" else [[group] for group in groups]:
            covered = covered_weights(model, part)
            scores = torch.cat([parameters[name].detach().cpu()[inside].abs() for name, inside in covered.items()])
            if not torch.isfinite(scores).all():
                raise ValueError(f"Not all weights of {target!r} are finite: has the model diverged?")
            if config.importance_of(target) == "random":
                scores = torch.rand(len(scores), generator=generator)
            count = len(scores) - round(config.sparsity_of(target) * len(scores))
            kept = torch.zeros(len(scores), dtype=torch.bool)
            kept[scores.argsort(descending=True, stable=True)[:count]] = True
            for (name, inside), chosen in zip(covered.items(), kept.split([int(c.sum()) for c in covered.values()])):
                mask = masks.setdefault(name, torch.ones_like(inside))
                mask[inside] &= chosen
    return masks


def check_weight_pruning(config: PruningConfig) -> None:
    """Raises ValueError for settings that only channels can follow."""
    names = config.importance.values() if isinstance(config.importance, dict) else [config.importance]
    for name in names:
        if name not in WEIGHT_SCORES:
            raise ValueError(f"Single weights are scored by one of {list(WEIGHT_SCORES[1:])}, not by {name!r}.")
    if "num_hidden_layers" in config.targets:
        raise ValueError("Single weights are masked inside blocks: leave num_hidden_layers out of `targets`.")
    defaults = {f.name: f.default for f in dataclasses.fields(PruningConfig)}
    changed = [name for name in ("floor", "allocation", "normalization") if getattr(config, name) != defaults[name]]
    if changed:
        warnings.warn(f"Masks of single weights know no channels: {changed} is ignored.", stacklevel=2)
    if config.budget != "channels":
        raise ValueError(f"Masks remove a fraction of the weights; budget={config.budget!r} is for channels.")


@torch.no_grad()
def covered_weights(model: nn.Module, groups: Iterable[Group]) -> WeightMasks:
    """Parameter name -> bool: the weights in a producer or consumer slice of the groups. A tied one comes once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    covered: WeightMasks = {}
    for group in groups:
        for view in group.scored_views():
            inside = covered.setdefault(names[id(view.parameter)], torch.zeros(view.parameter.shape, dtype=torch.bool))
            view.of(inside).fill_(True)
    return covered


@torch.no_grad()
def apply_weight_masks_(model: nn.Module, masks: WeightMasks) -> nn.Module:
    """Zero the weights that are masked out. Returns the model. Raises ValueError for masks that do not fit it."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"There is a mask for {name!r}, which is no parameter of {type(model).__name__}.")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            shape = tuple(parameters[name].shape)
            raise ValueError(f"The mask of {name!r} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}.")
    if masks:
        weights = [parameters[name] for name in masks]
        factors = [mask.to(w.device, w.dtype, non_blocking=True) for w, mask in zip(weights, masks.values())]
        torch._foreach_mul_(weights, factors)
    return model


@torch.no_grad()
def extract_weight_masks(model: nn.Module, targets) -> WeightMasks:
    """The masks of a sparse model, read off its zeros: how a saved one goes on training sparsely."""
    parameters = dict(model.named_parameters())
    covered = covered_weights(model, find_groups(model, targets))
    return {name: ~inside | (parameters[name].detach().cpu() != 0) for name, inside in covered.items()}


@torch.no_grad()
def weight_sparsity(model: nn.Module, targets) -> float:
    """Fraction of zeros among the weights that the targets' masks can reach."""
    parameters = dict(model.named_parameters())
    covered = covered_weights(model, find_groups(model, targets))
    zeros = sum(int((parameters[name].detach().cpu()[inside] == 0).sum()) for name, inside in covered.items())
    return zeros / sum(int(inside.sum()) for inside in covered.values())


def check_weight_sparsity(model: nn.Module, masks: WeightMasks) -> None:
    """Raises ValueError if a weight that is masked out is not zero: something trained it, or it was never masked."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        alive = int((parameters[name].detach().cpu()[~mask] != 0).sum())
        if alive:
            raise ValueError(f"{alive:,} weights of {name!r} are masked out, but not zero.")
