"""Budgets: one threshold, turned until what is left fits. Also what a cut model costs, from shapes alone."""

import math
from collections.abc import Callable

import torch

from .config import PruningConfig
from .groups import Group, positions_of, works
from .importance import Scores
from .masks import Masks, kept_widths


Widths = dict[str, int]
"""Group name -> width."""


class BudgetError(ValueError):
    """No allowed set of widths meets the budget; the message says which comes nearest."""


Cost = Callable[[Masks], float]
"""What the model costs once it is cut by these masks: parameters, multiply-accumulates, milliseconds."""


def count_parameters(model: torch.nn.Module, groups: list[Group], widths: Widths) -> int:
    """Parameters of `model` once its groups have these widths; tied parameters count once.

    Of blocks the last ones are taken to leave: `parameter_cost` counts those that masks name.
    """
    return parameter_cost(model, groups)({name: torch.arange(width) >= 0 for name, width in widths.items()})


def parameter_cost(model: torch.nn.Module, groups: list[Group]) -> Cost:
    """Parameters after a cut; tied parameters count once."""
    parameters = {id(p): tuple(p.shape) for p in model.parameters()}
    return _counter(groups, [(key, 1.0, 0.0) for key in parameters], parameters)


def mac_cost(model: torch.nn.Module, groups: list[Group], positions: dict[str, int] | None = None) -> Cost:
    """Multiply-accumulates of one forward of one item after a cut: an image, or one token of text.

    positions: how many of each kind an item has, such as {"token": 256}; default the model's own. Counted are matrix
    products, convolutions and the scan, as this package's classes compute them: evaluation.count_macs finds the same.
    """
    positions = positions_of(model) if positions is None else positions
    shapes, terms = {}, []
    for work, parameter in works(model):
        shapes[id(parameter)] = tuple(parameter.shape)
        times = positions[work.position]
        terms.append((id(parameter), work.each * times, work.row * times))
    return _counter(groups, terms, shapes)


def _counter(groups, terms, shapes) -> Cost:
    """The sum over (parameter, each, row) of each * elements + row * entries of axis 0, in the shapes after a cut."""
    cuts = [(id(v.parameter), v.axis, g) for g in groups if g.blocks is None for v in g.views()]
    inside = {
        g.name: [{id(p) for p in block.parameters()} for block in g.blocks] for g in groups if g.blocks is not None
    }

    def cost(masks: Masks) -> float:
        kept = kept_widths(groups, masks)
        after = {key: list(shape) for key, shape in shapes.items()}
        for key, axis, group in cuts:
            if key in after:
                after[key][axis] -= group.size - kept[group.name]
        for name, blocks in inside.items():
            stays = masks[name].tolist() if name in masks else []
            stays += [name not in masks] * (len(blocks) - len(stays))
            for block, stay in zip(blocks, stays):
                for key in () if stay else block:
                    after.pop(key, None)
        present = [(after[key], each, row) for key, each, row in terms if key in after]
        return sum(each * math.prod(shape) + row * shape[0] for shape, each, row in present)

    return cost


def allocate(
    model: torch.nn.Module,
    groups: list[Group],
    scores: Scores,
    config: PruningConfig,
    dense: Widths | None = None,
    cost: Cost | None = None,
) -> Masks:
    """The channels to keep.

    dense: the widths that `sparsity` and `floor` are fractions of; default the current ones. Give the original widths
    when pruning in rounds. cost: what `budget="latency"` is about, see `Cost`.
    Raises BudgetError where floor and round_to leave no way to meet the budget.
    """
    dense = dense or {g.name: g.size for g in groups}
    for group in groups:
        if step_of(group, config) > group.size:
            raise ValueError(
                f"`round_to` is {config.round_to} but {group.name!r} has only {group.size} channels; "
                f"choose at most {group.size}."
            )
    if config.budget == "channels":
        keep: Masks = {}
        for target in config.targets:
            part = [g for g in groups if g.target == target]
            sparsity = config.sparsity_of(target)
            what = f"{sparsity:.1%} of the {target} channels"
            count = lambda masks: sum(int(mask.sum()) for mask in masks.values())  # noqa: E731
            keep |= _solve(part, scores, config, dense, count, sparsity, what)
        return {g.name: keep[g.name] for g in groups}
    if config.budget == "latency":
        if cost is None:
            raise ValueError('budget="latency" needs `cost`, as `mamba_rsst.latency.latency_cost` measures it.')
    else:
        cost = {"parameters": parameter_cost, "macs": mac_cost}[config.budget](model, groups)
    if any(g.blocks is not None and dense[g.name] != g.size for g in groups):
        raise ValueError(
            f'Rounds that remove blocks need budget="channels": what the model cost in {config.budget} before blocks '
            "left cannot be counted any more."
        )
    what = f"{config.sparsity:.1%} of the {config.budget}"
    return _solve(groups, scores, config, dense, cost, config.sparsity, what)


def top_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` best; ties go to the lower index, so the choice is the same everywhere."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return mask


def _solve(groups, scores, config, dense, cost, sparsity, what) -> Masks:
    """The masks under the lowest threshold whose cost is allowed."""
    counts_at, low, high = (_counts_by_weight if config.allocation == "weights" else _counts_by_score)(
        groups, scores, config
    )
    # Each channel's place from the best on, so that a mask of the best is one comparison.
    places = {g.name: torch.empty(g.size, dtype=torch.long) for g in groups}
    for g in groups:
        places[g.name][torch.sort(scores[g.name], descending=True, stable=True).indices] = torch.arange(g.size)
    total = cost({g.name: torch.ones(dense[g.name], dtype=torch.bool) for g in groups})
    allowed = (1.0 - sparsity) * total

    def masks_at(threshold: float) -> Masks:
        widths = [
            snap(count, g.size, dense[g.name], config, step_of(g, config))
            for g, count in zip(groups, counts_at(threshold))
        ]
        return {g.name: places[g.name] < width for g, width in zip(groups, widths)}

    # A hair of slack: 0.3 * 640 is 191.99999999999997.
    fits = lambda masks: cost(masks) <= allowed * (1 + 1e-9)  # noqa: E731
    if fits(masks := masks_at(low)):
        return masks
    best = masks_at(high)
    if not fits(best):
        limits = {"floor": config.floor, "round_to": config.round_to}
        if config.allocation == "weights":
            limits["fillback_rate"] = config.fillback_rate
        limits = " and ".join(f"{name}={value}" for name, value in limits.items())
        raise BudgetError(f"Cannot remove {what}: with {limits} at most {1 - cost(best) / total:.1%} can go.")
    for _ in range(64):
        middle = (low + high) / 2
        masks = masks_at(middle)
        if fits(masks):
            high, best = middle, masks
        else:
            low = middle
    return best


def step_of(group: Group, config: PruningConfig) -> int:
    """What the group's kept widths are multiples of; blocks are counted one by one."""
    return config.round_to if group.blocks is None else 1


def snap(count: float, size: int, dense: int, config: PruningConfig, step: int | None = None) -> int:
    """The allowed width nearest to `count`: a multiple of `step` (round_to), at least the floor; or all of `size`."""
    if count >= size:
        return size
    step = config.round_to if step is None else step
    least = max(step, step * math.ceil(config.floor * dense / step - 1e-9))
    return min(size, max(least, step * round(count / step)))


def most_removed(group: Group, config: PruningConfig, dense: Widths) -> int:
    """The most channels that the group can lose: all above the floor, or exactly its share where that is fixed."""
    least = max(1, math.ceil(config.floor * dense[group.name] - 1e-9))
    if config.budget == "channels" and (group.layer is None or config.scope == "layer"):
        least = max(least, math.floor((1.0 - config.sparsity_of(group.target)) * dense[group.name] + 1e-9))
    return max(0, group.size - least)


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
