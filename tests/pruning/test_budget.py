import copy
import inspect
import math

import numpy as np
import pytest
import torch
from tiny import KINDS, MIXER_TARGETS, make

from mamba_rsst import PruningConfig, find_groups, select_channels, shrink_
from mamba_rsst.pruning import BudgetError, budget
from mamba_rsst.pruning.budget import allocate, count_parameters, snap, top_channels


WIDTHS = {"d_inner": 46, "d_state": 7, "dt_rank": 5, "intermediate_size": 33}
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return make("v2", num_hidden_layers=LAYERS)


def kept(masks):
    return [int(mask.sum()) for mask in masks.values()]


def select(model, **settings):
    return select_channels(model, PruningConfig(**{"round_to": 1, "floor": 0.0, **settings}))


def uneven_scores(groups, seed=0):
    """Layers whose scores differ in size and shape."""
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: (torch.rand(g.size, generator=generator) + 0.01) ** (1 + i) * 10.0**i for i, g in enumerate(groups)
    }


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("target", WIDTHS)
def test_sparsity_is_exact(model, target, sparsity, scope):
    """As near as whole channels allow, and never fewer removed than asked for."""
    settings = dict(targets=[target], sparsity=sparsity, scope=scope)
    if (1 - sparsity) * WIDTHS[target] < 1:  # one channel a layer is more than the budget
        with pytest.raises(BudgetError):
            select(model, **settings)
        return
    masks = select(model, **settings)
    if scope == "global":
        assert sum(kept(masks)) == math.floor((1 - sparsity) * WIDTHS[target] * LAYERS + 1e-6)
    else:
        assert kept(masks) == [math.floor((1 - sparsity) * WIDTHS[target] + 1e-6)] * LAYERS
    assert all(mask.dtype == torch.bool and len(mask) == WIDTHS[target] for mask in masks.values())


def test_sparsity_is_exact_where_floats_are_not():
    """(1 - 0.9) * 200 is 19.999999999999996."""
    assert sum(kept(select(make("v2", num_hidden_layers=LAYERS, d_inner=50), sparsity=0.9))) == 20


@pytest.mark.parametrize("normalization", ["mean", "max", "none"])
def test_the_best_channels_stay(model, normalization):
    """Global: no channel that goes has a higher normalised score than one that stays."""
    groups = find_groups(model, ["d_inner"])
    scores = uneven_scores(groups)
    config = PruningConfig(sparsity=0.5, round_to=1, floor=0.0, normalization=normalization)
    masks = allocate(model, groups, scores, config)
    scale = {"mean": torch.mean, "max": torch.max, "none": lambda v: 1.0}[normalization]
    free = [g for g in groups if masks[g.name].sum() > 1]  # the others keep one in any case
    values = torch.cat([scores[g.name] / scale(scores[g.name]) for g in free])
    mask = torch.cat([masks[g.name] for g in free])
    assert values[mask].min() > values[~mask].max()
    assert sum(kept(masks)) == 92
    assert max(kept(masks)) - min(kept(masks)) > 5, "layers end with different widths"
    if normalization == "none":
        assert kept(masks)[0] == 1 and kept(masks)[3] > 30, "raw scores empty the layers of small ones"


def test_each_layer_keeps_its_own_best(model):
    groups = find_groups(model, ["d_inner"])
    scores = uneven_scores(groups)
    for scope in ("global", "layer"):
        masks = allocate(model, groups, scores, PruningConfig(sparsity=0.5, round_to=4, scope=scope))
        for g in groups:
            mask = masks[g.name]
            assert scores[g.name][mask].min() > scores[g.name][~mask].max()


@pytest.mark.parametrize("floor, least", [(0.0, 1), (0.1, 5), (0.25, 12), (0.5, 23)])
def test_floor(model, floor, least):
    groups = find_groups(model, ["d_inner"])
    scores = uneven_scores(groups)
    masks = allocate(model, groups, scores, PruningConfig(sparsity=0.5, round_to=1, floor=floor, normalization="none"))
    assert min(kept(masks)) == least and sum(kept(masks)) == 92


@pytest.mark.parametrize("target", WIDTHS)
def test_no_layer_is_emptied(model, target):
    """Not even where its scores are nothing beside the others'."""
    groups = find_groups(model, [target])
    scores = uneven_scores(groups)
    scores[groups[1].name] *= 1e-12
    config = PruningConfig(targets=[target], sparsity=0.5, floor=0, round_to=1, normalization="none")
    masks = allocate(model, groups, scores, config)
    assert kept(masks)[1] == 1 and sum(kept(masks)) == 2 * WIDTHS[target]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("round_to", [2, 4, 8, 16])
def test_widths_are_multiples(model, round_to, scope):
    groups = find_groups(model, ["d_inner"])
    config = PruningConfig(sparsity=0.6, round_to=round_to, scope=scope)
    masks = allocate(model, groups, uneven_scores(groups), config)
    assert all(width % round_to == 0 or width == 46 for width in kept(masks))
    assert 0.4 * 184 - round_to * (LAYERS if scope == "layer" else 1) < sum(kept(masks)) <= 0.4 * 184
    if scope == "layer":
        assert len(set(kept(masks))) == 1


@pytest.mark.parametrize(
    "count, size, dense, floor, step, width",
    [
        (46, 46, 46, 0.1, 8, 46),  # loses nothing, keeps its width
        (45, 46, 46, 0.1, 8, 46),  # 48 is more than there are
        (43, 46, 46, 0.1, 8, 40),
        (20.4, 46, 46, 0.1, 8, 24),
        (0, 46, 46, 0.1, 8, 8),
        (0, 46, 46, 0.0, 1, 1),
        (0, 46, 46, 0.5, 8, 24),
        (0, 46, 460, 0.1, 8, 46),  # the floor is of the dense width: all that is left
        (30, 46, 46, 1.0, 1, 46),
        (4, 7, 7, 0.3, 1, 4),
        (0, 100, 100, 0.07, 1, 7),  # 0.07 * 100 is 7.000000000000001
        (43, 43, 43, 0.1, 8, 43),  # whole, though 40 is the nearest multiple
    ],
)
def test_snap(count, size, dense, floor, step, width):
    config = PruningConfig(floor=floor, round_to=step)
    assert snap(count, size, dense, config) == width


def test_targets_one_by_one(model):
    masks = select(model, targets=["d_inner", "d_state", "intermediate_size"], sparsity=0.5)
    totals = {t: sum(int(m.sum()) for name, m in masks.items() if name.endswith(t)) for t in WIDTHS}
    assert totals == {"d_inner": 92, "d_state": 14, "dt_rank": 0, "intermediate_size": 66}


def test_sparsity_per_target(model):
    masks = select(model, targets=["d_inner", "d_state"], sparsity={"d_inner": 0.25, "d_state": 0.5})
    totals = {t: sum(int(m.sum()) for name, m in masks.items() if name.endswith(t)) for t in WIDTHS}
    assert totals == {"d_inner": 138, "d_state": 14, "dt_rank": 0, "intermediate_size": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_counted_parameters_are_those_after_the_cut(kind):
    """Overlaps of several targets in one parameter, and tied embeddings, count once."""
    model = make(kind)
    groups = find_groups(model)
    whole = {g.name: g.size for g in groups}
    assert count_parameters(model, groups, whole) == model.num_parameters()
    widths = {"d_inner": 19, "d_state": 3, "dt_rank": 2, "intermediate_size": 14}
    widths |= {"hidden_size": 8, "num_hidden_layers": 1}
    for targets in (["d_inner"], ["d_state"], ["hidden_size"], MIXER_TARGETS, [g.target for g in groups]):
        chosen = [g for g in groups if g.target in targets]
        cut = copy.deepcopy(model)
        shrink_(cut, {g.name: torch.arange(g.size) < widths[g.target] for g in chosen})
        counted = count_parameters(model, chosen, {g.name: widths[g.target] for g in chosen})
        assert counted == sum(p.numel() for p in cut.parameters())
        grown = find_groups(cut)
        if "num_hidden_layers" not in targets:
            assert count_parameters(cut, grown, whole) == model.num_parameters(), "and back, for rounds"


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("targets", [["d_inner"], ["d_inner", "intermediate_size"], ["d_inner", "d_state", "dt_rank"]])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_parameter_budget(model, targets, sparsity, scope):
    masks = select(model, targets=targets, sparsity=sparsity, budget="parameters", scope=scope)
    cut = shrink_(copy.deepcopy(model), masks)
    left = cut.num_parameters() / model.num_parameters()
    assert left <= 1 - sparsity
    largest = 2 * 20 + 2 + 20 + 2 * (3 + 1 + 19 + 5 + 1 + 7 + 1)  # of one d_inner channel
    slack = largest * (2 * LAYERS if scope == "layer" else 2) / model.num_parameters()
    assert left >= 1 - sparsity - slack


def test_parameter_budget_of_tied_embeddings():
    model = make("mamba", tie_word_embeddings=True)
    masks = select(model, sparsity=0.3, budget="parameters", scope="layer")
    cut = shrink_(copy.deepcopy(model), masks)
    assert 0.65 < cut.num_parameters() / model.num_parameters() <= 0.7


def test_layer_scope_gives_equal_counts(model):
    groups = find_groups(model, ["d_inner"])
    masks = allocate(model, groups, uneven_scores(groups), PruningConfig(sparsity=0.37, round_to=1, scope="layer"))
    assert kept(masks) == [28] * LAYERS


def test_layer_scope_with_layers_of_other_sizes():
    model = make("v2", d_inner=[46, 30])
    masks = select(model, sparsity=0.5, scope="layer")
    assert kept(masks) == [23, 15]


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_ties(model, scope, sparsity):
    """Equal scores: exactly as many go as asked for, the same ones every time, and layers share the loss."""
    groups = find_groups(model, ["d_inner"])
    scores = {g.name: torch.ones(g.size) for g in groups}
    config = PruningConfig(sparsity=sparsity, round_to=1, scope=scope)
    masks = allocate(model, groups, scores, config)
    again = allocate(model, groups, scores, config)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert max(kept(masks)) - min(kept(masks)) <= 1
    if scope == "global":
        assert sum(kept(masks)) == math.floor((1 - sparsity) * 184 + 1e-6)
    for mask in masks.values():
        assert torch.equal(mask, torch.arange(46) < mask.sum())


def test_many_dead_channels(model):
    """Channels that score zero are ties, too: a third goes, though half of them are dead."""
    groups = find_groups(model, ["d_inner"])
    scores = uneven_scores(groups)
    for values in scores.values():
        values[::2] = 0.0
    masks = allocate(model, groups, scores, PruningConfig(sparsity=1 / 3, round_to=1))
    assert sum(kept(masks)) == 122
    assert all(masks[g.name][1::2].all() for g in groups), "only dead ones go"


def test_scores_of_any_size(model):
    """Twenty orders of magnitude between channels, and still exact."""
    groups = find_groups(model, ["d_inner"])
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: 10 ** (20 * torch.rand(g.size, generator=generator) - 25) for g in groups}
    masks = allocate(model, groups, scores, PruningConfig(sparsity=0.5, round_to=1, floor=0.0, normalization="none"))
    values, mask = torch.cat(list(scores.values())), torch.cat(list(masks.values()))
    assert mask.sum() == 92 and values[mask].min() > values[~mask].max()


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_scores_that_are_not_positive(model, value):
    groups = find_groups(model, ["d_inner"])
    scores = {g.name: torch.linspace(value - 1, value, g.size) for g in groups}
    masks = allocate(model, groups, scores, PruningConfig(sparsity=0.5, round_to=1))
    assert kept(masks) == [23] * LAYERS
    assert all(torch.equal(mask, torch.arange(46) >= 23) for mask in masks.values())


def test_top_channels():
    scores = torch.tensor([0.5, 2.0, 0.5, 0.1, 0.5])
    assert top_channels(scores, 2).tolist() == [True, True, False, False, False]
    assert top_channels(scores, 3).tolist() == [True, True, True, False, False]
    assert top_channels(scores, 5).all() and not top_channels(scores, 0).any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_budget_that_cannot_be_met(model, scope):
    with pytest.raises(BudgetError, match=r"Cannot remove 90.0% of the d_inner channels.*floor=0.25 .* at most 73.9%"):
        select(model, sparsity=0.9, floor=0.25, scope=scope)  # 12 of 46 stay
    with pytest.raises(BudgetError, match=r"Cannot remove 95.0% of the d_inner channels.*round_to=8 at most 82.6%"):
        select(model, sparsity=0.95, round_to=8, scope=scope)
    with pytest.raises(BudgetError, match=r"Cannot remove 90.0% of the parameters.*at most (\d+\.\d)% can go"):
        select(model, targets=["d_state"], sparsity=0.9, budget="parameters", scope=scope)


def test_the_limit_that_the_error_names_can_be_met(model):
    with pytest.raises(BudgetError) as caught:
        select(model, targets=["d_state"], sparsity=0.9, budget="parameters")
    limit = float(str(caught.value).split("at most ")[1].split("%")[0]) / 100
    masks = select(model, targets=["d_state"], sparsity=limit - 0.001, budget="parameters")
    assert kept(masks) == [1] * LAYERS
    assert isinstance(caught.value, ValueError)


def test_rounding_to_more_than_there_is(model):
    with pytest.raises(ValueError, match="`round_to` is 8 but 'backbone.layers.0.mixer:d_state' has only 7 channels"):
        select(model, targets=["d_inner", "d_state"], round_to=8)
    with pytest.raises(ValueError, match="`round_to` is 64 but .* choose at most 46"):
        select(model, round_to=64)


def test_rounds_are_fractions_of_the_dense_widths():
    """Cumulative: 30 % in the first round and 51 % after the second, not 30 % of what is left."""
    model = make("v2", num_hidden_layers=LAYERS)
    dense = {g.name: g.size for g in find_groups(model, ["d_inner"])}
    for sparsity, left in ((0.3, 128), (0.51, 90), (0.657, 63)):
        config = PruningConfig(sparsity=sparsity, round_to=1, floor=0.25)
        masks = select_channels(model, config, dense=dense)
        assert sum(kept(masks)) == left
        assert min(kept(masks)) >= 12, "the floor is of the dense width, too"
        shrink_(model, masks)
    masks = select_channels(model, PruningConfig(sparsity=0.5, round_to=1), dense=dense)
    assert sum(kept(masks)) == 63, "met already: nothing goes"


def test_rounds_with_a_parameter_budget():
    model = make("v2", num_hidden_layers=LAYERS)
    whole = model.num_parameters()
    dense = {g.name: g.size for g in find_groups(model, ["d_inner"])}
    for sparsity in (0.2, 0.4):
        config = PruningConfig(sparsity=sparsity, round_to=1, budget="parameters")
        shrink_(model, select_channels(model, config, dense=dense))
        assert 1 - sparsity - 0.01 < model.num_parameters() / whole <= 1 - sparsity


def refill_by_hand(groups, keep_total, fillback):
    """Refill's widths: a global magnitude mask, densities a layer, and the fill-back; the largest mask that fits."""
    weights = []
    for g in groups:
        parts = [v.tensor.detach().abs().flatten().numpy() for v in g.scored_views()]
        weights.append(np.sort(np.concatenate(parts)))
    every = np.unique(np.concatenate(weights))

    def widths(threshold):
        out = []
        for g, w in zip(groups, weights):
            kept = g.size * (len(w) - np.searchsorted(w, threshold, side="left")) / len(w)
            kept += fillback * (g.size - kept)
            out.append(min(g.size, max(1, int(np.round(kept)))))
        return out

    low, high = 0, len(every) - 1  # the first threshold, of all weights there are, whose widths fit
    while low < high:
        middle = (low + high) // 2
        if sum(widths(every[middle])) <= keep_total:
            high = middle
        else:
            low = middle + 1
    return widths(every[low])


@pytest.mark.parametrize("fillback", [0.0, 0.2])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("target", ["d_inner", "intermediate_size"])
def test_refill_allocates_by_surviving_weights(target, sparsity, fillback):
    model = make("v2", num_hidden_layers=LAYERS)
    groups = find_groups(model, [target])
    with torch.no_grad():
        for i, group in enumerate(groups):
            for view in group.scored_views():
                view.tensor.mul_(1 + 0.4 * i)
    settings = dict(targets=[target], sparsity=sparsity, allocation="weights", fillback_rate=fillback)
    masks = select(model, **settings)
    total = (1 - sparsity) * WIDTHS[target] * LAYERS
    assert kept(masks) == refill_by_hand(groups, total + 1e-6, fillback)
    assert kept(masks)[0] < kept(masks)[-1], "layers of larger weights keep more"
    assert total - LAYERS < sum(kept(masks)) <= total + 1e-6
    by_score = select(model, **{**settings, "allocation": "scores", "fillback_rate": 0.0})
    assert kept(by_score) != kept(masks)
    scores = {g.name: sum(v.per_channel(v.tensor.detach().square()) for v in g.scored_views()) for g in groups}
    for name, mask in masks.items():  # which channels: the criterion's best
        assert scores[name][mask].min() > scores[name][~mask].max()


def test_refill_evens_out_with_fill_back():
    model = make("v2", num_hidden_layers=LAYERS)
    groups = find_groups(model, ["d_inner"])
    with torch.no_grad():
        for i, group in enumerate(groups):
            for view in group.scored_views():
                view.tensor.mul_(1 + i)
    spread = []
    for rate in (0.0, 0.2, 0.4):
        widths = kept(select(model, sparsity=0.5, allocation="weights", fillback_rate=rate))
        spread.append(max(widths) - min(widths))
        assert 88 <= sum(widths) <= 92
    assert spread[0] > spread[1] > spread[2]


def test_fill_back_that_leaves_too_much(model):
    """Given back: 60 % of what goes, so at most 40 % can; more is an error, not a collapse to the floor."""
    with pytest.raises(BudgetError, match="Cannot remove 70.0% of the d_inner channels: .*fillback_rate=0.6"):
        select(model, sparsity=0.7, allocation="weights", fillback_rate=0.6)
    masks = select(model, sparsity=0.35, allocation="weights", fillback_rate=0.6)
    assert 184 * 0.65 - LAYERS <= sum(kept(masks)) <= 184 * 0.65


def test_large_models_need_no_quantile():
    """torch.quantile refuses more than 16 M elements; and 20 M weights in one group are no trouble here."""
    assert "quantile" not in inspect.getsource(budget).replace("torch.quantile", "")
    model = make("v2", num_hidden_layers=1, d_inner=1_000, intermediate_size=410_000)
    groups = find_groups(model, ["intermediate_size"])
    weights = sum(v.tensor.numel() for v in groups[0].scored_views())
    assert weights > 2**24
    masks = select(model, targets=["intermediate_size"], sparsity=0.5)
    assert sum(kept(masks)) == 205_000


def test_masks_lie_on_the_cpu_and_own_their_memory(model):
    masks = select(model, targets=["d_inner", "d_state"], sparsity=0.5)
    assert all(mask.device.type == "cpu" for mask in masks.values())
    assert len({mask.data_ptr() for mask in masks.values()}) == len(masks)
