"""Padding: cutting backwards. Layers get channels that contribute nothing, so the model computes what it did."""

import torch
from torch import nn

from .groups import Group, View, find_groups
from .shrink import Homes, homes_of, replace_, rescale_, set_config_width


@torch.no_grad()
def pad_(model: nn.Module, widths: dict[str, int]) -> nn.Module:
    """Widen every layer to `widths` (target -> width) by zero channels. Returns the model, which computes the same.

    All slices of a new channel are zero: nothing is written to it, its state stays zero, nothing reads it. Its decay
    A_log = 0 and its step softplus(0) then act on zeros. Norms over the channels (FalconMamba's B, C and dt) would see
    a longer mean: the scales of the table make up for that without a remainder, because zeros add nothing to the sum
    of squares; in a dtype shorter than fp32 the scaled weights are rounded once more.
    Raises ValueError, before anything is touched, for a target that the model has not and for a width below a layer's.
    """
    groups = find_groups(model, tuple(widths))
    for group in groups:
        if group.layer is None:
            raise ValueError(f"{group.target!r} is one width for the whole model, which cannot be padded.")
        if group.size > widths[group.target]:
            raise ValueError(
                f"{group.name!r} has {group.size} channels: it cannot be padded to {widths[group.target]}."
            )
    homes = homes_of(model)
    for group in groups:
        if group.size < widths[group.target]:
            _pad_group_(group, widths[group.target], homes)
    for field, target in {group.config_field: group.target for group in groups}.items():
        set_config_width(model.config, field, widths[target])
    return model


def _pad_group_(group: Group, new: int, homes: Homes) -> None:
    old = group.size
    # Slices of one parameter along one axis (x and z rows of in_proj) grow in one step, since each moves the next.
    ends: dict[tuple[int, str, int], tuple[View, list[int]]] = {}
    for view in group.views():
        ends.setdefault((id(view.module), view.name, view.axis), (view, []))[1].append(view.start + old)
    for view, places in ends.values():
        pieces, start = [], 0
        # The only buffers are FalconMamba's: the ones that stand in for the weights of norms without weights.
        fill = 1 if view.name in view.module._buffers else 0
        for place in sorted(places):
            pieces.append(view.parameter.narrow(view.axis, start, place - start))
            shape = list(view.parameter.shape)
            shape[view.axis] = new - old
            pieces.append(view.parameter.new_full(shape, fill))
            start = place
        pieces.append(view.parameter.narrow(view.axis, start, view.parameter.shape[view.axis] - start))
        replace_(view, torch.cat(pieces, dim=view.axis), homes)
    group.set_size(new)
    rescale_(group, old, new)
