"""Turning the basis of a width before it is cut, so that its channels are singular directions."""

import torch
from torch import Tensor, nn

from .config import PruningConfig
from .groups import Group, View, find_groups


@torch.no_grad()
def align_(model: nn.Module, config: PruningConfig) -> nn.Module:
    """With dt_rank_method="svd", make dt_rank's channels the singular directions of dt_proj x_proj, largest first.

    The model computes the same: U sqrt(S) and sqrt(S) V^T take the places of two factors with the product U S V^T, and
    are of equal size, as weight decay and penalties like them. Cutting the last channels then leaves the best
    approximation of that rank (Eckart & Young 1936). With "select" nothing is done. Returns the model.
    Raises ValueError where a norm stands between the two factors (FalconMamba).
    """
    if config.dt_rank_method == "svd":
        for group in find_groups(model, ["dt_rank"]):
            for producer, consumer in _pairs(group):
                left, values, right = _factors(producer, consumer)
                consumer.tensor.copy_(left * values.sqrt())
                producer.tensor.copy_(values.sqrt()[:, None] * right)
    return model


@torch.no_grad()
def singular_values(group: Group) -> Tensor:
    """The group's scores once it is aligned: its singular values, largest first, summed over directions; (size,)."""
    return sum(_factors(producer, consumer)[1] for producer, consumer in _pairs(group)).float().cpu()


def _pairs(group: Group) -> list[tuple[View, View]]:
    pairs = list(group.pairs())
    if not pairs:
        raise ValueError(
            f'dt_rank_method="svd" does not go with {group.layout.name}: a norm stands between x_proj and dt_proj, so '
            'their product is not all that matters; use dt_rank_method="select".'
        )
    return pairs


def _factors(producer: View, consumer: View) -> tuple[Tensor, Tensor, Tensor]:
    """U (E, R), S (R,), V^T (R, E) of consumer (E, R) @ producer (R, E), in fp64, never forming the E x E product."""
    left, left_triangle = torch.linalg.qr(consumer.tensor.double())
    right, right_triangle = torch.linalg.qr(producer.tensor.double().T)
    u, values, vt = torch.linalg.svd(left_triangle @ right_triangle.T)
    return left @ u, values, vt @ right.T
