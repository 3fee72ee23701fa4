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
    for group in groups:
        if group.name in masks and not masks[group.name].all():
            _cut_group_(group, masks[group.name])
    for name, value in widths.items():
        set_config_width(model.config, name, value)
    return model


def _cut_group_(group: Group, mask: torch.Tensor) -> None:
    old, new = group.size, int(mask.sum())
    # Slices of one parameter along one axis (x and z rows of in_proj) are cut in one step, since a cut moves the rest.
    cuts: dict[tuple[int, str, int], tuple[View, torch.Tensor]] = {}
    for view in group.views():
        parameter = view.parameter
        keep = cuts.setdefault(
            (id(view.module), view.name, view.axis),
            (view, torch.ones(parameter.shape[view.axis], dtype=torch.bool, device=parameter.device)),
        )[1]
        keep[view.start : view.start + view.size] = mask.to(parameter.device)
    for view, keep in cuts.values():
        replace_(view.module, view.name, view.parameter.index_select(view.axis, keep.nonzero()[:, 0]))
    setattr(group.owner, group.layout.widths[group.target][0], new)
    rescale_(group, old, new)


def rescale_(group: Group, old: int, new: int) -> None:
    """Make up for norms whose means run over `new` channels of the group instead of `old`; see `Scale`."""
    for scale in group.scales():
        module, _, name = scale.parameter.rpartition(".")
        whole = getattr(group.owner.get_submodule(module), name)
        own = [view.tensor for view in group.scored_views() if view.parameter is whole]
        for tensor in own if scale.own else [whole]:
            tensor.mul_((old / new) ** scale.power)


def replace_(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` in the parameter's or buffer's place, with its flags; the module learns its new size."""
    old = getattr(module, name)
    if name in module._parameters:
        new = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        module._parameters[name] = new
    else:
        module._buffers[name] = tensor.contiguous()
    for kind, sizes in _SIZE_ATTRIBUTES.items():
        if isinstance(module, kind) and name == "weight":
            module.__dict__.update(sizes(module.weight.shape))


# What torch's modules remember of their weight's shape.
_SIZE_ATTRIBUTES = {
    nn.Linear: lambda shape: {"out_features": shape[0], "in_features": shape[1]},
    nn.Conv1d: lambda shape: {"in_channels": shape[0], "out_channels": shape[0], "groups": shape[0]},  # depthwise
}


def config_widths(model, groups, masks) -> dict[str, int | list[int]]:
    """Config field -> its value after a cut. Raises ValueError for widths that the config cannot hold."""
    kept = kept_widths(groups, masks)
    fields: dict[str, dict[int, int]] = {}
    for group in groups:
        fields.setdefault(group.config_field, {})[group.layer] = kept[group.name]
    out = {}
    for name, by_layer in fields.items():
        if hasattr(model.config, "set_widths"):
            before = model.config.widths(name)
            out[name] = [by_layer.get(layer, width) for layer, width in enumerate(before)]
        elif len(set(by_layer.values())) == 1:
            out[name] = next(iter(by_layer.values()))
        else:
            raise ValueError(
                f"{type(model).__name__} holds one `{name}` for all layers, but the masks keep "
                f"{min(by_layer.values())} to {max(by_layer.values())}; prune it with scope='layer'."
            )
    return out


def set_config_width(config, name, value):
    if hasattr(config, "set_widths"):
        config.set_widths(name, value)
    else:
        setattr(config, name, value)
