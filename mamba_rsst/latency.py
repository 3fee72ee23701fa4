"""Latency as a budget: what any widths would cost on this device, from blocks that were timed at a few of them."""

import copy
import itertools
from dataclasses import dataclass

import torch

from .evaluation import place_of
from .pruning import Masks, PruningConfig, find_groups
from .pruning.budget import step_of
from .pruning.groups import Group, positions_of
from .pruning.masks import kept_widths
from .speed import Latency, compare_latency, prefill_inputs


POINTS = {0: 1, 1: 5, 2: 3}
"""Widths timed in each direction, by how many directions there are; 2 from three on."""


@dataclass(frozen=True, kw_only=True)
class LatencyCost:
    """Masks -> milliseconds of one forward of the model cut by them; made by `latency_cost`.

    Blocks are interpolated linearly between timed widths, and all is scaled so that the uncut model takes what it was
    measured to take.
    """

    groups: list[Group]
    tables: dict[tuple, "_Table"]
    """Kind of block -> its times."""
    kinds: dict[int, tuple]
    """Layer -> its kind."""
    rest: "_Table"
    """What is not in blocks: embeddings, the last norm, the head."""
    scale: float
    measured: Latency
    """Of the uncut model."""

    def __call__(self, masks: Masks) -> float:
        return self.scale * self.estimate(masks)

    def estimate(self, masks: Masks) -> float:
        widths = kept_widths(self.groups, masks)
        blocks, shared, layers = None, {}, {i: {} for i in self.kinds}
        for group in self.groups:
            if group.blocks is not None:
                blocks = masks.get(group.name)
            elif group.layer is None:
                shared[group.target] = widths[group.name]
            else:
                layers[group.layer][group.target] = widths[group.name]
        stays = [i for i in layers if blocks is None or blocks[i]]
        return self.rest.at(shared) + sum(self.tables[self.kinds[i]].at({**layers[i], **shared}) for i in stays)


@dataclass(frozen=True)
class _Table:
    """Times on a grid: axes target -> widths timed, ascending; times one dimension an axis, ms."""

    axes: dict[str, list[int]]
    times: torch.Tensor

    def at(self, widths: dict[str, int]) -> float:
        """Linear between the grid's points in every direction, and beyond them."""
        values = self.times
        for target, points in self.axes.items():
            if len(points) == 1:
                values = values[0]
                continue
            right = min(max(1, sum(p < widths[target] for p in points)), len(points) - 1)
            share = (widths[target] - points[right - 1]) / (points[right] - points[right - 1])
            values = values[right - 1] + share * (values[right] - values[right - 1])
        return float(values)


def latency_cost(
    model,
    config: PruningConfig,
    *,
    batch_size: int = 1,
    seq_len: int = 256,
    rounds: int = 5,
    run_seconds: float = 0.05,
) -> LatencyCost:
    """The `cost` of budget="latency": time blocks of `config.targets` at a few widths, where the model is.

    The forward is a batch of images, or the prefill of a prompt of `seq_len` tokens, in the model's dtype. Blocks and
    all else are built anew from the model's config, with random weights, and take turns with the model itself, so the
    machine's drift hits all alike. Blocks with equal widths outside of the targets share their table.
    """
    groups = find_groups(model, config.targets)
    layers: dict[int, dict[str, Group]] = {}
    for group in find_groups(model):
        if group.layer is not None:
            layers.setdefault(group.layer, {})[group.target] = group
    kinds = {
        i: tuple((t, None if t in config.targets else g.size) for t, g in own.items()) for i, own in layers.items()
    }
    shared = [g for g in groups if g.layer is None and g.blocks is None]
    points = POINTS.get(len(shared) + max(sum(size is None for _, size in kind) for kind in kinds.values()), 2)
    shared_axes = {g.target: _points([g], config, points) for g in shared}
    tokens = seq_len if model.main_input_name == "input_ids" else positions_of(model)["token"]

    timed, places, axes = {"model": model}, {"model": None}, {}
    for kind in dict.fromkeys(kinds.values()):
        free = {t: [own[t] for i, own in layers.items() if kinds[i] == kind] for t, size in kind if size is None}
        axes[kind] = {t: _points(part, config, points) for t, part in free.items()} | shared_axes
        for place in itertools.product(*axes[kind].values()):
            widths = {t: size for t, size in kind if size is not None} | dict(zip(axes[kind], place))
            timed[name := f"{kind} {place}"] = _probe(model, widths, vocabulary=8).backbone.layers[0]
            places[name] = (kind, place)
    small = next(iter(kinds.values()))
    least = {t: size if size is not None else axes[small][t][0] for t, size in small}
    for place in itertools.product(*shared_axes.values()):
        timed[name := f"rest {place}"] = _probe(model, least | dict(zip(shared_axes, place)))
        places[name] = ("rest", place)

    device, dtype = place_of(model)

    def inputs(probe):
        if hasattr(probe, "backbone"):
            made = prefill_inputs(probe, batch_size, seq_len)
            return made(probe) if callable(made) else made
        width = probe.norm.weight.shape[0]
        return {"hidden_states": torch.randn(batch_size, tokens, width, device=device, dtype=dtype)}

    results = compare_latency(timed, inputs, rounds=rounds, run_seconds=run_seconds)
    tables = {}
    for kind, own in {**axes, "rest": shared_axes}.items():
        times = [results[name].low for name, place in places.items() if place and place[0] == kind]
        tables[kind] = _Table(own, torch.tensor(times, dtype=torch.float64).reshape([len(p) for p in own.values()]))
    rest = tables.pop("rest")
    for index, place in enumerate(itertools.product(*shared_axes.values())):  # less the one block of its probe
        block = tables[small].at({**least, **dict(zip(shared_axes, place))})
        flat = rest.times.view(-1)
        flat[index] = max(0.0, float(flat[index]) - block)
    measured = results["model"]
    fields = dict(groups=groups, tables=tables, kinds=kinds, rest=rest, measured=measured)
    return LatencyCost(**fields, scale=measured.low / LatencyCost(**fields, scale=1.0).estimate({}))


def measure_latency(model, *, batch_size: int = 1, seq_len: int = 256, rounds: int = 5) -> Latency:
    """Milliseconds of the forward that `latency_cost` is about."""
    return compare_latency({"model": model}, prefill_inputs(model, batch_size, seq_len), rounds=rounds)["model"]


def _points(groups: list[Group], config: PruningConfig, count: int) -> list[int]:
    """Widths to time: from the least that may stay to the largest there is, multiples of round_to between."""
    most, step = max(g.size for g in groups), step_of(groups[0], config)
    least = min(most, max(step, int(config.floor * most)))
    if count == 1 or least == most:
        return [most]
    between = {least + (most - least) * i / (count - 1) for i in range(1, count - 1)}
    return sorted({least, most, *(min(most, max(least, step * round(w / step))) for w in between)})


def _probe(model, widths: dict[str, int], vocabulary: int | None = None):
    """A model of one block with these widths and random weights, in evaluation mode where `model` is."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    for group in find_groups(model):
        if group.blocks is None and (group.layer is not None or group.target in widths):
            setattr(config, group.config_field, widths.get(group.target, 0))  # 0: this block has no MLP
    if vocabulary is not None and hasattr(config, "vocab_size"):
        config.vocab_size = vocabulary
    device, dtype = place_of(model)
    with torch.random.fork_rng(devices=[]):
        return type(model)(config).to(device, dtype).eval()
