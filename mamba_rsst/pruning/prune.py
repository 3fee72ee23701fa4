"""The two verbs: choose channels (`select_channels`), and choose and cut in one step (`prune_`)."""

from collections.abc import Iterable

from torch import nn

from .align import align_, singular_values
from .budget import Cost, Widths, allocate, mac_cost, most_removed, parameter_cost
from .config import PruningConfig
from .groups import Group, find_groups
from .importance import Calibration, Scores, score_channels
from .masks import Masks, kept_widths
from .shrink import config_widths, shrink_


def select_channels(
    model: nn.Module,
    config: PruningConfig,
    calibration: Iterable | None = None,
    dense: Widths | None = None,
    cost: Cost | None = None,
    scores: Scores | None = None,
) -> Masks:
    """Score the channels of `config.targets` and choose those to keep; the model stays as it is.

    calibration: batches (dicts of the model's arguments) for scores that look at data.
    dense: widths that the fractions refer to, group name -> width; default the current ones.
    cost: for budget="latency", masks -> milliseconds; see `mamba_rsst.latency.latency_cost`.
    scores: what `score_groups` gave, to choose by without scoring again.
    With dt_rank_method="svd" the masks of dt_rank are for the model after `align_(model, config)`.
    """
    scores = score_groups(model, config, calibration, dense) if scores is None else scores
    masks = allocate(model, find_groups(model, config.targets), scores, config, dense, cost)
    config_widths(model, find_groups(model), masks)  # a choice that could not be cut is an error here already
    return masks


def score_groups(
    model: nn.Module, config: PruningConfig, calibration: Iterable | None = None, dense: Widths | None = None
) -> Scores:
    """The scores of all channels of `config.targets`, each target by its importance: group name -> (size,) fp32."""
    groups = find_groups(model, config.targets)
    now = {g.name: g.size for g in groups}
    removals = {g.name: most_removed(g, config, dense or now) for g in groups}
    densities = {g.name: (1.0 - config.sparsity_of(g.target)) * (dense or now)[g.name] / g.size for g in groups}
    turned = [g for g in groups if g.target == "dt_rank" and config.dt_rank_method == "svd"]
    by_score: dict[str, list[Group]] = {}
    for group in groups:
        if group not in turned:
            by_score.setdefault(config.importance_of(group.target), []).append(group)
    if len(by_score) > 1 and calibration is not None:
        calibration = list(calibration)  # each score reads it from the beginning
    scores = {group.name: singular_values(group) for group in turned}
    for name, part in by_score.items():
        scores |= score_channels(part, name, Calibration(model, calibration, config.seed, removals, densities))
    return scores


def prune_(
    model: nn.Module,
    config: PruningConfig,
    calibration: Iterable | None = None,
    dry_run: bool = False,
    cost: Cost | None = None,
) -> "PruningTable":
    """Cut `model` in place to `config`'s budget. Returns the table of widths; `dry_run` leaves the model untouched.

    calibration, cost: as in `select_channels`.
    """
    masks = select_channels(model, config, calibration, cost=cost)
    table = PruningTable.of(model, find_groups(model, config.targets), masks)
    if not dry_run:
        align_(model, config)
        shrink_(model, masks)
    return table


class PruningTable(list):
    """Rows {"layer", "target", "before", "after"}; prints as a table, with `sparsity` and `param_reduction` apart.

    layer: None for a width of the whole model. macs_before, macs_after: of one image, or one token of text.
    """

    parameters_before = parameters_after = macs_before = macs_after = 0

    @classmethod
    def of(cls, model: nn.Module, groups: list[Group], masks: Masks) -> "PruningTable":
        kept = kept_widths(groups, masks)
        for blocks in (masks[g.name] for g in groups if g.blocks is not None and g.name in masks):
            kept |= {g.name: 0 for g in groups if g.layer is not None and not blocks[g.layer]}
        table = cls({"layer": g.layer, "target": g.target, "before": g.size, "after": kept[g.name]} for g in groups)
        for name, cost in (("parameters", parameter_cost(model, groups)), ("macs", mac_cost(model, groups))):
            setattr(table, f"{name}_before", int(cost({})))
            setattr(table, f"{name}_after", int(cost(masks)))
        return table

    @property
    def sparsity(self) -> dict[str, float]:
        """Fraction of channels removed, per target."""
        return {
            target: 1
            - sum(r["after"] for r in self if r["target"] == target)
            / sum(r["before"] for r in self if r["target"] == target)
            for target in dict.fromkeys(r["target"] for r in self)
        }

    @property
    def param_reduction(self) -> float:
        return 1 - self.parameters_after / self.parameters_before

    @property
    def mac_reduction(self) -> float:
        return 1 - self.macs_after / self.macs_before

    def __str__(self):
        lines = [f"{'layer':>5}  {'target':<18} {'before':>7} {'after':>7}"]
        for r in self:
            layer = "all" if r["layer"] is None else r["layer"]
            lines.append(f"{layer:>5}  {r['target']:<18} {r['before']:>7} {r['after']:>7}")
        lines += [f"channel sparsity {target}: {value:.1%}" for target, value in self.sparsity.items()]
        lines.append(
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} ({self.param_reduction:.1%} fewer)"
        )
        return "\n".join(lines)
