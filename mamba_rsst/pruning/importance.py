"""Channel importance: one score per channel, larger = keep. `register_importance` adds a score of your own."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .groups import Group, channel_norms


Scores = dict[str, Tensor]
"""Group name -> (size,) fp32."""


@dataclass
class Calibration:
    """What data-driven scores run: the model on batches (dicts of its keyword arguments, on any device)."""

    model: nn.Module
    batches: Iterable[Mapping[str, Tensor]] | None = None
    seed: int = 0

    def __iter__(self):
        device = next(self.model.parameters()).device
        count = 0
        for batch in () if self.batches is None else self.batches:
            count += 1
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if count == 0:
            raise ValueError("This importance looks at data: give `calibration`, an iterable of at least one batch.")


IMPORTANCE: dict[str, Callable[[list[Group], Calibration], Scores]] = {}
NEEDS_DATA: set[str] = set()


def register_importance(name: str, *, needs_data: bool = False):
    """Decorator: make `function(groups, calibration) -> {group.name: (size,) scores}` known as `name`."""

    def register(function):
        if name in IMPORTANCE:
            raise ValueError(f"There already is an importance called {name!r}.")
        IMPORTANCE[name] = function
        if needs_data:
            NEEDS_DATA.add(name)
        return function

    return register


def score_channels(groups: list[Group], importance: str, calibration: Calibration) -> Scores:
    """Scores of every group, fp32 on the CPU. Raises ValueError for an unknown name or scores that are not finite."""
    if importance not in IMPORTANCE:
        raise ValueError(f"Unknown importance {importance!r}; choose from {sorted(IMPORTANCE)}.")
    scores = IMPORTANCE[importance](groups, calibration)
    scores = {group.name: scores[group.name].detach().float().cpu() for group in groups}
    for group in groups:
        if tuple(scores[group.name].shape) != (group.size,):
            raise ValueError(f"Importance {importance!r} gave {tuple(scores[group.name].shape)} for {group}.")
        if not torch.isfinite(scores[group.name]).all():
            raise ValueError(f"Importance {importance!r} is not finite for {group.name!r}: has the model diverged?")
    return scores


@register_importance("magnitude_l1")
def magnitude_l1(groups, calibration) -> Scores:
    """Sum of |w| over the channel's producer and consumer slices (Li et al. 2017, arXiv:1608.08710)."""
    return {g.name: sum(v.per_channel(v.tensor.detach().abs()) for v in g.scored_views()) for g in groups}


@register_importance("magnitude_l2")
def magnitude_l2(groups, calibration) -> Scores:
    """L2 norm of the channel's producer and consumer slices."""
    return {g.name: channel_norms(g) for g in groups}


@register_importance("random")
def random(groups, calibration) -> Scores:
    """Uniform random numbers from the config's seed: the baseline every score has to beat."""
    generator = torch.Generator().manual_seed(calibration.seed)
    return {g.name: torch.rand(g.size, generator=generator) for g in groups}


@register_importance("taylor", needs_data=True)
def taylor(groups, calibration) -> Scores:
    """|sum over the channel of w dL/dw|, summed over batches: the first-order change of the loss when the channel goes
    (Molchanov et al. 2019, arXiv:1906.10771). Producer and consumer slices each silence the channel, so each estimates
    the same change. Needs labels in the batches; raises ValueError where there is no loss or no gradient."""
    model = calibration.model
    scores = {g.name: 0.0 for g in groups}
    views = {g.name: list(g.scored_views()) for g in groups}
    parameters = list({id(v.parameter): v.parameter for vs in views.values() for v in vs}.values())
    if frozen := [p for p in parameters if not p.requires_grad]:
        raise ValueError(
            f"Importance 'taylor' needs gradients, but {len(frozen)} of the pruned parameters are frozen."
        )
    with evaluation_mode(model):
        for batch in calibration:
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise ValueError("Importance 'taylor' needs a loss: put `labels` into the calibration batches.")
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            grads = {id(p): grad for p, grad in zip(parameters, grads) if grad is not None}
            for group in groups:
                if missing := [v.name for v in views[group.name] if id(v.parameter) not in grads]:
                    raise ValueError(f"Importance 'taylor': no gradient reached {missing[0]!r} of {group.name!r}.")
                change = sum(
                    v.per_channel(v.tensor.detach().float() * v.of(grads[id(v.parameter)])) for v in views[group.name]
                )
                scores[group.name] = scores[group.name] + change.abs()
    return scores


@register_importance("activation", needs_data=True)
def activation(groups, calibration) -> Scores:
    """Sum of a^2 of what the channel hands on, over all calibration tokens: out_proj's or fc2's input, the rows of B
    and C for a state, the low-rank step for dt_rank."""
    scores = {g.name: torch.zeros(g.size) for g in groups}
    seen, handles = set(), []

    def watch(group, module, side, start):
        def hook(module, args, output):
            values = (args[0] if side == "input" else output).detach()[..., start : start + group.size]
            seen.add(group.name)
            scores[group.name] += values.float().square().flatten(0, -2).sum(0).cpu()

        handles.append(module.register_forward_hook(hook))

    try:
        for group in groups:
            for module, side, start in group.taps():
                watch(group, module, side, start)
        with evaluation_mode(calibration.model), torch.no_grad():
            for batch in calibration:
                calibration.model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [group.name for group in groups if group.name not in seen]:
        raise ValueError(f"Importance 'activation': the model never called what hands on {unseen[0]!r}.")
    return scores


@contextmanager
def evaluation_mode(model):
    """Evaluation mode; afterwards each module is back in its own, which need not be the model's."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
