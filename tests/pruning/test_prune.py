import copy

import pytest
import torch
from tiny import KINDS, MIXER_TARGETS, OWN, WITH_MLP, batch_of, layer_groups, logits_of, make

from mamba_rsst import PruningConfig, apply_masks_, find_groups, prune_, select_channels, shrink_


ALL = (*MIXER_TARGETS, "intermediate_size")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["magnitude_l1", "magnitude_l2", "random", "taylor", "activation"])
def test_from_choice_to_cut(kind, importance, tmp_path):
    """Chosen, masked, cut, saved and reloaded: one function."""
    model = make(kind)
    scope = "global" if kind in OWN else "layer"
    targets = ALL if kind in WITH_MLP else MIXER_TARGETS
    config = PruningConfig(targets=targets, sparsity=0.4, scope=scope, importance=importance, round_to=1)
    batches = [batch_of(model)]
    masked = copy.deepcopy(model)
    apply_masks_(find_groups(masked), select_channels(masked, config, batches))
    table = prune_(model, config, calibration=batches)
    torch.testing.assert_close(logits_of(model), logits_of(masked), atol=1e-5, rtol=1e-5)
    assert all(abs(value - 0.4) < 0.11 and value >= 0.4 - 1e-9 for value in table.sparsity.values())
    assert table.parameters_after == model.num_parameters()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), logits_of(model))


def test_choosing_leaves_the_model_alone():
    model = make("v2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = PruningConfig(targets=ALL, round_to=1)
    masks = select_channels(model, config)
    table = prune_(model, config, dry_run=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.d_inner == 46
    assert [row["after"] for row in table] == [int(mask.sum()) for mask in masks.values()]
    assert [row["before"] for row in table] == [46, 7, 5, 33] * 2
    done = prune_(model, config)
    assert list(done) == list(table) and str(done) == str(table)
    assert [g.size for g in layer_groups(model)] == [row["after"] for row in table]


def test_the_table():
    model = make("v2")
    whole = model.num_parameters()
    sparsity = {"d_inner": 0.5, "d_state": 0.25}
    table = prune_(model, PruningConfig(targets=["d_inner", "d_state"], sparsity=sparsity, round_to=1))
    assert table.sparsity == pytest.approx({"d_inner": 0.5, "d_state": 1 - 10 / 14})
    assert (table.parameters_before, table.parameters_after) == (whole, model.num_parameters())
    assert table.param_reduction == pytest.approx(1 - model.num_parameters() / whole)
    text = str(table)
    assert "channel sparsity d_inner: 50.0%" in text and "channel sparsity d_state: 28.6%" in text
    assert f"parameters {whole:,} -> {model.num_parameters():,}" in text
    assert len(text.splitlines()) == 1 + 4 + 2 + 1
    assert set(table[0]) == {"layer", "target", "before", "after"}


def test_masks_of_a_choice_can_be_used_again():
    model = make("v2")
    masks = select_channels(model, PruningConfig(targets=ALL, round_to=1))
    first, second = shrink_(copy.deepcopy(model), masks), shrink_(copy.deepcopy(model), masks)
    assert torch.equal(logits_of(first), logits_of(second))


@pytest.mark.parametrize("importance", ["magnitude_l1", "magnitude_l2", "taylor", "activation"])
@pytest.mark.parametrize("target", ALL)
def test_planted_weaklings_are_found(target, importance):
    """Channels that do next to nothing are the ones that go, and the logits hardly notice."""
    model = make("v2")
    planted = {}
    for group in find_groups(model, [target]):
        planted[group.name] = torch.randperm(group.size) >= 2
        with torch.no_grad():
            for view in group.scored_views():
                view.tensor.mul_(torch.where(view.along(planted[group.name]), 1.0, 1e-3))
    before = logits_of(model)
    config = PruningConfig(targets=[target], sparsity=2 / group.size, importance=importance, round_to=1)
    masks = select_channels(model, config, [batch_of(model)])
    assert all(torch.equal(masks[name], planted[name]) for name in planted)
    torch.testing.assert_close(logits_of(shrink_(model, masks)), before, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": 1.0}, r"`sparsity` must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "`sparsity` must be in"),
        ({"sparsity": True}, "`sparsity` must be in"),
        ({"sparsity": "0.5"}, "`sparsity` must be in"),
        ({"sparsity": {"d_state": 0.5}}, r"`sparsity` names \['d_state'\] but `targets` is \['d_inner'\]"),
        ({"sparsity": {"d_inner": 1.5}}, "`sparsity` must be in"),
        ({"sparsity": {"d_inner": 0.5}, "budget": "parameters"}, 'goes with budget="channels" only'),
        ({"targets": ["d_iner"]}, "Unknown target 'd_iner'; choose from"),
        ({"targets": []}, "`targets` must name"),
        ({"scope": "layerwise"}, r"`scope` must be one of \['global', 'layer'\], got 'layerwise'"),
        ({"budget": "flops"}, r"`budget` must be one of \['channels', 'parameters', 'macs', 'latency'\], got 'flops'"),
        ({"normalization": "median"}, "`normalization` must be one of"),
        ({"allocation": "density"}, "`allocation` must be one of"),
        ({"importance": "tailor"}, "Unknown importance 'tailor'; choose from"),
        ({"round_to": 0}, "`round_to` must be an integer >= 1, got 0"),
        ({"round_to": 8.0}, "`round_to` must be an integer >= 1, got 8.0"),
        ({"floor": 1.1}, r"`floor` must be in \[0, 1\], got 1.1"),
        ({"fillback_rate": -1}, r"`fillback_rate` must be in \[0, 1\], got -1"),
        ({"scope": "layer", "allocation": "weights"}, 'it needs scope="global"'),
    ],
    ids=str,
)
def test_settings_that_no_model_could_follow(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**settings)


def test_settings_are_frozen_and_by_name():
    config = PruningConfig(targets="d_inner")
    assert config.targets == ("d_inner",)
    with pytest.raises(AttributeError):
        config.sparsity = 0.1
    with pytest.raises(TypeError):
        PruningConfig(["d_inner"])
    with pytest.raises(TypeError, match="sparsty"):
        PruningConfig(sparsty=0.5)


def test_a_target_that_the_model_lacks():
    with pytest.raises(ValueError, match="MambaForCausalLM has no 'intermediate_size' to prune"):
        prune_(make("mamba"), PruningConfig(targets=["intermediate_size"]))


def test_a_stock_model_under_global_scope_stays_whole():
    model = make("mamba")
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.mul_(30)  # this layer keeps more
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="holds one `intermediate_size` for all layers.*scope='layer'"):
        prune_(model, PruningConfig(sparsity=0.5, round_to=1, normalization="none"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.intermediate_size == 46
