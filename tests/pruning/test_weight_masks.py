import pytest
import torch
from tiny import BIDIRECTIONAL, batch_of, logits_of, make

from mamba_rsst import PruningConfig, find_groups
from mamba_rsst.pruning import apply_weight_masks_, choose_weights, extract_weight_masks, weight_sparsity
from mamba_rsst.pruning.weight_masks import check_weight_sparsity


# The weights of an MLP and of the SSM channels, written down once more and apart from the package's own table.
COVERED = {
    "intermediate_size": ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"),
    "d_inner": (
        *("mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.out_proj.weight"),
        *(f"mixer.{name}{part}" for name in ("conv1d", "conv1d_b") for part in (".weight", ".bias")),
        *("mixer.x_proj.weight", "mixer.x_proj_b.weight"),
    ),
}


def names_of(model, target):
    return [f"backbone.layers.{layer}.{name}" for layer in range(2) for name in COVERED[target]]


def gathered(model, names):
    return torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in names])


@pytest.mark.parametrize("target", sorted(COVERED))
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_smallest_weights_of_all_layers_go(target, sparsity):
    """Against one sort of |w| over the same tensors."""
    model = make("v2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = choose_weights(model, PruningConfig(targets=[target], sparsity=sparsity))
    assert sorted(masks) == sorted(names_of(model, target))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    weights = gathered(model, masks)
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert int((~kept).sum()) == round(sparsity * len(weights))
    if sparsity:
        assert weights[~kept].abs().max() <= weights[kept].abs().min()
    apply_weight_masks_(model, masks)
    assert weight_sparsity(model, [target]) == pytest.approx(sparsity, abs=1 / len(weights))
    after = dict(model.named_parameters())
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name] * masks[name] if name in masks else before[name]), name


def test_per_layer_every_group_loses_the_same_fraction():
    model = make("v2")
    with torch.no_grad():
        model.backbone.layers[0].mlp.fc1.weight.mul_(100)  # globally the other layer would lose nearly all
    shares = {}
    for scope in ("global", "layer"):
        masks = choose_weights(model, PruningConfig(targets=["intermediate_size"], sparsity=0.5, scope=scope))
        shares[scope] = [
            float(torch.cat([m.flatten() for n, m in masks.items() if f"layers.{i}." in n]).float().mean())
            for i in range(2)
        ]
    assert shares["layer"] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert shares["global"][0] > 0.6 > 0.4 > shares["global"][1]


def test_ties_and_random_orders_are_the_same_again():
    model = make("none")
    with torch.no_grad():
        for name in names_of(model, "intermediate_size"):
            dict(model.named_parameters())[name].fill_(0.25)
    config = PruningConfig(targets=["intermediate_size"], sparsity=0.5)
    one, two = (choose_weights(model, config) for _ in range(2))
    kept = torch.cat([mask.flatten() for mask in one.values()])
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert int(kept.sum()) == len(kept) - round(0.5 * len(kept)) and kept[: int(kept.sum())].all()  # the first ones
    random = [
        choose_weights(model, PruningConfig(targets=["d_inner"], importance="random", seed=seed)) for seed in (0, 0, 1)
    ]
    equal = [all(torch.equal(random[0][n], other[n]) for n in other) for other in random]
    assert equal == [True, True, False]


@pytest.mark.parametrize("kind", [*BIDIRECTIONAL, "lm_mlp", "mamba"])
def test_a_sparse_model_is_saved_and_its_masks_are_read_off_again(tmp_path, kind):
    model = make(kind)
    targets = ["d_inner", "d_state"]
    masks = choose_weights(model, PruningConfig(targets=targets, sparsity={"d_inner": 0.8, "d_state": 0.3}))
    apply_weight_masks_(model, masks).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    found = extract_weight_masks(again, targets)
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=0)


def test_a_weight_that_comes_alive_is_found():
    model = make("v2")
    masks = choose_weights(model, PruningConfig(targets=["d_inner"], sparsity=0.5))
    with pytest.raises(ValueError, match="masked out, but not zero"):
        check_weight_sparsity(model, masks)
    apply_weight_masks_(model, masks)
    check_weight_sparsity(model, masks)
    loss = model(**batch_of(model)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match="masked out, but not zero"):
        check_weight_sparsity(model, masks)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(targets=["d_inner"], importance="taylor"), ["'magnitude_l1'", "'taylor'"]),
        (dict(targets=["d_inner"], budget="parameters"), ["'parameters'"]),
        (dict(targets=["num_hidden_layers"], importance=None), ["num_hidden_layers"]),
    ],
)
def test_what_only_channels_can_follow_is_an_error(settings, words):
    with pytest.raises(ValueError) as error:
        choose_weights(make("none"), PruningConfig(**settings))
    assert all(word in str(error.value) for word in words)


def test_masks_that_do_not_fit_are_an_error_and_nothing_is_zeroed():
    model = make("none")
    good = choose_weights(model, PruningConfig(targets=["d_inner"], sparsity=0.5))
    name = "backbone.layers.1.mixer.out_proj.weight"
    for wrong in (
        good | {"nowhere.weight": good[name]},
        good | {name: good[name][:3]},
        good | {name: good[name].float()},
    ):
        with pytest.raises(ValueError, match="nowhere|out_proj"):
            apply_weight_masks_(model, wrong)
    assert weight_sparsity(model, ["d_inner"]) == 0.0
    with torch.no_grad():
        dict(model.named_parameters())[name][0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        choose_weights(model, PruningConfig(targets=["d_inner"]))


def test_every_group_is_covered_by_its_scored_slices_alone():
    """A_log, D and dt_proj are carried: no mask may reach them."""
    model = make("v2")
    masks = choose_weights(model, PruningConfig(targets=["d_inner", "d_state", "dt_rank"], sparsity=0.99))
    assert not [name for name in masks if name.endswith(("A_log", "A_b_log", ".D", ".D_b", "norm.weight"))]
    assert len(find_groups(model, ["d_inner"])) == 2
