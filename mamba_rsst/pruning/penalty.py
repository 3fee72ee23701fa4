"""Penalties that empty the leaving channels while the rest of the network learns to do without them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .groups import Group
from .masks import Masks
from .shards import sum_over_shards


PENALTIES = ("growing_l2", "group_lasso")
PENALTY_SCOPES = ("leaving", "all")
MAX_DECAY = 0.99
"""Largest fraction of a weight that one step of decay may take: w * (1 - lr lambda) must not change sign."""


def check_amount(amount: float) -> None:
    """Raises ValueError for an lr * lambda outside [0, 1)."""
    if not 0.0 <= amount < 1.0:
        raise ValueError(f"lr * lambda must be in [0, 1), got {amount}; lower lambda_max.")


@torch.no_grad()
def decay_(groups: Iterable[Group], masks: Masks, amount: float | Tensor) -> None:
    """Decoupled decay, w <- w (1 - amount), of the leaving channels' producer and consumer slices.

    amount: lr * lambda, in [0, 1); a tensor () on the weights' device is taken as it is, without asking for its value,
    so that a CUDA graph can hold this. Outside the gradient on purpose: there Adam would divide it by its own size.
    Of parameters that FSDP has sharded each process decays its own rows; none waits for another.
    Growing L2 regularisation (Wang et al. 2021, arXiv:2012.09243) in AdamW's decoupled form (arXiv:1711.05101).
    Raises ValueError for an amount outside [0, 1).
    """
    if not isinstance(amount, Tensor):
        check_amount(amount)
    slices, factors = [], []
    for group in groups:
        if group.name in masks:
            factor = None
            for view in group.scored_views():
                if factor is None:
                    keep = masks[group.name].to(view.parameter.device)
                    factor = 1.0 - amount * (~keep).to(torch.float32)
                held, along = view.held(factor)
                slices.append(held)
                factors.append(along.to(held.dtype))
    if slices:
        torch._foreach_mul_(slices, factors)


def group_lasso(groups: Iterable[Group], masks: Masks, scope: str = "leaving") -> Tensor:
    """Sum over channels of ||w_g||_2 (Wen et al. 2016, arXiv:1608.03665), differentiable, fp32 scalar.

    w_g: the channel's producer and consumer slices. scope: the "leaving" channels, or "all" of the groups' channels.
    Raises ValueError for another scope.
    """
    if scope not in PENALTY_SCOPES:
        raise ValueError(f"Unknown scope {scope!r}; choose from {list(PENALTY_SCOPES)}.")
    total = None
    for group in groups:
        if scope == "leaving" and group.name not in masks:
            continue
        views = list(group.scored_views())
        norms = _ChannelNorms.apply(views, *{id(v.parameter): v.parameter for v in views}.values())
        if scope == "leaving":  # not by index, whose length only the CPU could know
            norms = norms * ~masks[group.name].to(norms.device)
        total = norms.sum() if total is None else total + norms.sum()
    return torch.zeros(()) if total is None else total


class _ChannelNorms(torch.autograd.Function):
    """||w_g||_2 of a group's channels, (size,) fp32, with its gradient w_g / ||w_g|| (0 at 0) written out.

    Through autograd each slice would cost a dozen small kernels and a tensor of its whole parameter's size.
    """

    @staticmethod
    def forward(ctx, views, *parameters):
        ctx.views = views
        ctx.places = {id(p): i for i, p in enumerate(parameters)}
        norms = torch.stack([v.norms() for v in views])
        norms = torch.linalg.vector_norm(norms, dim=0)
        ctx.save_for_backward(norms, *parameters)
        return norms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        norms, *parameters = ctx.saved_tensors
        factor = torch.where(norms > 0, grad / norms, 0.0)
        grads = [torch.zeros_like(p) for p in parameters]
        for view in ctx.views:
            along = view.along(factor).to(view.parameter.dtype)
            view.of(grads[ctx.places[id(view.parameter)]]).addcmul_(view.tensor.detach(), along)
        return None, *grads


@torch.no_grad()
def leaving_share(groups: Iterable[Group], masks: Masks) -> float:
    """Norm of the leaving channels over the norm of all channels, in [0, 1]: 0 when the cut will change nothing.

    Of parameters that FSDP has sharded each process sums its own rows, so all processes must ask.
    """
    sums, parameter = torch.zeros(2), None  # summed on the device: it is asked once, at the end
    for group in groups:
        keep = masks.get(group.name)
        leaves = torch.zeros(group.size) if keep is None else (~keep).to(torch.float32)
        for view in group.scored_views():
            parameter, leaves = view.parameter, leaves.to(view.parameter.device)
            held, leaves_here = view.held(leaves)
            squares = held.to(torch.promote_types(held.dtype, torch.float32)).square()
            found = torch.stack([(squares * leaves_here).sum(), squares.sum()])
            sums = found + sums.to(found.device)
    if parameter is not None:
        sums = sum_over_shards(sums, parameter)
    leaving, everything = sums.tolist()
    return (leaving / everything) ** 0.5 if everything > 0 else 0.0


def strength_for(residual: float, rates: list[float], schedule: Callable[[float], float]) -> float:
    """lambda_max under which growing_l2 alone shrinks a leaving weight to `residual` of its size over a stage.

    rates: the learning rate of every step of the stage.  schedule: f(u).
    Solves prod_t (1 - min(MAX_DECAY, lr_t lambda_max f(u_t))) = residual by bisection; the gradient pushes back, so
    what is really left is measured and logged. Raises ValueError where no strength can do it.
    """
    import math

    steps = [(lr, schedule((t + 1) / len(rates))) for t, lr in enumerate(rates)]
    product = lambda lam: sum(math.log1p(-min(MAX_DECAY, lr * lam * f)) for lr, f in steps)  # noqa: E731
    goal = math.log(residual)
    low, high = 0.0, 1.0
    while product(high) > goal:
        high *= 2
        if high > 1e12:
            raise ValueError(f"{len(rates)} steps are too few to shrink the leaving channels to {residual}.")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if product(middle) > goal else (low, middle)
    return high
