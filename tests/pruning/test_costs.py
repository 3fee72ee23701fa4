"""What a cut model costs: counted from the table, solved for, and found again in the model."""

import copy

import pytest
import torch
from tiny import KINDS, OWN, batch_of, even_masks, make, random_masks

from mamba_rsst import PruningConfig, find_groups, prune_, select_channels, shrink_
from mamba_rsst.evaluation import count_macs_per_item
from mamba_rsst.pruning import BudgetError
from mamba_rsst.pruning.budget import mac_cost, parameter_cost


def positions(batch):
    return {"token": batch["input_ids"].shape[1]} if "input_ids" in batch else None


@pytest.mark.parametrize("kind", OWN)
def test_macs_are_those_that_torch_counts(kind):
    """Whole, and after any cut: single targets, all of them, blocks of different sizes."""
    model = make(kind, num_hidden_layers=3)
    batch = batch_of(model)
    groups = find_groups(model)
    cost = mac_cost(model, groups, positions(batch))
    assert cost({}) == count_macs_per_item(model, batch)
    everything = random_masks(groups)
    for target in (*dict.fromkeys(g.target for g in groups), None):
        masks = {g.name: everything[g.name] for g in groups if target in (None, g.target)}
        cut = shrink_(copy.deepcopy(model), masks)
        assert cost(masks) == count_macs_per_item(cut, batch) < cost({})
        assert parameter_cost(model, groups)(masks) == cut.num_parameters()


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_stock_classes_cost_what_ours_do(kind):
    """Their own fallback computes the scan in other ways; the budget is about the work, not about that."""
    model, ours = make(kind), make("lm")
    assert mac_cost(model, find_groups(model))({}) == mac_cost(ours, find_groups(ours))({})
    masks = even_masks(find_groups(model))
    cut = shrink_(copy.deepcopy(model), masks)
    assert parameter_cost(model, find_groups(model))(masks) == cut.num_parameters()


def test_tied_embeddings_cost_parameters_once_and_macs():
    tied, untied = (make("lm", tie_word_embeddings=tie) for tie in (True, False))
    costs = [[cost(m, find_groups(m))({}) for cost in (parameter_cost, mac_cost)] for m in (tied, untied)]
    assert costs[1][0] - costs[0][0] == 53 * 20 and costs[0][1] == costs[1][1]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("targets", [["d_inner"], ["hidden_size"], ["d_inner", "d_state", "hidden_size"]])
@pytest.mark.parametrize("kind", ["lm_mlp", "v2"])
def test_mac_budget(kind, targets, scope):
    model = make(kind)
    batch = batch_of(model)
    before = count_macs_per_item(model, batch)
    table = prune_(model, PruningConfig(targets=targets, sparsity=0.2, budget="macs", scope=scope, round_to=1))
    left = count_macs_per_item(model, batch) / before
    assert 0.8 - 0.12 < left <= 0.8 and table.mac_reduction >= 0.2
    with pytest.raises(BudgetError, match=r"Cannot remove 99.0% of the macs: with floor=0.1 .* at most [\d.]+% can"):
        prune_(model, PruningConfig(targets=targets, sparsity=0.99, budget="macs", scope=scope, round_to=1))


def test_blocks_under_a_parameter_budget():
    """Which block leaves matters: they are of different sizes."""
    model = make("lm", num_hidden_layers=4, d_inner=[46, 10, 60, 20])
    config = PruningConfig(targets=["num_hidden_layers"], sparsity=0.3, budget="parameters", importance="random")
    before = model.num_parameters()
    for seed in range(4):
        cut = copy.deepcopy(model)
        masks = select_channels(cut, PruningConfig(**{**vars(config), "seed": seed}))
        shrink_(cut, masks)
        assert cut.num_parameters() <= 0.7 * before
    dense = {"model:num_hidden_layers": 6}
    with pytest.raises(ValueError, match='Rounds that remove blocks need budget="channels"'):
        select_channels(model, config, dense=dense)


def test_a_cost_of_ones_own():
    """The solver asks for what masks cost, and for nothing else: any unit will do."""
    model = make("v2")
    asked = []

    def milliseconds(masks):
        asked.append(masks)
        return sum(int(m.sum()) ** 2 for m in masks.values())

    config = PruningConfig(sparsity=1 - 1 / 1.5, budget="latency", round_to=1)
    masks = select_channels(model, config, cost=milliseconds)
    whole = 2 * 46**2
    assert 0.9 * whole / 1.5 < milliseconds(masks) <= whole / 1.5
    assert set(asked[0]) == {g.name for g in find_groups(model, ["d_inner"])}
    with pytest.raises(ValueError, match='budget="latency" needs `cost`'):
        select_channels(model, config)


@pytest.mark.parametrize("kind", KINDS)
def test_several_scores_read_the_data_each_from_the_beginning(kind):
    model = make(kind)
    importance = {"d_inner": "wanda", "d_state": "state_energy", "hidden_size": "activation"}
    scope = "global" if kind in OWN else "layer"
    config = PruningConfig(targets=list(importance), importance=importance, round_to=1, scope=scope)
    batches = [batch_of(model, seed=s) for s in range(2)]
    masks = select_channels(model, config, (batch for batch in batches))
    for target, name in importance.items():
        alone = PruningConfig(targets=[target], importance=name, round_to=1, scope=scope)
        for group, mask in select_channels(model, alone, batches).items():
            assert torch.equal(mask, masks[group])
    with pytest.raises(ValueError, match=r"`importance` names \['d_inner'\] but `targets` is \['d_state'\]"):
        PruningConfig(targets=["d_state"], importance={"d_inner": "wanda"})
