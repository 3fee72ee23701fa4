"""Budgets: one threshold, turned until what is left fits. Also what a set of widths costs."""

import math
from collections.abc import Callable

import torch

from .config import PruningConfig
from .groups import Group
from .importance import Scores
from .masks import Masks


Widths = dict[str, int]
"""Group name -> width."""


class BudgetError(ValueError):
    """No allowed set of widths meets the budget; the message says which comes nearest."""


def count_parameters(model: torch.nn.Module, groups: list[Group], widths: Widths) -> int:
    """Parameters of `model` once its groups have these widths; tied parameters count once."""
    shapes = {id(p): list(p.shape) for p in model.parameters()}
    for group in groups:
        for view in group.views():
            if id(view.parameter) in shapes:
                shapes[id(view.parameter)][view.axis] -= view.size - widths[group.name]
    return sum(map(math.prod, shapes.values()))


def allocate(
    model: torch.nn.Module,
    groups: list[Group],
    scores: Scores,
    config: PruningConfig,
    dense: Widths | None = None,
) -> Masks:
    """The channels to keep.

    dense: the widths that `sparsity` and `floor` are fractions of; default the current ones. Give the original widths
    when pruning in rounds. Raises BudgetError where floor and round_to leave no way to meet the budget.
    """
    dense = dense or {g.name: g.size for g in groups}
    for group in groups:
        if config.round_to > group.size:
            raise ValueError(
                f"`round_to` is {config.round_to} but {group.name!r} has only {group.size} channels; "
                f"choose at most {group.size}."
            )
    keep: Widths = {}
    if config.budget == "channels":
        for target in config.targets:
            part = [g for g in groups if g.target == target]
            total = sum(dense[g.name] for g in part)
            allowed = (1.0 - config.sparsity_of(target)) * total
            what = f"{config.sparsity_of(target):.1%} of the {target} channels"
            keep.update(_solve(part, scores, config, dense, lambda w: sum(w.values()), allowed, total, what))
    else:
        total = count_parameters(model, groups, dense)
        allowed = (1.0 - config.sparsity) * total
        what = f"{config.sparsity:.1%} of the parameters"
        keep = _solve(
            groups, scores, config, dense, lambda w: count_parameters(model, groups, w), allowed, total, what
        )
    return {g.name: top_channels(scores[g.name], keep[g.name]) for g in groups}


def top_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` best; ties go to the lower index, so the choice is the same everywhere."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return mask


def _solve(groups, scores, config, dense, cost, allowed, total, what) -> Widths:
    """The widths under the lowest threshold whose cost is allowed."""
    counts_at, low, high = (_counts_by_weight if config.allocation == "weights" else _counts_by_score)(
        groups, scores, config
    )

    def widths_at(threshold: float) -> Widths:
        return {g.name: snap(count, g.size, dense[g.name], config) for g, count in zip(groups, counts_at(threshold))}

    # A hair of slack: 0.3 * 640 is 191.99999999999997.
    fits = lambda widths: cost(widths) <= allowed * (1 + 1e-9)  # noqa: E731
    if fits(widths := widths_at(low)):
        return widths
    best = widths_at(high)
    if not fits(best):
        limits = {"floor": config.floor, "round_to": config.round_to}
        if config.allocation == "weights":
            limits["fillback_rate"] = config.fillback_rate
        limits = " and ".join(f"{name}={value}" for name, value in limits.items())
        raise BudgetError(f"Cannot remove {what}: with {limits} at most {1 - cost(best) / total:.1%} can go.")
    for _ in range(64):
        middle = (low + high) / 2
        widths = widths_at(middle)
        if fits(widths):
            high, best = middle, widths
        else:
            low = middle
    return best


def snap(count: float, size: int, dense: int, config: PruningConfig) -> int:
    """The allowed width nearest to `count`: a multiple of round_to, at least the floor; or all of `size`."""
    if count >= size:
        return size
    step = config.round_to
    least = max(step, step * math.ceil(config.floor * dense / step - 1e-9))
    return min(size, max(least, step * round(count / step)))


def _counts_by_score(groups, scores, config) -> tuple[Callable[[float], list[int]], float, float]:
    """Channels whose place in the common order is at or above a threshold.

    scope="global": the order of all normalised scores. Equal scores are ordered by their share of worse channels in
    the layer: each step of the threshold is one channel, and layers share a tie. scope="layer": that share alone.
    """
    shares = [(torch.arange(group.size, dtype=torch.float64) + 0.5) / group.size for group in groups]
    if config.scope == "layer":
        ordered = shares
    else:
        values = []
        for group in groups:
            v = scores[group.name].double()
            scale = {"mean": v.mean(), "max": v.max(), "none": torch.tensor(1.0)}[config.normalization]
            values.append((v / scale if scale > 0 else v).sort().values)
        order = torch.cat(shares).sort(stable=True).indices
        order = order[torch.cat(values)[order].sort(stable=True).indices]
        places = torch.empty(len(order), dtype=torch.float64)
        places[order] = torch.arange(len(order), dtype=torch.float64)
        ordered = places.split([group.size for group in groups])

    def counts_at(threshold):
        return [len(v) - int(torch.searchsorted(v, threshold, right=False)) for v in ordered]

    return counts_at, 0.0, max(float(v[-1]) for v in ordered) + 1.0


def _counts_by_weight(groups, scores, config) -> tuple[Callable[[float], list[float]], float, float]:
    """Refill's counts: n times the density of the unstructured mask |w| >= threshold over the group's weights, plus
    fillback_rate times what is missing (Chen et al. 2022, arXiv:2202.04736, sec. 3.2)."""
    magnitudes = [torch.cat([v.tensor.detach().abs().float().flatten() for v in g.scored_views()]) for g in groups]

    def counts_at(threshold):
        densities = [float((m >= threshold).float().mean(dtype=torch.float64)) for m in magnitudes]
        kept = [g.size * density for g, density in zip(groups, densities)]
        return [k + config.fillback_rate * (g.size - k) for g, k in zip(groups, kept)]

    high = max(float(m.max()) for m in magnitudes)
    return counts_at, 0.0, high * (1 + 1e-6) + 1e-12
