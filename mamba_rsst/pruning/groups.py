"""The table of coupled slices: which slices of which parameters make up one channel, and must be cut together.

Everything else in this folder (scores, penalties, masks, cutting, counting) is a loop over `group.views()`.
To support another kind of layer, add a Layout; to support another width, add its slices to the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


PRODUCER, CONSUMER, CARRIED = "producer", "consumer", "carried"
"""Roles: a producer writes the channel, a consumer reads it; carried slices travel with it but are never scored,
penalised or zeroed (A_log = 0 means A = -1, not "off"). All producers or all consumers zero: the channel is silent."""


@dataclass(frozen=True)
class Slice:
    """`parameter` (a path below the owning module) holds the channels along `axis`, behind the widths in `after`."""

    parameter: str
    axis: int
    role: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tap:
    """Where a channel's activation can be observed: the input or output of `module`, last axis, behind `after`."""

    module: str
    side: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """After a cut, multiply `parameter` (or, with `own`, the group's slices of it) by (old / new width) ** power.

    Keeps what a norm over the channels hands on as it was, though its mean now runs over fewer of them.
    """

    parameter: str
    power: float
    own: bool = False


@dataclass(frozen=True)
class Layout:
    """One kind of module that owns prunable widths.

    requires: attributes by which such a module is recognised; None counts as absent.
    widths: target -> (attribute of the module, field of the model's config) that hold its size.
    slices, taps, scales: target -> the rows of the table. Slices of parameters that a module lacks are left out
    (a missing bias, the reverse direction of a one-directional mixer).
    """

    name: str
    requires: tuple[str, ...]
    widths: dict[str, tuple[str, str]]
    slices: dict[str, tuple[Slice, ...]]
    taps: dict[str, tuple[Tap, ...]]
    scales: dict[str, tuple[Scale, ...]] = field(default_factory=dict)


def _direction(suffix: str, decay: str) -> dict[str, tuple[Slice, ...]]:
    """The slices of one direction of a mixer; Vim's reverse direction has the suffix `_b` and the decay `A_b_log`."""
    conv, x_proj, dt_proj = f"conv1d{suffix}", f"x_proj{suffix}", f"dt_proj{suffix}"
    return {
        "d_inner": (
            Slice(f"{conv}.weight", 0, PRODUCER),
            Slice(f"{conv}.bias", 0, PRODUCER),
            Slice(f"{x_proj}.weight", 1, CONSUMER),
            Slice(f"{dt_proj}.weight", 0, CARRIED),
            Slice(f"{dt_proj}.bias", 0, CARRIED),
            Slice(decay, 0, CARRIED),
            Slice(f"D{suffix}", 0, CARRIED),
        ),
        "d_state": (
            Slice(f"{x_proj}.weight", 0, PRODUCER, after=("dt_rank",)),  # rows of B
            Slice(f"{x_proj}.weight", 0, CONSUMER, after=("dt_rank", "d_state")),  # rows of C
            Slice(decay, 1, CARRIED),
        ),
        "dt_rank": (
            Slice(f"{x_proj}.weight", 0, PRODUCER),
            Slice(f"{dt_proj}.weight", 1, CONSUMER),
        ),
    }


_SHARED = {
    "d_inner": (
        Slice("in_proj.weight", 0, PRODUCER),  # x
        Slice("in_proj.weight", 0, PRODUCER, after=("d_inner",)),  # z, the gate
        Slice("in_proj.bias", 0, PRODUCER),
        Slice("in_proj.bias", 0, PRODUCER, after=("d_inner",)),
        Slice("out_proj.weight", 1, CONSUMER),
    )
}


def _merge(*tables):
    return {target: sum((t.get(target, ()) for t in tables), ()) for target in {k: None for t in tables for k in t}}


_MIXER_SLICES = _merge(_SHARED, _direction("", "A_log"), _direction("_b", "A_b_log"))
_MIXER_TAPS = {
    "d_inner": (Tap("out_proj", "input"),),
    "d_state": tuple(
        Tap(module, "output", after)
        for module in ("x_proj", "x_proj_b")
        for after in (("dt_rank",), ("dt_rank", "d_state"))
    ),
    "dt_rank": (Tap("x_proj", "output"), Tap("x_proj_b", "output")),
}
_MIXER = ("layer_idx", "in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")
_TRANSFORMERS_WIDTHS = {
    "d_inner": ("intermediate_size", "intermediate_size"),
    "d_state": ("ssm_state_size", "state_size"),
    "dt_rank": ("time_step_rank", "time_step_rank"),
}

_OUR_MIXER = (*_MIXER, "d_inner", "d_state", "dt_rank")
_OUR_WIDTHS = {t: (t, t) for t in ("d_inner", "d_state", "dt_rank")}
# FalconMamba: B, C and dt pass through RMS norms without weights, whose means run over d_state and dt_rank channels: a
# shorter mean makes the survivors smaller by sqrt(new / old). B and C together are repaired behind the scan (out_proj
# up, the skip D down by as much), dt in dt_proj; the rows before the norm shrink, which is the same as raising the
# norm's epsilon by old / new.
_NORM_SCALES = {
    "d_state": (Scale("out_proj.weight", 1.0), Scale("D", -1.0), Scale("x_proj.weight", -0.5, own=True)),
    "dt_rank": (Scale("dt_proj.weight", 0.5), Scale("x_proj.weight", -0.5, own=True)),
}

LAYOUTS = (
    Layout(
        name="mamba_rsst mixer with norms",
        requires=(*_OUR_MIXER, "mixer_rms_eps"),
        widths=_OUR_WIDTHS,
        slices=_MIXER_SLICES,
        taps=_MIXER_TAPS,
        scales=_NORM_SCALES,
    ),
    Layout(
        name="mamba_rsst mixer",
        requires=_OUR_MIXER,
        widths=_OUR_WIDTHS,
        slices=_MIXER_SLICES,
        taps=_MIXER_TAPS,
    ),
    Layout(
        name="transformers' FalconMamba mixer",
        requires=(*_MIXER, "ssm_state_size", "time_step_rank", "b_layernorm", "c_layernorm", "dt_layernorm"),
        widths=_TRANSFORMERS_WIDTHS,
        slices=_merge(
            _MIXER_SLICES,
            {
                "d_inner": (Slice("dt_layernorm.weight", 0, CARRIED),),
                "d_state": (Slice("b_layernorm.weight", 0, CARRIED), Slice("c_layernorm.weight", 0, CARRIED)),
            },
        ),
        taps=_MIXER_TAPS,
        scales=_NORM_SCALES,
    ),
    Layout(
        name="transformers' Mamba mixer",
        requires=(*_MIXER, "ssm_state_size", "time_step_rank"),
        widths=_TRANSFORMERS_WIDTHS,
        slices=_MIXER_SLICES,
        taps=_MIXER_TAPS,
    ),
    Layout(
        name="mamba_rsst MLP",
        requires=("fc1", "fc2", "intermediate_size", "layer_idx"),
        widths={"intermediate_size": ("intermediate_size", "intermediate_size")},
        slices={
            "intermediate_size": (
                Slice("fc1.weight", 0, PRODUCER),
                Slice("fc1.bias", 0, PRODUCER),
                Slice("fc2.weight", 1, CONSUMER),
            )
        },
        taps={"intermediate_size": (Tap("fc2", "input"),)},
    ),
)
"""Searched in this order, so the more particular stands first."""

TARGETS = tuple({target: None for layout in LAYOUTS for target in layout.widths})


@dataclass(frozen=True)
class View:
    """One slice, bound to a model: `size` channels of `module.<name>` along `axis` from `start`."""

    module: nn.Module
    name: str
    axis: int
    start: int
    size: int
    role: str

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def tensor(self) -> Tensor:
        """The slice itself, sharing the parameter's memory."""
        return self.parameter.narrow(self.axis, self.start, self.size)

    def of(self, other: Tensor) -> Tensor:
        """The same slice of a tensor with the parameter's shape: its gradient, or a mask."""
        return other.narrow(self.axis, self.start, self.size)

    def along(self, vector: Tensor) -> Tensor:
        """A (size,) vector shaped to broadcast against `tensor`."""
        shape = [1] * self.parameter.dim()
        shape[self.axis] = self.size
        return vector.to(self.parameter.device).view(shape)

    def per_channel(self, values: Tensor) -> Tensor:
        """Sum a tensor of the slice's shape over all axes but the channel's: (size,), in fp32 or better."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return values.transpose(0, self.axis).reshape(self.size, -1).sum(dim=1, dtype=dtype)


class Group:
    """One prunable width of one layer: all slices that must be cut together.

    name: unique and stable under cutting, "<module path>:<target>".  layer: the layer's index in the config's lists.
    """

    def __init__(self, path: str, owner: nn.Module, target: str, layout: Layout):
        self.name = f"{path}:{target}"
        self.owner, self.target, self.layout = owner, target, layout
        self.layer = owner.layer_idx

    def __repr__(self):
        return f"Group({self.name}, size={self.size})"

    @property
    def size(self) -> int:
        return getattr(self.owner, self.layout.widths[self.target][0])

    @property
    def config_field(self) -> str:
        return self.layout.widths[self.target][1]

    def width(self, target: str) -> int:
        return getattr(self.owner, self.layout.widths[target][0])

    def views(self, *roles: str) -> Iterator[View]:
        """The group's slices as they are now; with `roles`, only those."""
        for row in self.layout.slices[self.target]:
            if roles and row.role not in roles:
                continue
            path, _, name = row.parameter.rpartition(".")
            module = _submodule(self.owner, path)
            if module is None or getattr(module, name, None) is None:
                continue
            if name not in module._parameters and name not in module._buffers:
                raise ValueError(
                    f"{row.parameter!r} of {self.name!r} is computed, not stored; merge adapters and remove "
                    "parametrizations before pruning."
                )
            yield View(module, name, row.axis, sum(map(self.width, row.after)), self.size, row.role)

    def scored_views(self) -> Iterator[View]:
        """The slices that scores and penalties look at: producers and consumers."""
        return self.views(PRODUCER, CONSUMER)

    def taps(self) -> Iterator[tuple[nn.Module, str, int]]:
        """(module, "input" or "output", first channel) for each place where the group's activations can be seen."""
        for tap in self.layout.taps[self.target]:
            module = _submodule(self.owner, tap.module)
            if module is not None:
                yield module, tap.side, sum(map(self.width, tap.after))

    def scales(self) -> tuple[Scale, ...]:
        return self.layout.scales.get(self.target, ())


def _submodule(owner, path):
    module = owner
    for part in filter(None, path.split(".")):
        module = getattr(module, part, None)
    return module


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module that owns widths, None for any other module."""
    return next((x for x in LAYOUTS if all(getattr(module, name, None) is not None for name in x.requires)), None)


def check_targets(targets) -> tuple[str, ...]:
    """The targets as a tuple. Raises ValueError for an unknown, repeated or missing name."""
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"Unknown target {target!r}; choose from {list(TARGETS)}.")
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"`targets` must name each of one or more of {list(TARGETS)} once, got {list(targets)}.")
    return targets


def find_groups(model: nn.Module, targets=TARGETS) -> list[Group]:
    """Every group of the given targets in `model`, in the order of its modules.

    Works on this package's models and on transformers' MambaForCausalLM and FalconMambaForCausalLM.
    Raises ValueError for an unknown target, or a named one of which the model has nothing.
    """
    named = tuple(targets) != TARGETS
    targets = check_targets(targets)
    groups = []
    for path, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None:
            groups += [Group(path, module, t, layout) for t in layout.widths]
    found = {g.target for g in groups}
    if not groups:
        known = [layout.name for layout in LAYOUTS]
        raise ValueError(f"{type(model).__name__} has no layer with a prunable width; known are {known}.")
    if named and (missing := [t for t in targets if t not in found]):
        raise ValueError(f"{type(model).__name__} has no {missing[0]!r} to prune; it has {sorted(found)}.")
    return [g for g in groups if g.target in targets]


def channel_norms(group: Group) -> Tensor:
    """L2 norm of each channel's producer and consumer slices: (size,), fp32."""
    return sum(view.per_channel(view.tensor.detach().square()) for view in group.scored_views()).sqrt()
