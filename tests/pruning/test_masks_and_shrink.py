import copy
import itertools

import pytest
import torch
from tiny import (
    BIDIRECTIONAL,
    KINDS,
    LANGUAGE,
    MIXER_TARGETS,
    MODEL_PAIRS,
    OWN,
    PAIRS,
    WITH_MLP,
    batch_of,
    even_masks,
    layer_groups,
    logits_of,
    make,
    mixers,
    perturb_,
    random_masks,
)

from mamba_rsst import MambaForImageClassification, apply_masks_, find_groups, shrink_
from mamba_rsst.pruning.groups import CARRIED, TARGETS


def masks_for(model, targets, seed=0):
    """Uneven masks where the config can hold them."""
    groups = find_groups(model, targets)
    return (random_masks if hasattr(model.config, "set_widths") else even_masks)(groups, seed)


def masked_and_cut(model, masks):
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    apply_masks_(find_groups(masked), masks)
    return masked, shrink_(cut, masks)


def snapshot(model):
    """All that a failed cut could have touched."""
    tensors = {k: (v.shape, v.dtype, v.requires_grad, v.clone()) for k, v in model.named_parameters()}
    return tensors, model.config.to_json_string(), repr(model)


def assert_untouched(model, before):
    tensors, config, text = before
    assert model.config.to_json_string() == config and repr(model) == text
    for name, parameter in model.named_parameters():
        shape, dtype, requires_grad, values = tensors[name]
        assert (parameter.shape, parameter.dtype, parameter.requires_grad) == (shape, dtype, requires_grad), name
        assert torch.equal(parameter, values), name


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind, target", [*PAIRS, *MODEL_PAIRS])
def test_masked_equals_cut(kind, target, seed):
    # Three layers, so that blocks leave at the beginning, in the middle or at the end; the norms' epsilon matters.
    more = dict(num_hidden_layers=3, layer_norm_epsilon=0.1) if (kind, target) in MODEL_PAIRS else {}
    model = make(kind, **more)
    masks = masks_for(model, [target], seed)
    masked, cut = masked_and_cut(model, masks)
    assert (logits_of(masked) - logits_of(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(cut), logits_of(masked), atol=1e-5, rtol=1e-5)


COMBINATIONS = [c for n in (2, 3) for c in itertools.combinations(MIXER_TARGETS, n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [*COMBINATIONS, (*MIXER_TARGETS, "intermediate_size")])
def test_masked_equals_cut_in_several_targets(kind, targets):
    if kind not in WITH_MLP:
        targets = [t for t in targets if t in MIXER_TARGETS]
    model = make(kind)
    masked, cut = masked_and_cut(model, masks_for(model, targets))
    torch.testing.assert_close(logits_of(cut), logits_of(masked), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("overrides", [dict(use_bias=False), dict(use_conv_bias=False), dict(norm="layer")], ids=str)
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_masked_equals_cut_with_other_options(kind, overrides):
    model = make(kind, **overrides)
    masked, cut = masked_and_cut(model, random_masks(find_groups(model)))
    torch.testing.assert_close(logits_of(cut), logits_of(masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_masked_equals_cut_in_fp64(kind):
    """To the last bits: nothing is approximate."""
    model = make(kind, residual_in_fp32=False).double()
    masked, cut = masked_and_cut(model, random_masks(find_groups(model)))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(model).items()}
    torch.testing.assert_close(logits_of(cut, batch), logits_of(masked, batch), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_twice_equals_cutting_once(kind):
    model = make(kind)
    first = masks_for(model, MIXER_TARGETS)
    once, twice = copy.deepcopy(model), shrink_(copy.deepcopy(model), first)
    second = {}
    both = {}
    for name, mask in first.items():
        kept = int(mask.sum())
        inner = torch.ones(kept, dtype=torch.bool)
        inner[0] = kept == 1
        second[name] = inner
        both[name] = mask.clone()
        both[name][mask.nonzero()[:, 0]] = inner
    shrink_(twice, second)
    shrink_(once, both)
    assert [tuple(p.shape) for p in once.parameters()] == [tuple(p.shape) for p in twice.parameters()]
    torch.testing.assert_close(logits_of(once), logits_of(twice), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_equals_reloaded(kind, tmp_path):
    model = make(kind)
    targets = (*MIXER_TARGETS, "intermediate_size") if kind in WITH_MLP else MIXER_TARGETS
    shrink_(model, masks_for(model, targets))
    model.save_pretrained(tmp_path)
    reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is type(model)
    assert not any(info.values()), info
    assert torch.equal(logits_of(reloaded), logits_of(model))
    assert [g.size for g in find_groups(reloaded)] == [g.size for g in find_groups(model)]


@pytest.mark.parametrize("kind", [*LANGUAGE, "mamba", "falcon_mamba"])
def test_a_cut_language_model_generates(kind, tmp_path):
    model = make(kind)
    shrink_(model, masks_for(model, TARGETS)).save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    ids = batch_of(model)["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(reloaded.generate(ids, **options), model.generate(ids, **options))
    full = model(ids).logits[:, -1].argmax(-1)
    assert torch.equal(model.generate(ids, **options)[:, ids.shape[1]], full)


def test_survivors_are_the_same_numbers():
    model = make("v2")
    groups = find_groups(model, ["d_inner"])
    masks = random_masks(groups)
    cut = shrink_(copy.deepcopy(model), masks)
    for old, new, mask in zip(mixers(model), mixers(cut), masks.values()):
        twice = torch.cat([mask, mask])
        assert torch.equal(new.in_proj.weight, old.in_proj.weight[twice])
        assert torch.equal(new.in_proj.bias, old.in_proj.bias[twice])
        assert torch.equal(new.out_proj.weight, old.out_proj.weight[:, mask])
        assert torch.equal(new.out_proj.bias, old.out_proj.bias)
        for s, decay in (("", "A_log"), ("_b", "A_b_log")):
            assert torch.equal(getattr(new, f"conv1d{s}").weight, getattr(old, f"conv1d{s}").weight[mask])
            assert torch.equal(getattr(new, f"x_proj{s}").weight, getattr(old, f"x_proj{s}").weight[:, mask])
            assert torch.equal(getattr(new, f"dt_proj{s}").bias, getattr(old, f"dt_proj{s}").bias[mask])
            assert torch.equal(getattr(new, decay), getattr(old, decay)[mask])


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_follow(kind):
    model = make(kind)
    targets = (*MIXER_TARGETS, "intermediate_size") if kind in WITH_MLP else MIXER_TARGETS
    masks = masks_for(model, targets)
    shrink_(model, masks)
    sizes = {name: int(mask.sum()) for name, mask in masks.items()}
    assert {g.name: g.size for g in layer_groups(model)} == sizes
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), name
            assert module.bias is None or len(module.bias) == module.out_features, name
        if isinstance(module, torch.nn.Conv1d):
            E = module.weight.shape[0]
            assert (module.in_channels, module.out_channels, module.groups) == (E, E, E), name
    for i, mixer in enumerate(mixers(model)):
        E, N, R = (sizes[f"backbone.layers.{i}.mixer:{t}"] for t in MIXER_TARGETS)
        own = kind in OWN
        names = ("d_inner", "d_state", "dt_rank") if own else ("intermediate_size", "ssm_state_size", "time_step_rank")
        assert tuple(getattr(mixer, name) for name in names) == (E, N, R)
        assert mixer.in_proj.weight.shape == (2 * E, 20) and mixer.out_proj.weight.shape == (20, E)
        assert mixer.x_proj.weight.shape == (R + 2 * N, E) and mixer.A_log.shape == (E, N)
        if kind == "falcon_mamba":
            assert [len(getattr(mixer, f"{x}_layernorm").weight) for x in ("dt", "b", "c")] == [E, N, N]
        if own:
            assert [model.config.widths(t)[i] for t in MIXER_TARGETS] == [E, N, R]
        else:
            config = model.config
            assert (config.intermediate_size, config.state_size, config.time_step_rank) == (E, N, R)


def test_config_keeps_one_number_while_layers_agree():
    model = make("v2")
    groups = layer_groups(model)
    shrink_(model, even_masks(groups))
    config = model.config
    assert (config.d_inner, config.d_state, config.dt_rank, config.intermediate_size) == (19, 3, 2, 14)
    shrink_(model, {"backbone.layers.1.mixer:d_inner": torch.arange(19) < 11})
    assert (config.d_inner, config.d_state) == ([19, 11], 3)
    shrink_(model, {"backbone.layers.0.mixer:d_inner": torch.arange(19) < 11})
    assert config.d_inner == 11


def test_layers_without_an_mlp_stay_without(tmp_path):
    model = make("v2", num_hidden_layers=3, intermediate_size=[33, 0, 17])
    masks = random_masks(find_groups(model, ["intermediate_size"]))
    masked, cut = masked_and_cut(model, masks)
    assert [w > 0 for w in cut.config.widths("intermediate_size")] == [True, False, True]
    torch.testing.assert_close(logits_of(cut), logits_of(masked), atol=1e-5, rtol=1e-5)
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits_of(MambaForImageClassification.from_pretrained(tmp_path)), logits_of(cut))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_stays(dtype):
    model = make("v2").to(dtype)
    masks = random_masks(find_groups(model))
    masked, cut = masked_and_cut(model, masks)
    assert {p.dtype for p in cut.parameters()} == {dtype}
    if dtype != torch.float64:
        # Sums of fewer terms round otherwise: a few units in the last of 8 (11) bits.
        expected = logits_of(masked)
        difference = (logits_of(cut) - expected).abs().max() / expected.abs().max()
        assert difference <= {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]


def test_mixed_dtypes_stay():
    model = make("v2").bfloat16()
    for mixer in mixers(model):
        for name in ("A_log", "A_b_log", "D", "D_b"):
            getattr(mixer, name).data = getattr(mixer, name).data.float()
    before = {name: p.dtype for name, p in model.named_parameters()}
    shrink_(model, random_masks(layer_groups(model)))
    assert {name: p.dtype for name, p in model.named_parameters()} == before


def test_flags_and_requires_grad_follow():
    model = make("v2")
    for i, parameter in enumerate(model.parameters()):
        parameter._no_weight_decay = i
        parameter.requires_grad_(i % 2 == 0)
    flags = {name: (p._no_weight_decay, p.requires_grad) for name, p in model.named_parameters()}
    shrink_(model, random_masks(layer_groups(model)))
    assert {name: (p._no_weight_decay, p.requires_grad) for name, p in model.named_parameters()} == flags
    assert all(isinstance(p, torch.nn.Parameter) and p.is_contiguous() and p.is_leaf for p in model.parameters())


def test_a_cut_model_trains():
    model = make("v2")
    model(**batch_of(model)).loss.backward()
    shrink_(model, random_masks(find_groups(model)))
    assert all(p.grad is None for g in find_groups(model) for v in g.views() for p in [v.parameter])
    loss = model.train()(**batch_of(model)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert model(**batch_of(model)).loss < loss
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_nothing_to_cut_changes_nothing():
    model = make("v2")
    before = snapshot(model)
    ids = [id(p) for p in model.parameters()]
    assert shrink_(model, {}) is model
    shrink_(model, {g.name: torch.ones(g.size, dtype=torch.bool) for g in find_groups(model)})
    assert_untouched(model, before)
    assert [id(p) for p in model.parameters()] == ids


def test_other_groups_stay_whole():
    model = make("v2")
    name = "backbone.layers.1.mixer:d_state"
    shrink_(model, {name: torch.arange(7) % 2 == 0})
    assert {g.name: g.size for g in layer_groups(model) if g.size not in (46, 5, 33, 7)} == {name: 4}
    assert model.config.d_state == [7, 4]


@pytest.mark.parametrize("kind, target", [*PAIRS, *MODEL_PAIRS])
def test_masks_zero_scored_slices_alone(kind, target):
    model = make(kind)
    masked = copy.deepcopy(model)
    masks = masks_for(model, [target])
    apply_masks_(find_groups(masked), masks)
    touched = {}
    for group in find_groups(model, [target]):
        for view in group.scored_views():
            expected = touched.setdefault(id(view.parameter), view.parameter.detach().clone())
            view.of(expected).mul_(view.along(masks[group.name]))
        for view in group.views(CARRIED):
            touched.setdefault(id(view.parameter), view.parameter.detach().clone())
    for (name, old), new in zip(model.named_parameters(), masked.parameters()):
        assert torch.equal(new, touched.get(id(old), old)), name


NAME = "backbone.layers.0.mixer:d_inner"
WHOLE = torch.ones(46, dtype=torch.bool)
WRONG = [
    (
        {"backbone.layers.9.mixer:d_inner": WHOLE},
        "There is a mask for 'backbone.layers.9.mixer:d_inner'",
    ),
    ({"d_inner": WHOLE}, "There is a mask for 'd_inner', which is none of the model's groups"),
    ({NAME: WHOLE[1:]}, rf"The mask of '{NAME}' must be bool \(46,\), got torch.bool \(45,\)"),
    ({NAME: WHOLE.float()}, r"must be bool \(46,\), got torch.float32"),
    ({NAME: WHOLE[:, None]}, r"must be bool \(46,\)"),
    ({NAME: ~WHOLE}, "keeps no channel; at least one must stay"),
]


@pytest.mark.parametrize("verb", ["shrink_", "apply_masks_"])
@pytest.mark.parametrize("wrong, message", WRONG, ids=range(len(WRONG)))
def test_wrong_masks_touch_nothing(wrong, message, verb):
    """Even with right masks before and after the wrong one."""
    model = make("v2")
    before = snapshot(model)
    masks = random_masks(find_groups(model, ["d_state", "dt_rank"]))
    masks = {**dict(list(masks.items())[:2]), **wrong, **dict(list(masks.items())[2:])}
    with pytest.raises(ValueError, match=message):
        shrink_(model, masks) if verb == "shrink_" else apply_masks_(find_groups(model), masks)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize(
    "target, field", [("d_inner", "intermediate_size"), ("d_state", "state_size"), ("dt_rank", "time_step_rank")]
)
def test_stock_classes_hold_one_width(kind, target, field):
    model = make(kind)
    before = snapshot(model)
    masks = even_masks(layer_groups(model))
    last = masks[f"backbone.layers.1.mixer:{target}"]
    last[last.nonzero()[0]] = False
    with pytest.raises(ValueError, match=f"holds one `{field}` for all layers, but the masks keep"):
        shrink_(model, masks)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=f"holds one `{field}` for all layers.*scope='layer'"):
        shrink_(model, {f"backbone.layers.1.mixer:{target}": last})
    assert_untouched(model, before)


def test_tied_embeddings_stay_tied():
    model = make("mamba", tie_word_embeddings=True)
    shrink_(model, even_masks(find_groups(model)))
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_a_masked_channel_may_hold_anything_carried():
    """Carried slices of channels that leave do not reach the logits, whatever they hold."""
    model = make("v2")
    masks = random_masks(find_groups(model))
    apply_masks_(find_groups(model), masks)
    before = logits_of(model)
    with torch.no_grad():
        for group in find_groups(model):
            for view in group.views(CARRIED):
                noise = 0.3 * torch.randn(view.tensor.shape)
                view.tensor.add_(noise * ~view.along(masks[group.name]))
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
    assert perturb_(model) is model and (logits_of(model) - before).abs().max() > 1e-3
