"""Masks: one bool per channel, True = keep. Zeroing by mask shows what a cut will do, without cutting."""

import torch

from .groups import Group


Masks = dict[str, torch.Tensor]
"""Group name -> bool (size,). A group without an entry is kept whole."""


def check_masks(groups: list[Group], masks: Masks) -> None:
    """Raises ValueError for a mask of an unknown group, of another size, or that keeps nothing."""
    by_name = {group.name: group for group in groups}
    for name, mask in masks.items():
        if name not in by_name:
            raise ValueError(
                f"There is a mask for {name!r}, which is none of the model's groups: {list(by_name)[:4]} …."
            )
        size = by_name[name].size
        if mask.dtype != torch.bool or tuple(mask.shape) != (size,):
            raise ValueError(f"The mask of {name!r} must be bool ({size},), got {mask.dtype} {tuple(mask.shape)}.")
        if not mask.any():
            raise ValueError(f"The mask of {name!r} keeps no channel; at least one must stay.")


@torch.no_grad()
def apply_masks_(groups: list[Group], masks: Masks) -> None:
    """Zero the producer and consumer slices of the channels that are masked out; same function as the cut model."""
    check_masks(groups, masks)
    for group in groups:
        if group.name in masks:
            for view in group.scored_views():
                view.tensor.mul_(view.along(masks[group.name]))


def kept_widths(groups: list[Group], masks: Masks) -> dict[str, int]:
    """Group name -> width after a cut by these masks."""
    return {g.name: int(masks[g.name].sum()) if g.name in masks else g.size for g in groups}
