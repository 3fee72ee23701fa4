"""Cutting: parameters, module attributes and config become really smaller."""

import torch
from torch import nn

from .groups import Group, View, find_groups
from .masks import Masks, check_masks, kept_widths


@torch.no_grad()
def shrink_(model: nn.Module, masks: Masks) -> nn.Module:
    """Cut the channels that are masked out; `masks` as `select_channels` returns them. Returns the model.

    dtype, device, requires_grad and any flag set on a parameter stay; gradients are dropped, and an optimizer built
    before holds the old parameters: build a new one. The model's config gets the new widths.
    Raises ValueError, before anything is touched, for masks that do not fit and for layers of different widths where
    the config can hold only one (transformers' own Mamba classes).
    """
    groups = find_groups(model)
    check_masks(groups, masks)
    widths = config_widths(model, groups, masks)
    homes = homes_of(model)
    for group in groups:
        if group.name in masks and not masks[group.name].all():
            if group.blocks is None:
                _cut_group_(group, masks[group.name], homes)
            else:
                _cut_blocks_(group, masks[group.name])
    for name, value in sorted(widths.items(), key=lambda item: isinstance(item[1], list)):
        set_config_width(model.config, name, value)  # lists last: their length is the number of layers
    return model


Homes = dict[int, list[tuple[nn.Module, str]]]
"""id(parameter) -> all places that hold it: a tied parameter is cut once and put back everywhere."""


def _cut_group_(group: Group, mask: torch.Tensor, homes: Homes) -> None:
    old, new = group.size, int(mask.sum())
    # Slices of one parameter along one axis (x and z rows of in_proj) are cut in one step, since a cut moves the rest.
    cuts: dict[tuple[int, int], tuple[View, torch.Tensor]] = {}
    for view in group.views():
        parameter = view.parameter
        keep = cuts.setdefault(
            (id(parameter), view.axis),
            (view, torch.ones(parameter.shape[view.axis], dtype=torch.bool, device=parameter.device)),
        )[1]
        keep[view.start : view.start + view.size] = mask.to(parameter.device)
    for view, keep in cuts.values():
        replace_(view, view.parameter.index_select(view.axis, keep.nonzero()[:, 0]), homes)
    group.set_size(new)
    rescale_(group, old, new)


def rescale_(group: Group, old: int, new: int) -> None:
    """Make up for norms whose means run over `new` channels of the group instead of `old`; see `Scale`."""
    for scale, holder, name in group.scales():
        value, factor = getattr(holder, name), (old / new) ** scale.power
        if not isinstance(value, torch.Tensor):
            setattr(holder, name, value * factor)
            continue
        own = [view.tensor for view in group.scored_views() if view.parameter is value]
        for tensor in own if scale.own else [value]:
            tensor.mul_(factor)


def _cut_blocks_(group: Group, mask: torch.Tensor) -> None:
    kept = [block for block, keep in zip(group.blocks, mask) if keep]
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    group.set_blocks(nn.ModuleList(kept))
    group.set_size(len(kept))


def homes_of(model: nn.Module) -> Homes:
    """Where every tensor of the model lives: a tied one in several places."""
    homes: Homes = {}
    for module in model.modules():
        for name, parameter in (*module._parameters.items(), *module._buffers.items()):
            homes.setdefault(id(parameter), []).append((module, name))
    return homes


def replace_(view: View, tensor: torch.Tensor, homes: Homes) -> None:
    """Put `tensor` in the place of the view's parameter or buffer, wherever it is held, with its flags; the modules
    learn its size."""
    old = view.parameter
    new = tensor.contiguous()
    if view.name in view.module._parameters:
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
    homes[id(new)] = homes.pop(id(old))
    for module, name in homes[id(new)]:
        (module._parameters if name in module._parameters else module._buffers)[name] = new
        for kind, sizes in _SIZE_ATTRIBUTES.items():
            if isinstance(module, kind) and name == "weight":
                module.__dict__.update(sizes(new.shape))


# What torch's modules remember of their weight's shape.
_SIZE_ATTRIBUTES = {
    nn.Linear: lambda shape: {"out_features": shape[0], "in_features": shape[1]},
    nn.Conv1d: lambda shape: {"in_channels": shape[0], "out_channels": shape[0], "groups": shape[0]},  # depthwise
    nn.Conv2d: lambda shape: {"out_channels": shape[0]},  # patches
    nn.Embedding: lambda shape: {"num_embeddings": shape[0], "embedding_dim": shape[1]},
    nn.RMSNorm: lambda shape: {"normalized_shape": tuple(shape)},
}


def config_widths(model, groups, masks) -> dict[str, int | list[int]]:
    """Config field -> its value after a cut. Raises ValueError for widths that the config cannot hold."""
    kept = kept_widths(groups, masks)
    out = {g.config_field: kept[g.name] for g in groups if g.layer is None}
    blocks = next((masks[g.name] for g in groups if g.blocks is not None and g.name in masks), None)
    fields: dict[str, dict[int, int]] = {}
    for group in groups:
        if group.layer is not None:
            by_layer = fields.setdefault(group.config_field, {})
            if blocks is None or blocks[group.layer]:
                by_layer[group.layer] = kept[group.name]
    for name, by_layer in fields.items():
        if hasattr(model.config, "set_widths"):
            before = model.config.widths(name)
            after = [by_layer.get(layer, width) for layer, width in enumerate(before)]
            out[name] = after if blocks is None else [width for width, keep in zip(after, blocks) if keep]
        elif len(set(by_layer.values())) == 1:
            out[name] = next(iter(by_layer.values()))
        else:
            raise ValueError(
                f"{type(model).__name__} holds one `{name}` for all layers, but the masks keep "
                f"{min(by_layer.values())} to {max(by_layer.values())}; prune it with scope='layer'."
            )
    return out


def set_config_width(config, name, value):
    if isinstance(value, list):
        config.set_widths(name, value)
    else:
        setattr(config, name, value)
