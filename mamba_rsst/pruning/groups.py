"""The table of coupled slices: which slices of which parameters make up one channel, and must be cut together.

Everything else in this folder (scores, penalties, masks, cutting, counting) is a loop over `group.views()`.
To support another kind of layer, add a Layout; to support another width, add its slices to the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .shards import held, sharded_along


PRODUCER, CONSUMER, CARRIED = "producer", "consumer", "carried"
"""Roles: a producer writes the channel, a consumer reads it; carried slices travel with it but are never scored,
penalised or zeroed (A_log = 0 means A = -1, not "off"). All producers or all consumers zero: the channel is silent."""


@dataclass(frozen=True)
class Slice:
    """`parameter` (a path below the owning module) holds the channels along `axis`, behind the widths in `after`.

    `*` in a path stands for every entry of a list of modules. axis=None: the entry itself is the channel, number i of
    the list, and the whole parameter is its slice.
    """

    parameter: str
    axis: int | None
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

    Keeps what a norm over the channels hands on as it was, though its mean now runs over fewer of them. A plain number
    (a norm's epsilon, of a module or of the config) is scaled like a parameter.
    """

    parameter: str
    power: float
    own: bool = False


@dataclass(frozen=True)
class Work:
    """What a parameter costs: multiply-accumulates per element, and per entry of axis 0, at every `position`
    ("token", or what the layout's `positions` counts)."""

    parameter: str
    each: int = 1
    row: int = 0
    position: str = "token"


@dataclass(frozen=True)
class Scan:
    """One selective scan of a mixer: u is `x_proj`'s input, its output dt's low rank, B and C, and A = -exp(decay)."""

    x_proj: str
    dt_proj: str
    decay: str
    reverse: bool = False


@dataclass(frozen=True)
class Layout:
    """One kind of module that owns prunable widths.

    requires: attributes by which such a module is recognised; None counts as absent.
    widths: target -> (attribute of the module, field of the model's config) that hold its size.
    slices, taps, scales: target -> the rows of the table. Slices of parameters that a module lacks are left out
    (a missing bias, the reverse direction of a one-directional mixer).
    work: what its parameters cost; positions: owner -> {position: how many an item has}.
    scans: how d_state's states run over time; norm_eps: attribute with the epsilon of RMS norms on dt, B and C.
    linear: target -> (producer, consumer) rows with nothing in between, so that the channels' basis is free to turn.
    blocks: target -> the list of modules whose entries are the channels.
    refuses: target -> (attribute whose presence rules it out, why).
    """

    name: str
    requires: tuple[str, ...]
    widths: dict[str, tuple[str, str]]
    slices: dict[str, tuple[Slice, ...]]
    taps: dict[str, tuple[Tap, ...]]
    scales: dict[str, tuple[Scale, ...]] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    positions: Callable[[nn.Module], dict[str, int]] | None = None
    scans: tuple[Scan, ...] = ()
    norm_eps: str | None = None
    linear: dict[str, tuple[tuple[Slice, Slice], ...]] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    refuses: dict[str, tuple[str, str]] = field(default_factory=dict)


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
_MIXER_WORK = (
    *(Work(f"{name}.weight") for name in ("in_proj", "out_proj")),
    *(Work(f"{name}{s}.weight") for s in ("", "_b") for name in ("conv1d", "x_proj", "dt_proj")),
    # delta A, decay h + input, delta B u, C h for each state; delta u and D u for each channel
    *(Work(decay, each=4, row=2) for decay in ("A_log", "A_b_log")),
)
_MIXER_SCANS = (
    Scan("x_proj", "dt_proj", "A_log"),
    Scan("x_proj_b", "dt_proj_b", "A_b_log", reverse=True),  # Vim v2
    Scan("x_proj", "dt_proj", "A_b_log", reverse=True),  # Vim v1, where the reverse direction has only its own decay
)
_MIXER_LINEAR = {
    "dt_rank": tuple(
        (Slice(f"x_proj{s}.weight", 0, PRODUCER), Slice(f"dt_proj{s}.weight", 1, CONSUMER)) for s in ("", "_b")
    )
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

# The residual stream. RMS norms run over it. With the channels that leave at zero, the mean of squares over the
# survivors is old / new times the one over all, so w x / sqrt(mean + eps) stays as it was when eps is multiplied by
# old / new and w by its root. A LayerNorm also subtracts a mean of x, which changes by what no weight can undo.
_STREAM_WRITERS = (
    *("backbone.layers.*.mixer.out_proj.weight", "backbone.layers.*.mixer.out_proj.bias"),
    *("backbone.layers.*.mlp.fc2.weight", "backbone.layers.*.mlp.fc2.bias"),
)
_STREAM_NORMS = ("backbone.layers.*.norm", "backbone.layers.*.norm2", "backbone.norm_f")
_STREAM = (
    Slice("backbone.embeddings.weight", 1, PRODUCER),
    Slice("backbone.embeddings.patch_embeddings.weight", 0, PRODUCER),
    Slice("backbone.embeddings.patch_embeddings.bias", 0, PRODUCER),
    Slice("backbone.embeddings.position_embeddings", 2, PRODUCER),
    Slice("backbone.embeddings.cls_token", 2, PRODUCER),
    *(Slice(path, 0, PRODUCER) for path in _STREAM_WRITERS),
    Slice("backbone.layers.*.mixer.in_proj.weight", 1, CONSUMER),
    Slice("backbone.layers.*.mlp.fc1.weight", 1, CONSUMER),
    Slice("lm_head.weight", 1, CONSUMER),
    Slice("classifier.weight", 1, CONSUMER),
    *(Slice(f"{norm}.weight", 0, CARRIED) for norm in _STREAM_NORMS),
)
_STREAM_SCALES = (
    *(Scale(f"{norm}.weight", 0.5) for norm in _STREAM_NORMS),
    *(Scale(f"{norm}.{eps}", 1.0) for norm in _STREAM_NORMS for eps in ("eps", "variance_epsilon")),
    Scale("config.layer_norm_epsilon", 1.0),
)


def _positions(model: nn.Module) -> dict[str, int]:
    """How many positions an image has; for text all work is per token, so one token stands for any number of them."""
    places = getattr(model.backbone.embeddings, "position_embeddings", None)
    if places is None:
        return {"token": 1}
    tokens = getattr(model.backbone.embeddings, "cls_token", None)
    patches = places.shape[1] - (0 if tokens is None else tokens.shape[1])
    return {"token": places.shape[1], "patch": patches, "item": 1}


LAYOUTS = (
    Layout(
        name="a model's residual stream",
        requires=("config.hidden_size", "config.num_hidden_layers", "backbone.layers", "backbone.norm_f.weight"),
        widths={t: (f"config.{t}", t) for t in ("hidden_size", "num_hidden_layers")},
        slices={
            "hidden_size": _STREAM,
            # A block that adds nothing is not there.
            "num_hidden_layers": tuple(Slice(path, None, PRODUCER) for path in _STREAM_WRITERS),
        },
        taps={"hidden_size": tuple(Tap(norm, "input") for norm in _STREAM_NORMS)},
        scales={"hidden_size": _STREAM_SCALES},
        work=(
            Work("lm_head.weight"),
            Work("classifier.weight", position="item"),
            Work("backbone.embeddings.patch_embeddings.weight", position="patch"),
        ),
        positions=_positions,
        blocks={"num_hidden_layers": "backbone.layers"},
        refuses={
            "hidden_size": (
                "backbone.norm_f.bias",
                "its LayerNorms subtract a mean over hidden_size, which no rescaling corrects for fewer channels; "
                "only RMS norms can be corrected.",
            )
        },
    ),
    Layout(
        name="mamba_rsst mixer with norms",
        requires=(*_OUR_MIXER, "mixer_rms_eps"),
        widths=_OUR_WIDTHS,
        slices=_MIXER_SLICES,
        taps=_MIXER_TAPS,
        scales=_NORM_SCALES,
        work=_MIXER_WORK,
        scans=_MIXER_SCANS,
        norm_eps="mixer_rms_eps",
    ),
    Layout(
        name="mamba_rsst mixer",
        requires=_OUR_MIXER,
        widths=_OUR_WIDTHS,
        slices=_MIXER_SLICES,
        taps=_MIXER_TAPS,
        work=_MIXER_WORK,
        scans=_MIXER_SCANS,
        linear=_MIXER_LINEAR,
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
        work=_MIXER_WORK,
        scans=_MIXER_SCANS,
        norm_eps="rms_eps",
    ),
    Layout(
        name="transformers' Mamba mixer",
        requires=(*_MIXER, "ssm_state_size", "time_step_rank"),
        widths=_TRANSFORMERS_WIDTHS,
        slices=_MIXER_SLICES,
        taps=_MIXER_TAPS,
        work=_MIXER_WORK,
        scans=_MIXER_SCANS,
        linear=_MIXER_LINEAR,
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
        work=(Work("fc1.weight"), Work("fc2.weight")),
    ),
)
"""Searched in this order, so the more particular stands first."""

TARGETS = tuple({target: None for layout in LAYOUTS for target in layout.widths})


@dataclass(frozen=True)
class View:
    """One slice, bound to a model: `size` channels of `module.<name>` along `axis` from `start`.

    axis=None: the whole parameter is the slice of the one channel number `start`, of the group's `size`.
    """

    module: nn.Module
    name: str
    axis: int | None
    start: int
    size: int
    role: str

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def tensor(self) -> Tensor:
        """The slice itself, sharing the parameter's memory."""
        return self.of(self.parameter)

    def of(self, other: Tensor) -> Tensor:
        """The same slice of a tensor with the parameter's shape: its gradient, or a mask."""
        return other if self.axis is None else other.narrow(self.axis, self.start, self.size)

    def along(self, vector: Tensor) -> Tensor:
        """A (size,) vector shaped to broadcast against `tensor`."""
        vector = vector.to(self.parameter.device)
        if self.axis is None:
            return vector[self.start]
        shape = [1] * self.parameter.dim()
        shape[self.axis] = self.size
        return vector.view(shape)

    def held(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """(what this process holds of the slice, sharing its memory; what a (size,) vector says of it, to broadcast).

        The whole slice and `along(vector)`, unless FSDP has sharded the parameter: then some of its rows, or none.
        """
        local, along = held(self.parameter), self.along(vector)
        axis, first = sharded_along(self.parameter)
        if axis is None or axis != self.axis:
            return self.of(local), along
        start = max(first, self.start)
        length = min(first + local.shape[axis], self.start + self.size) - start
        if length <= 0:
            return local.narrow(axis, 0, 0), along.narrow(axis, 0, 0)
        return local.narrow(axis, start - first, length), along.narrow(axis, start - self.start, length)

    def per_channel(self, values: Tensor) -> Tensor:
        """Sum a tensor of the slice's shape over all axes but the channel's: (size,), in fp32 or better."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        if self.axis is None:
            return self._alone(values.sum(dtype=dtype))
        return values.transpose(0, self.axis).reshape(self.size, -1).sum(dim=1, dtype=dtype)

    def norms(self) -> Tensor:
        """L2 norm of the slice's channels: (size,), in fp32 or better."""
        x = self.tensor.detach()
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.axis is None:
            return self._alone(torch.linalg.vector_norm(x, dtype=dtype))
        others = [d for d in range(x.dim()) if d != self.axis]
        return torch.linalg.vector_norm(x, dim=others, dtype=dtype) if others else x.abs().to(dtype)

    def _alone(self, value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value[None], (self.start, self.size - self.start - 1))


class Group:
    """One prunable width of one layer, or of the whole model: all slices that must be cut together.

    name: unique and stable under cutting of widths, "<module path>:<target>", the model's own path being "model".
    layer: the layer's index in the config's lists; None where the config has one number for the model.
    """

    def __init__(self, path: str, owner: nn.Module, target: str, layout: Layout):
        self.name = f"{path or 'model'}:{target}"
        self.owner, self.target, self.layout = owner, target, layout
        self.layer = getattr(owner, "layer_idx", None)

    def __repr__(self):
        return f"Group({self.name}, size={self.size})"

    @property
    def size(self) -> int:
        return self.width(self.target)

    @property
    def config_field(self) -> str:
        return self.layout.widths[self.target][1]

    def width(self, target: str) -> int:
        return _reach(self.owner, self.layout.widths[target][0])

    def set_size(self, size: int) -> None:
        """Tell the owner its new width; its tensors are cut elsewhere."""
        path, _, name = self.layout.widths[self.target][0].rpartition(".")
        setattr(_reach(self.owner, path), name, size)

    def views(self, *roles: str) -> Iterator[View]:
        """The group's slices as they are now; with `roles`, only those. A tied parameter's slice comes once."""
        seen = set()
        for row in self.layout.slices[self.target]:
            if roles and row.role not in roles:
                continue
            for module, name, index in _holders(self.owner, row.parameter):
                if name not in module._parameters and name not in module._buffers:
                    raise ValueError(
                        f"{row.parameter!r} of {self.name!r} is computed, not stored; merge adapters and remove "
                        "parametrizations before pruning."
                    )
                start = index if row.axis is None else sum(map(self.width, row.after))
                view = View(module, name, row.axis, start, self.size, row.role)
                key = (id(view.parameter), row.axis, start)
                if key not in seen:
                    seen.add(key)
                    yield view

    def scored_views(self) -> Iterator[View]:
        """The slices that scores and penalties look at: producers and consumers."""
        return self.views(PRODUCER, CONSUMER)

    def taps(self) -> Iterator[tuple[nn.Module, str, int]]:
        """(module, "input" or "output", first channel) for each place where the group's activations can be seen."""
        for tap in self.layout.taps.get(self.target, ()):
            for module, name, _ in _holders(self.owner, tap.module):
                yield getattr(module, name), tap.side, sum(map(self.width, tap.after))

    def scales(self) -> Iterator[tuple[Scale, object, str]]:
        """(row, module or config, name) of each number or parameter to scale after a cut."""
        for scale in self.layout.scales.get(self.target, ()):
            for holder, name, _ in _holders(self.owner, scale.parameter):
                yield scale, holder, name

    def scans(self) -> Iterator[Scan]:
        """The scans whose states are the group's channels; a decay belongs to the first row that fits."""
        seen = set()
        for scan in self.layout.scans if self.target == "d_state" else ():
            here = all(getattr(self.owner, name, None) is not None for name in (scan.x_proj, scan.dt_proj, scan.decay))
            if here and scan.decay not in seen:
                seen.add(scan.decay)
                yield scan

    def pairs(self) -> Iterator[tuple[View, View]]:
        """(producer, consumer) views between which nothing stands, so that their product is all that matters."""
        for rows in self.layout.linear.get(self.target, ()):
            found = [next(_holders(self.owner, row.parameter), None) for row in rows]
            if all(found):
                yield tuple(View(m, n, row.axis, 0, self.size, row.role) for (m, n, _), row in zip(found, rows))

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The list whose entries are the channels; None where channels are slices of parameters."""
        path = self.layout.blocks.get(self.target)
        return None if path is None else _reach(self.owner, path)

    def set_blocks(self, blocks: nn.ModuleList) -> None:
        path, _, name = self.layout.blocks[self.target].rpartition(".")
        setattr(_reach(self.owner, path), name, blocks)


def _reach(owner, path: str):
    """The module or attribute at a path of names, None where there is none."""
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part, None)
    return owner


def _holders(owner, path: str) -> Iterator[tuple[object, str, int | None]]:
    """(holder, name, number in the list that `*` stands for) of everything at `path` that is there."""
    before, star, after = path.partition(".*.")
    if star:
        for index, entry in enumerate(_reach(owner, before) or ()):
            yield from ((holder, name, index) for holder, name, _ in _holders(entry, after))
        return
    path, _, name = path.rpartition(".")
    holder = _reach(owner, path)
    if getattr(holder, name, None) is not None:
        yield holder, name, None


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module that owns widths, None for any other module."""
    return next((x for x in LAYOUTS if all(_reach(module, name) is not None for name in x.requires)), None)


def works(model: nn.Module) -> Iterator[tuple[Work, Tensor]]:
    """(row, parameter) of all that costs multiply-accumulates; a parameter that serves twice comes twice."""
    for module in model.modules():
        if (layout := layout_of(module)) is not None:
            for work in layout.work:
                yield from ((work, getattr(holder, name)) for holder, name, _ in _holders(module, work.parameter))


def positions_of(model: nn.Module) -> dict[str, int]:
    """How many positions of each kind one item has; {"token": 1} for text."""
    layout = layout_of(model)
    return layout.positions(model) if layout is not None and layout.positions else {"token": 1}


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
    Raises ValueError for an unknown target, a named one of which the model has nothing, or another architecture.
    """
    named = tuple(targets) != TARGETS
    targets = check_targets(targets)
    groups = []
    for path, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None and (strange := _strange(model, module, layout)):
            raise ValueError(f"{type(model).__name__} is no architecture that can be pruned: {strange}.")
        for target in layout.widths if layout is not None else ():
            obstacle, reason = layout.refuses.get(target, ("", ""))
            if obstacle and _reach(module, obstacle) is not None:
                if named and target in targets:
                    raise ValueError(f"{type(model).__name__} has no {target!r} to prune: {reason}")
                continue
            groups.append(Group(path, module, target, layout))
    found = {g.target for g in groups}
    if not groups:
        known = [layout.name for layout in LAYOUTS]
        raise ValueError(f"{type(model).__name__} has no layer with a prunable width; known are {known}.")
    if named and (missing := [t for t in targets if t not in found]):
        raise ValueError(f"{type(model).__name__} has no {missing[0]!r} to prune; it has {sorted(found)}.")
    return [g for g in groups if g.target in targets]


def _strange(model, module, layout: Layout) -> str | None:
    """Why a model is not what its modules look like: Jamba's mixers have FalconMamba's names, its config has not."""
    config = getattr(model, "config", None)
    fields = [field for _, field in layout.widths.values()]
    if config is not None and (missing := [field for field in fields if not hasattr(config, field)]):
        return f"its config has no {missing[0]!r}, which {layout.name} needs"
    for path in layout.blocks.values():
        for i, block in enumerate(_reach(module, path)):
            if not any(layout_of(part) for part in block.modules()):
                return f"{path}.{i} holds no mixer that is known"
    return None


def channel_norms(group: Group) -> Tensor:
    """L2 norm of each channel's producer and consumer slices: (size,), fp32."""
    return sum(view.per_channel(view.tensor.detach().square()) for view in group.scored_views()).sqrt()
