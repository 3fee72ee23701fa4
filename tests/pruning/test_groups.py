import copy

import pytest
import torch
from tiny import (
    BIDIRECTIONAL,
    KINDS,
    MIXER_TARGETS,
    MODEL_PAIRS,
    PAIRS,
    WITH_MLP,
    WITH_NORMS,
    batch_of,
    layer_groups,
    logits_of,
    make,
    mixers,
)
from transformers import AutoModelForCausalLM, JambaConfig, Mamba2Config

from mamba_rsst import find_groups
from mamba_rsst.pruning.groups import CARRIED, CONSUMER, LAYOUTS, PRODUCER, TARGETS, channel_norms, layout_of


WIDTH = {"d_inner": 46, "d_state": 7, "dt_rank": 5, "intermediate_size": 33}
# The table of the paper's mixer, written out again by hand: (parameter, axis, first channel, role).
FORWARD = {
    "d_inner": [
        ("in_proj.weight", 0, 0, PRODUCER),
        ("in_proj.weight", 0, 46, PRODUCER),
        ("in_proj.bias", 0, 0, PRODUCER),
        ("in_proj.bias", 0, 46, PRODUCER),
        ("conv1d.weight", 0, 0, PRODUCER),
        ("conv1d.bias", 0, 0, PRODUCER),
        ("x_proj.weight", 1, 0, CONSUMER),
        ("out_proj.weight", 1, 0, CONSUMER),
        ("dt_proj.weight", 0, 0, CARRIED),
        ("dt_proj.bias", 0, 0, CARRIED),
        ("A_log", 0, 0, CARRIED),
        ("D", 0, 0, CARRIED),
    ],
    "d_state": [
        ("x_proj.weight", 0, 5, PRODUCER),
        ("x_proj.weight", 0, 12, CONSUMER),
        ("A_log", 1, 0, CARRIED),
    ],
    "dt_rank": [("x_proj.weight", 0, 0, PRODUCER), ("dt_proj.weight", 1, 0, CONSUMER)],
}
V2 = {
    "d_inner": [
        ("conv1d_b.weight", 0, 0, PRODUCER),
        ("conv1d_b.bias", 0, 0, PRODUCER),
        ("x_proj_b.weight", 1, 0, CONSUMER),
        ("dt_proj_b.weight", 0, 0, CARRIED),
        ("dt_proj_b.bias", 0, 0, CARRIED),
        ("A_b_log", 0, 0, CARRIED),
        ("D_b", 0, 0, CARRIED),
    ],
    "d_state": [
        ("x_proj_b.weight", 0, 5, PRODUCER),
        ("x_proj_b.weight", 0, 12, CONSUMER),
        ("A_b_log", 1, 0, CARRIED),
    ],
    "dt_rank": [("x_proj_b.weight", 0, 0, PRODUCER), ("dt_proj_b.weight", 1, 0, CONSUMER)],
}
V1 = {"d_inner": [("A_b_log", 0, 0, CARRIED)], "d_state": [("A_b_log", 1, 0, CARRIED)]}
# What FalconMamba's kernels read and its torch path does not: ones, never trained.
FALCON = {
    "d_inner": [("dt_layernorm.weight", 0, 0, CARRIED)],
    "d_state": [("b_layernorm.weight", 0, 0, CARRIED), ("c_layernorm.weight", 0, 0, CARRIED)],
}
MORE = {"v1": V1, "v2": V2, "falcon_mamba": FALCON}


def place_of(view, group):
    """A view as a row of the tables above."""
    (path,) = [path for path, module in group.owner.named_modules() if module is view.module]
    return f"{path}.{view.name}".lstrip("."), view.axis, view.start, view.role


def expected_places(kind, target):
    if target == "intermediate_size":
        return [("fc1.weight", 0, 0, PRODUCER), ("fc1.bias", 0, 0, PRODUCER), ("fc2.weight", 1, 0, CONSUMER)]
    return FORWARD[target] + MORE.get(kind, {}).get(target, [])


@pytest.mark.parametrize("kind, target", PAIRS)
def test_slices_of_a_group(kind, target):
    model = make(kind)
    groups = find_groups(model, [target])
    part = "mlp" if target == "intermediate_size" else "mixer"
    assert [g.name for g in groups] == [f"backbone.layers.{i}.{part}:{target}" for i in range(2)]
    for i, group in enumerate(groups):
        assert (group.layer, group.size, group.target) == (i, WIDTH[target], target)
        assert sorted(place_of(v, group) for v in group.views()) == sorted(expected_places(kind, target))
        for role in (PRODUCER, CONSUMER, CARRIED):
            chosen = {place_of(v, group) for v in group.views(role)}
            assert chosen == {row for row in expected_places(kind, target) if row[3] == role}
        scored = {place_of(v, group) for v in group.scored_views()}
        assert scored == {row for row in expected_places(kind, target) if row[3] != CARRIED}
        for view in group.views():
            assert view.tensor.shape[view.axis] == view.size == WIDTH[target]
            assert view.tensor.data_ptr() == view.of(view.parameter).data_ptr(), "no copy"


@pytest.mark.parametrize("bias", [True, False])
def test_absent_parameters_have_no_slices(bias):
    model = make("v2", use_bias=bias, use_conv_bias=bias)
    (group, _) = find_groups(model, ["d_inner"])
    rows = {place_of(v, group) for v in group.views()}
    gone = {"in_proj.bias", "conv1d.bias", "conv1d_b.bias"}
    assert rows == {row for row in expected_places("v2", "d_inner") if bias or row[0] not in gone}


WITH_STREAM = [pair for pair in MODEL_PAIRS if pair[1] == "hidden_size"]


@torch.no_grad()
def permute_(group, order, without=None):
    for i, view in enumerate(group.views()):
        if i != without:
            view.tensor.copy_(view.tensor.index_select(view.axis, order))


def cycle(size):
    """A permutation that leaves nothing where it was."""
    order = torch.randperm(size)
    shifted = torch.empty_like(order)
    shifted[order] = order.roll(1)
    return shifted


@pytest.mark.parametrize("kind, target", [*PAIRS, *WITH_STREAM])
def test_permuting_a_group_changes_nothing(kind, target):
    model = make(kind)
    before = logits_of(model)
    for group in find_groups(model, [target]):
        permute_(group, cycle(group.size))
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, target", [*PAIRS, *WITH_STREAM])
def test_permuting_all_but_one_slice_does(kind, target):
    model = make(kind)
    before = logits_of(model)
    for number, group in enumerate(find_groups(model, [target])):
        for i, view in enumerate(group.views()):
            if "layernorm" in place_of(view, group)[0]:
                assert (view.parameter == 1).all() and kind == "falcon_mamba"
                continue
            changed = copy.deepcopy(model)
            permute_(find_groups(changed, [target])[number], cycle(group.size), without=i)
            moved = (logits_of(changed) - before).abs().max()
            assert moved > 2e-3, f"{place_of(view, group)} of {group.name} does not matter: {moved:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_axis_belongs_to_a_group(kind):
    """All sizes differ, so an axis that no slice covers shows by its size."""
    model = make(kind)
    covered = {}
    for group in layer_groups(model):
        for view in group.views():
            key = (id(view.parameter), view.axis)
            covered.setdefault(key, torch.zeros(view.parameter.shape[view.axis], dtype=torch.int))
            covered[key][view.start : view.start + view.size] += 1
    free = {20, 3, 1}  # hidden_size, the convolution's taps, its one input channel a group
    owners = [*mixers(model), *(layer.mlp for layer in model.backbone.layers if getattr(layer, "mlp", None))]
    assert len(owners) == (4 if kind in WITH_MLP else 2)
    for owner in owners:
        for name, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
            for axis, size in enumerate(tensor.shape):
                count = covered.pop((id(tensor), axis), None)
                if count is None:
                    assert size in free, f"axis {axis} of {name} ({size}) is in no group"
                else:
                    assert (count == 1).all(), f"axis {axis} of {name} is not covered once: {count.tolist()}"
    assert not covered


@pytest.mark.parametrize("kind", KINDS)
def test_silent_producers_or_consumers_silence_a_channel(kind):
    """Either role alone switches a channel off: both give the same logits. Carried slices then do not matter."""
    model = make(kind)
    for target in (*MIXER_TARGETS, *(["intermediate_size"] if kind in WITH_MLP else [])):
        results = []
        for role in (PRODUCER, CONSUMER):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for group in find_groups(changed, [target]):
                    for view in group.views(role):
                        view.tensor.narrow(view.axis, 1, 2).zero_()
                    if kind not in WITH_NORMS:
                        for view in group.views(CARRIED):
                            view.tensor.narrow(view.axis, 1, 2).add_(0.5)
            results.append(logits_of(changed))
        if kind in WITH_NORMS and target != "d_inner":
            continue  # its norms over the states and the rank let one channel's size reach the others
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
        assert (results[0] - logits_of(model)).abs().max() > 1e-3


@pytest.mark.parametrize("kind, target", PAIRS)
def test_channel_norms(kind, target):
    model = make(kind)
    for group in find_groups(model, [target]):
        squares = torch.zeros(group.size)
        parameters = dict(group.owner.named_parameters())
        for name, axis, start, role in expected_places(kind, target):
            if role != CARRIED:
                for c in range(group.size):
                    squares[c] += parameters[name].detach().select(axis, start + c).square().sum()
        torch.testing.assert_close(channel_norms(group), squares.sqrt())


def test_norms_of_bf16_weights_are_summed_in_fp32():
    model = make("v2").bfloat16()
    for group in find_groups(model):
        norms = channel_norms(group)
        assert norms.dtype == torch.float32
        exact = sum(v.per_channel(v.tensor.detach().double().square()) for v in group.scored_views()).sqrt()
        torch.testing.assert_close(norms, exact.float(), rtol=4e-3, atol=0)  # the squares are rounded to 8 bits


def test_views_follow_a_change_of_parameter():
    """A group holds no tensors: what it gives is what the model holds now."""
    model = make("v2")
    (group, _) = find_groups(model, ["d_inner"])
    model.backbone.layers[0].mixer.D = torch.nn.Parameter(torch.full((46,), 3.0))
    (view,) = [v for v in group.views() if v.name == "D"]
    assert (view.tensor == 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_told_apart(kind):
    model = make(kind)
    names = {layout_of(m).name for m in model.modules() if layout_of(m)}
    assert (
        names - {"a model's residual stream"}
        == {
            **dict.fromkeys(BIDIRECTIONAL, {"mamba_rsst mixer", "mamba_rsst MLP"}),
            "lm": {"mamba_rsst mixer"},
            "lm_mlp": {"mamba_rsst mixer", "mamba_rsst MLP"},
            "lm_norms": {"mamba_rsst mixer with norms"},
            "mamba": {"transformers' Mamba mixer"},
            "falcon_mamba": {"transformers' FalconMamba mixer"},
        }[kind]
    )
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


def test_all_targets_by_default_in_the_order_of_the_modules():
    names = [g.name.removeprefix("backbone.layers.") for g in find_groups(make("v2"))]
    assert names[:2] == ["model:hidden_size", "model:num_hidden_layers"]
    assert names[2:] == [
        f"{i}.{name}"
        for i in range(2)
        for name in ("mixer:d_inner", "mixer:d_state", "mixer:dt_rank", "mlp:intermediate_size")
    ]
    assert [g.target for g in layer_groups(make("mamba"))] == [*MIXER_TARGETS] * 2
    assert set(TARGETS) == {*WIDTH, "hidden_size", "num_hidden_layers"}
    assert [(g.layer, g.target) for g in find_groups(make("v2"), "d_state")] == [(0, "d_state"), (1, "d_state")]


def test_layers_without_an_mlp():
    model = make("v2", num_hidden_layers=3, intermediate_size=[33, 0, 17])
    groups = find_groups(model, ["intermediate_size"])
    assert [(g.layer, g.size) for g in groups] == [(0, 33), (2, 17)]


@pytest.mark.parametrize(
    "targets, message",
    [
        (["d_iner"], r"Unknown target 'd_iner'; choose from \['hidden_size', 'num_hidden_layers', 'd_inner',"),
        ("vocab_size", "Unknown target 'vocab_size'; choose from"),
        ([], "`targets` must name each of one or more of"),
        (["d_inner", "d_inner"], "`targets` must name each of one or more of .* once, got"),
    ],
)
def test_wrong_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        find_groups(make("v2"), targets)


@pytest.mark.parametrize("kind", ["v2", *(kind for kind in KINDS if kind not in WITH_MLP)])
def test_a_target_that_the_model_lacks(kind):
    model = make(kind, **(dict(intermediate_size=0) if kind == "v2" else {}))
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"{name} has no 'intermediate_size' to prune; it has .*d_inner"):
        find_groups(model, ["d_inner", "intermediate_size"])
    assert {g.target for g in layer_groups(model)} == set(MIXER_TARGETS)


def test_a_model_without_widths():
    with pytest.raises(ValueError, match="Linear has no layer with a prunable width; known are .*mamba_rsst mixer"):
        find_groups(torch.nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            JambaConfig(
                vocab_size=20, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, attn_layer_offset=1, attn_layer_period=2, num_experts=1, mamba_dt_rank=3,
            ),
            "its config has no 'state_size'",
        ),
        (
            Mamba2Config(
                vocab_size=20, hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=2, state_size=8, n_groups=1
            ),
            "backbone.layers.0 holds no mixer that is known",
        ),
    ],
)  # fmt: skip
def test_models_that_only_look_alike_are_refused(config, reason):
    model = AutoModelForCausalLM.from_config(config)
    for targets in (TARGETS, ["d_state"], ["hidden_size"], ["num_hidden_layers"]):
        with pytest.raises(
            ValueError, match=f"{type(model).__name__} is no architecture that can be pruned: {reason}"
        ):
            find_groups(model, targets)


def test_gradient_reaches_parameters_through_the_views():
    model = make("v2")
    model(**batch_of(model)).loss.backward()
    for group in find_groups(model):
        for view in group.views():
            assert view.of(view.parameter.grad).shape == view.tensor.shape
