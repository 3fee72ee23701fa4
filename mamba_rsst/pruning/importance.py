"""Channel importance: one score per channel, larger = keep. `register_importance` adds a score of your own."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .groups import CONSUMER, PRODUCER, Group, View, channel_norms


Scores = dict[str, Tensor]
"""Group name -> (size,) fp32."""


@dataclass
class Calibration:
    """What data-driven scores run: the model on batches (dicts of its keyword arguments, on any device)."""

    model: nn.Module
    batches: Iterable[Mapping[str, Tensor]] | None = None
    seed: int = 0
    removals: dict[str, int] = field(default_factory=dict)
    """Group name -> how many of its channels can leave at most: all that a greedy score needs to order."""
    densities: dict[str, float] = field(default_factory=dict)
    """Group name -> fraction of its channels that the budget keeps: the density of `remain`'s unstructured mask."""

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
SCORES_ONLY: dict[str, tuple[str, ...]] = {}


def register_importance(name: str, *, needs_data: bool = False, targets: tuple[str, ...] | None = None):
    """Decorator: make `function(groups, calibration) -> {group.name: (size,) scores}` known as `name`.

    targets: the only ones that it can score; default all.
    """

    def register(function):
        if name in IMPORTANCE:
            raise ValueError(f"There already is an importance called {name!r}.")
        IMPORTANCE[name] = function
        if needs_data:
            NEEDS_DATA.add(name)
        if targets is not None:
            SCORES_ONLY[name] = targets
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


@register_importance("remain")
def remain(groups, calibration) -> Scores:
    """How many of the channel's weights survive an unstructured mask, the criterion of Refill (Chen et al. 2022,
    arXiv:2202.04736): one threshold on |w| over all groups' weights, whose density is what the budget keeps."""
    alive = _survivors(groups, calibration)
    return {g.name: sum(v.per_channel(mask) for v, mask in alive[g.name]) for g in groups}


@register_importance("remain_l1")
def remain_l1(groups, calibration) -> Scores:
    """Sum of |w| over the channel's weights that survive the mask of `remain`; "magnitude" in Refill's scripts."""
    alive = _survivors(groups, calibration)
    return {g.name: sum(v.per_channel(v.tensor.detach().abs() * mask) for v, mask in alive[g.name]) for g in groups}


def _survivors(groups, calibration) -> dict[str, list[tuple[View, Tensor]]]:
    """Group name -> (view, bool of its shape) of each scored view, under one global magnitude threshold a target."""
    alive = {}
    for target in {g.target: None for g in groups}:
        part = [g for g in groups if g.target == target]
        views = [(g, v) for g in part for v in g.scored_views()]
        values = torch.cat([v.tensor.detach().abs().float().flatten() for _, v in views])
        size = sum(g.size for g in part)
        kept = sum(calibration.densities.get(g.name, 1.0) * g.size for g in part) / size
        kept = min(len(values), max(1, round(kept * len(values))))
        # Exact, but that of equal weights all stay; torch.quantile refuses so many.
        threshold = values.kthvalue(len(values) - kept + 1).values
        for group, view in views:
            alive.setdefault(group.name, []).append((view, view.tensor.detach().abs().float() >= threshold))
    return alive


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
    with evaluation_mode(model), torch.enable_grad():
        for batch in calibration:
            loss = _loss_of(model(**batch), "taylor")
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
    and C for a state, the low-rank step for dt_rank, the residual stream before each norm for hidden_size."""
    scores = {g.name: torch.zeros(g.size) for g in groups}
    seen, hooks = set(), []

    def watch(group, module, side, start):
        def hook(module, args, output):
            values = (args[0] if side == "input" else output).detach()[..., start : start + group.size]
            seen.add(group.name)
            scores[group.name] += _squares(values).cpu()

        hooks.append((module, hook))

    for group in groups:
        for module, side, start in group.taps():
            watch(group, module, side, start)
    _run_watched(calibration, hooks)
    if unseen := [group.name for group in groups if group.name not in seen]:
        raise ValueError(f"Importance 'activation': the model never called what hands on {unseen[0]!r}.")
    return scores


@register_importance("saliency", needs_data=True)
def saliency(groups, calibration) -> Scores:
    """Sum over samples of |sum over positions of a dL/da|, a being what the channel hands on (see `activation`): the
    first-order change of the loss when its activation goes (Molchanov et al. 2017, arXiv:1611.06440, eq. 8). Needs
    labels in the batches; raises ValueError where there is no loss or no gradient."""
    scores = {g.name: torch.zeros(g.size) for g in groups}
    seen: list[tuple[Group, Tensor, int]] = []

    def watch(group, module, side, start):
        def note(value):
            if not value.requires_grad:
                raise ValueError(f"Importance 'saliency' needs gradients, but none reach {group.name!r}.")
            seen.append((group, value, start))

        def before(module, args):
            # A view, so that its gradient is what comes through this reader alone: of the residual stream each norm
            # reads a sum that later ones read too.
            value = args[0].view_as(args[0])
            note(value)
            return value, *args[1:]

        return module, before if side == "input" else lambda module, args, output: note(output)

    watched = {side: [] for side in ("input", "output")}
    for group in groups:
        for module, side, start in group.taps():
            watched[side].append(watch(group, module, side, start))
    if untapped := [g.name for g in groups if not any(True for _ in g.taps())]:
        raise ValueError(f"Importance 'saliency': {untapped[0]!r} has no activation of its own to look at.")
    with evaluation_mode(calibration.model), torch.enable_grad(), _hooked(watched["output"], watched["input"]):
        for batch in calibration:
            seen.clear()
            loss = _loss_of(calibration.model(**batch), "saliency")
            values = {id(value): value for _, value, _ in seen}
            grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
            grads = dict(zip(values, grads))
            found = {}
            for group, value, start in seen:
                if (grad := grads[id(value)]) is None:
                    raise ValueError(f"Importance 'saliency': no gradient reached {group.name!r}.")
                product = (value.detach().float() * grad.float())[..., start : start + group.size]
                # All places where one channel shows (rows of B and of C, both directions) go with it: summed first.
                found[group.name] = found.get(group.name, 0.0) + product.flatten(1, -2).sum(1)
            if missing := [g.name for g in groups if g.name not in found]:
                raise ValueError(f"Importance 'saliency': the model never called what hands on {missing[0]!r}.")
            for name, product in found.items():
                scores[name] += product.abs().sum(0).cpu()
    return scores


@register_importance("wanda", needs_data=True)
def wanda(groups, calibration) -> Scores:
    """Sum of |w_ij| ||x_j||_2 over the weights of the channel's producer and consumer slices, x_j being input j of the
    linear layer over all calibration tokens (Sun et al. 2023, arXiv:2306.11695, whose score of one weight this is).

    Only layers that are called are seen: the convolution and dt_proj, whose weights are read directly, biases and
    embeddings count nothing. Raises ValueError for a group of which nothing is seen.
    """
    views = {}
    for group in groups:  # by role, since views give a tied parameter once: embeddings write, the head reads
        both = [*group.views(PRODUCER), *group.views(CONSUMER)]
        views[group.name] = [v for v in both if isinstance(v.module, nn.Linear) and v.name == "weight"]
    squares: dict[nn.Module, Tensor] = {}

    def hook(module, args, output):
        squares[module] = squares.get(module, 0.0) + _squares(args[0].detach())

    _run_watched(calibration, [(m, hook) for m in {v.module: None for vs in views.values() for v in vs}])
    scores = {}
    for group in groups:
        parts = [
            v.per_channel(v.of(v.parameter.detach().abs() * squares[v.module].sqrt().to(v.parameter.dtype)))
            for v in views[group.name]
            if v.module in squares
        ]
        if not parts:
            raise ValueError(f"Importance 'wanda': the model called no linear layer of {group.name!r}.")
        scores[group.name] = sum(parts)
    return scores


@register_importance("state_energy", needs_data=True, targets=("d_state",))
def state_energy(groups, calibration) -> Scores:
    """Energy of what each state adds to the output over time: sum over tokens t and channels e of (C_tn h_ten)^2.

    For d_state. What can be reached (h, controllability) times what is read (C, observability), from forward passes
    alone, in the spirit of GHOST (Menezes & Kyrillidis 2026, arXiv:2602.11408); SparseSSM (Tuo & Wang 2025,
    arXiv:2506.09613) also sums h^2 over time, weighted by A_log^2. The states are run in fp32, one token at a time.
    """
    scores = {g.name: torch.zeros(g.size) for g in groups}
    hooks = []

    def watch(group, scan):
        owner, N, R = group.owner, group.size, group.width("dt_rank")
        dt_proj, decay = getattr(owner, scan.dt_proj), getattr(owner, scan.decay)

        def hook(module, args, output):
            parts = output.detach().float().split([R, N, N], dim=-1)
            if group.layout.norm_eps is not None:
                eps = getattr(owner, group.layout.norm_eps)
                parts = [F.rms_norm(part, part.shape[-1:], eps=eps) for part in parts]
            low_rank, B, C = parts
            u, A_log = args[0].detach().float(), decay.float()
            delta = F.softplus(F.linear(low_rank, dt_proj.weight.float(), dt_proj.bias.float()))
            scores[group.name] += _run_states(u, delta, A_log, B, C, scan.reverse).cpu()

        hooks.append((getattr(owner, scan.x_proj), hook))

    for group in groups:
        scans = list(group.scans())
        if not scans:
            raise ValueError(f"Importance 'state_energy' scores d_state, not {group.target!r}.")
        for scan in scans:
            watch(group, scan)
    _run_watched(calibration, hooks)
    return scores


def _run_states(u, delta, A_log, B, C, reverse) -> Tensor:
    """sum over t, e of (C_tn h_ten)^2, with h_t = exp(delta_t A) h_t-1 + delta_t B_t u_t: (N,).

    u, delta (Z, L, E), B, C (Z, L, N), A_log (E, N).
    """
    A, h, energy = -torch.exp(A_log), 0.0, 0.0
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * u[:, t, :, None] * B[:, t, None]
        energy = energy + (h.square().sum(1) * C[:, t].square()).sum(0)
    return energy


@register_importance("leave_one_out", needs_data=True)
def leave_one_out(groups, calibration) -> Scores:
    """The order in which channels leave when the one without which the loss is lowest goes first, one after the other.

    For num_hidden_layers this is Mamba-Shedder's removal of blocks (Munoz et al. 2025, arXiv:2501.17088). It takes a
    pass over the batches for every channel left and every one removed: sensible for blocks, hardly for widths. Each
    group is ordered with the others whole. Needs labels in the batches; raises ValueError where there is no loss.
    """
    batches = list(calibration)
    model, scores = calibration.model, {}
    rounds = {g.name: max(1, min(calibration.removals.get(g.name, g.size - 1), g.size - 1)) for g in groups}
    passes = sum(g.size - gone for g in groups for gone in range(rounds[g.name])) * len(batches)
    bar = tqdm(total=passes, desc="leave_one_out", unit="batch", leave=False, disable=passes < 200)

    def loss_without(group, channels):
        with silenced(group, channels):
            bar.update(len(batches))
            return sum(float(_loss_of(model(**batch), "leave_one_out")) for batch in batches) / len(batches)

    with bar, evaluation_mode(model), torch.no_grad():
        for group in groups:
            scores[group.name] = torch.zeros(group.size)
            gone: list[int] = []
            while len(gone) < rounds[group.name]:
                losses = {c: loss_without(group, [*gone, c]) for c in range(group.size) if c not in gone}
                gone.append(min(losses, key=losses.get))
                # Removed ones keep their place in the queue; those left are ranked behind it by the last losses.
                for place, channel in enumerate(sorted(losses, key=losses.get)):
                    scores[group.name][channel] = len(gone) + place
    return scores


@contextmanager
def silenced(group: Group, channels: list[int]):
    """The model with some channels of a group zeroed, as after `apply_masks_`; afterwards it is as it was."""
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[channels] = False
    saved = []
    try:
        for view in group.scored_views():
            keep = view.along(mask)
            if not keep.all():
                saved.append((view, view.tensor.detach().clone()))
                view.tensor.mul_(keep)
        yield
    finally:
        for view, values in saved:
            view.tensor.copy_(values)


def _squares(values: Tensor) -> Tensor:
    """Sum of squares over all axes but the last, fp32."""
    return values.float().square().flatten(0, -2).sum(0)


@contextmanager
def _hooked(hooks, before=()):
    """(module, forward hook) pairs in place; before: those that are called before the forward."""
    handles = []
    try:
        handles += [module.register_forward_hook(hook) for module, hook in hooks]
        handles += [module.register_forward_pre_hook(hook) for module, hook in before]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_watched(calibration, hooks) -> None:
    """Run the model on the calibration batches with (module, hook) pairs in place."""
    with _hooked(hooks), evaluation_mode(calibration.model), torch.no_grad():
        for batch in calibration:
            calibration.model(**batch)


def _loss_of(outputs, importance: str) -> Tensor:
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(f"Importance {importance!r} needs a loss: put `labels` into the calibration batches.")
    return loss


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
