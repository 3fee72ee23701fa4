import copy

import pytest
import torch
from tiny import LANGUAGE, MIXER_TARGETS, OWN, PAIRS, batch_of, logits_of, make, random_masks

from mamba_rsst import find_groups, shrink_
from mamba_rsst.pruning import pad_


def uneven(kind, targets=MIXER_TARGETS, **overrides):
    model = make(kind, **overrides)
    return shrink_(model, random_masks(find_groups(model, targets), seed=4))


@pytest.mark.parametrize("kind, target", PAIRS)
def test_padded_equals_unpadded(kind, target):
    model = make(kind, **({"dtype": "float64"} if kind in LANGUAGE else {})).double()
    before = logits_of(model)
    width = max(group.size for group in find_groups(model, [target])) + 3
    pad_(model, {target: width})
    assert all(group.size == width for group in find_groups(model, [target]))
    torch.testing.assert_close(logits_of(model), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", OWN)
def test_layers_of_different_widths_to_one(kind, tmp_path):
    model = uneven(kind)
    before, widths = logits_of(model), {t: max(model.config.widths(t)) for t in MIXER_TARGETS}
    assert all(isinstance(getattr(model.config, t), list) for t in MIXER_TARGETS)
    pad_(model, widths)
    assert {t: getattr(model.config, t) for t in MIXER_TARGETS} == widths
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("kind", OWN)
def test_padding_then_cutting_the_padding_gives_the_model_back(kind):
    model = make(kind)
    masks = {}
    padded = pad_(copy.deepcopy(model), dict.fromkeys(MIXER_TARGETS, 50))
    for group in find_groups(model, MIXER_TARGETS):
        masks[group.name] = torch.arange(50) < group.size
    shrink_(padded, masks)
    assert padded.config.to_dict() == model.config.to_dict()
    for (name, a), b in zip(model.named_parameters(), padded.parameters()):
        torch.testing.assert_close(b, a, msg=name)


def test_without_norms_nothing_that_was_there_is_touched():
    model = uneven("lm").bfloat16()
    kept = copy.deepcopy(model.state_dict())
    pad_(model, {"d_inner": 50, "d_state": 20, "dt_rank": 9})
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        a, b = (t[t != 0].float().sort().values for t in (kept[name], tensor))
        assert torch.equal(a, b), name


def test_training_goes_on():
    model = pad_(uneven("lm_norms"), {"d_inner": 50, "d_state": 20, "dt_rank": 9})
    model(**batch_of(model)).loss.backward()
    assert all(p.requires_grad and p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "widths, message",
    [
        ({"d_inner": 10}, "has .* channels: it cannot be padded to 10"),
        ({"d_iner": 99}, "Unknown target 'd_iner'"),
        ({"intermediate_size": 99}, "has no 'intermediate_size' to prune"),
        ({}, "must name"),
    ],
)
def test_what_cannot_be_padded_is_left_alone(widths, message):
    model = uneven("lm")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises(ValueError, match=message):
        pad_(model, widths)
    assert model.config.to_json_string() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
