"""The two verbs: choose channels (`select_channels`), and choose and cut in one step (`prune_`)."""

from collections.abc import Iterable

from torch import nn

from .budget import Widths, allocate, count_parameters
from .config import PruningConfig
from .groups import Group, find_groups
from .importance import Calibration, score_channels
from .masks import Masks, kept_widths
from .shrink import config_widths, shrink_


def select_channels(
    model: nn.Module, config: PruningConfig, calibration: Iterable | None = None, dense: Widths | None = None
) -> Masks:
    """Score the channels of `config.targets` and choose those to keep; the model stays as it is.

    calibration: batches (dicts of the model's arguments) for scores that look at data.
    dense: widths that the fractions refer to, group name -> width; default the current ones.
    """
    groups = find_groups(model, config.targets)
    scores = score_channels(groups, config.importance, Calibration(model, calibration, config.seed))
    masks = allocate(model, groups, scores, config, dense)
    config_widths(model, groups, masks)  # a choice that could not be cut is an error here already
    return masks


def prune_(
    model: nn.Module, config: PruningConfig, calibration: Iterable | None = None, dry_run: bool = False
) -> "PruningTable":
    """Cut `model` in place to `config`'s budget. Returns the table of widths; `dry_run` leaves the model untouched."""
    masks = select_channels(model, config, calibration)
    groups = find_groups(model, config.targets)
    table = PruningTable.of(model, groups, masks)
    if not dry_run:
        shrink_(model, masks)
    return table


class PruningTable(list):
    """Rows {"layer", "target", "before", "after"}; prints as a table, with `sparsity` and `param_reduction` apart."""

    parameters_before = parameters_after = 0

    @classmethod
    def of(cls, model: nn.Module, groups: list[Group], masks: Masks) -> "PruningTable":
        kept = kept_widths(groups, masks)
        table = cls({"layer": g.layer, "target": g.target, "before": g.size, "after": kept[g.name]} for g in groups)
        table.parameters_before = count_parameters(model, groups, {g.name: g.size for g in groups})
        table.parameters_after = count_parameters(model, groups, kept)
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

    def __str__(self):
        lines = [f"{'layer':>5}  {'target':<18} {'before':>7} {'after':>7}"]
        lines += [f"{r['layer']:>5}  {r['target']:<18} {r['before']:>7} {r['after']:>7}" for r in self]
        lines += [f"channel sparsity {target}: {value:.1%}" for target, value in self.sparsity.items()]
        lines.append(
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} ({self.param_reduction:.1%} fewer)"
        )
        return "\n".join(lines)
