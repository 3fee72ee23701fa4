import copy
import math

import pytest
import torch
from tiny import (
    BIDIRECTIONAL,
    KINDS,
    MIXER_TARGETS,
    MODEL_PAIRS,
    PAIRS,
    WITH_NORMS,
    even_masks,
    logits_of,
    make,
    random_masks,
)

from mamba_rsst import apply_masks_, find_groups
from mamba_rsst.pruning import leaving_share
from mamba_rsst.pruning.groups import CONSUMER, PRODUCER
from mamba_rsst.pruning.penalty import MAX_DECAY, decay_, group_lasso, strength_for
from mamba_rsst.pruning.schedules import schedule_value


def factors_by_hand(model, masks, amount):
    """Parameter name -> what decay multiplies it by: once for each leaving channel that an element belongs to."""
    factors = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in find_groups(model):
        if group.name not in masks:
            continue
        for view in group.views(PRODUCER, CONSUMER):
            for c in (~masks[group.name]).nonzero()[:, 0].tolist():
                if view.axis is None:  # a block's whole parameter
                    factors[names[id(view.parameter)]].mul_(1 - amount if view.start == c else 1)
                    continue
                factors[names[id(view.parameter)]].select(view.axis, view.start + c).mul_(1 - amount)
    return factors


@pytest.mark.parametrize("kind, target", [*PAIRS, *MODEL_PAIRS])
def test_decay_touches_what_leaves_and_nothing_else(kind, target):
    """Kept channels, carried slices and groups without a mask stay to the last bit."""
    model = make(kind)
    groups = find_groups(model)
    masks = random_masks([g for g in groups if g.target == target][:1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = factors_by_hand(model, masks, 0.25)
    decay_(groups, masks, 0.25)
    assert any((f != 1).any() for f in factors.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * factors[name]), name


def test_decay_where_groups_cross():
    """x_proj holds d_inner along one axis, d_state and dt_rank along the other: both factors act."""
    model = make("v2")
    groups = find_groups(model)
    masks = random_masks(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = factors_by_hand(model, masks, 0.25)
    decay_(groups, masks, 0.25)
    found = {round(f.item(), 6) for f in factors["backbone.layers.0.mixer.x_proj.weight"].unique()}
    assert found == {1.0, 0.75, 0.5625}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * factors[name], rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_decaying_away_ends_at_the_masked_model(kind):
    model = make(kind)
    groups = find_groups(model, MIXER_TARGETS)
    masks = even_masks(groups)
    masked = copy.deepcopy(model)
    apply_masks_(find_groups(masked), masks)
    distance = [(logits_of(model) - logits_of(masked)).abs().max()]
    for _ in range(3):
        for _ in range(8):
            decay_(groups, masks, 0.5)
        distance.append((logits_of(model) - logits_of(masked)).abs().max())
    if kind not in WITH_NORMS:  # norms bring small states back to size until they are zero
        assert distance[3] < 1e-5 < distance[0]
        assert distance[1] < distance[0]
    assert leaving_share(groups, masks) < 1e-6


def test_decay_of_nothing():
    model = make("v2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = find_groups(model)
    decay_(groups, {}, 0.5)
    decay_(groups, random_masks(groups), 0.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("amount", [1.0, 1.5, -0.1, math.nan])
def test_decay_by_too_much(amount):
    model = make("v2")
    groups = find_groups(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"lr \* lambda must be in \[0, 1\), got .*; lower lambda_max"):
        decay_(groups, random_masks(groups), amount)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_decay_in_other_dtypes(dtype):
    model = make("v2").to(dtype)
    groups = find_groups(model)
    masks = random_masks(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = factors_by_hand(model, masks, 0.5)
    decay_(groups, masks, 0.5)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name] * factors[name]), name


def channel_vectors(group, parameters):
    """Each channel's producer and consumer numbers as one vector, channel by channel."""
    views = [(parameters[id(v.parameter)], v.axis, v.start) for v in group.views(PRODUCER, CONSUMER)]
    if group.blocks is not None:  # whole parameters, each of one block
        return [torch.cat([p.flatten() for p, _, block in views if block == c]) for c in range(group.size)]
    return [torch.cat([p.select(axis, start + c).flatten() for p, axis, start in views]) for c in range(group.size)]


@pytest.mark.parametrize("scope", ["leaving", "all"])
@pytest.mark.parametrize("kind, target", [*PAIRS, *MODEL_PAIRS])
def test_group_lasso(kind, target, scope):
    model = make(kind)
    groups = find_groups(model, [target])
    masks = random_masks(groups)
    if scope == "leaving" and len(groups) > 1:
        del masks[groups[0].name]  # a group without a mask has nothing that leaves
    parameters = [p for p in model.parameters() if p.requires_grad]
    value = group_lasso(groups, masks, scope)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    leaves = {id(p): p.detach().double().requires_grad_() for p in parameters}
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for c, vector in enumerate(channel_vectors(group, leaves)):
            if scope == "all" or (group.name in masks and not masks[group.name][c]):
                total = total + vector.norm()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(total.item(), rel=1e-5) and value > 0
    expected = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for grad, wanted in zip(grads, expected):
        assert (wanted is None) == (grad is None or not grad.any())
        if wanted is not None:
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)


def test_group_lasso_of_an_empty_channel():
    """Zero has no direction: its gradient is zero, not NaN."""
    model = make("v2")
    groups = find_groups(model)
    masks = random_masks(groups)
    apply_masks_(groups, masks)
    value = group_lasso(groups, masks)
    assert value < 1e-3
    for grad in torch.autograd.grad(value, list(model.parameters()), allow_unused=True):
        assert grad is None or torch.isfinite(grad).all()


def test_group_lasso_without_masks():
    groups = find_groups(make("v2"))
    assert group_lasso(groups, {}).item() == 0.0
    assert group_lasso(groups, {}, "all").item() > 0.0


def test_group_lasso_of_a_misspelt_scope():
    groups = find_groups(make("v2"))
    with pytest.raises(ValueError, match=r"Unknown scope 'leaveing'; choose from \['leaving', 'all'\]"):
        group_lasso(groups, random_masks(groups), "leaveing")


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_leaving_share(kind):
    model = make(kind)
    groups = find_groups(model, MIXER_TARGETS)
    masks = random_masks(groups)
    del masks[groups[-1].name]
    parameters = {id(p): p.detach().double() for p in model.parameters()}
    leaving = everything = 0.0
    for group in groups:
        for c, vector in enumerate(channel_vectors(group, parameters)):
            everything += vector.square().sum().item()
            if group.name in masks and not masks[group.name][c]:
                leaving += vector.square().sum().item()
    assert leaving_share(groups, masks) == pytest.approx(math.sqrt(leaving / everything), rel=1e-5)
    assert leaving_share(groups, {}) == 0.0
    assert leaving_share(groups, {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}) == 0.0
    apply_masks_(groups, masks)
    assert leaving_share(groups, masks) == 0.0


def test_penalised_and_kept_are_not_one_object():
    """An earlier implementation held both masks in one object, so that nothing was ever penalised."""
    model = make("v2")
    groups = find_groups(model)
    masks = random_masks(groups)
    copies = {name: mask.clone() for name, mask in masks.items()}
    share = leaving_share(groups, masks)
    for _ in range(3):
        decay_(groups, masks, 0.5)
        assert all(torch.equal(masks[name], copies[name]) for name in masks)
        assert leaving_share(groups, masks) < share
        share = leaving_share(groups, masks)


@pytest.mark.parametrize("schedule", ["constant", "linear", "exp_power"])
@pytest.mark.parametrize("residual", [0.5, 1e-2, 1e-6])
@pytest.mark.parametrize(
    "rates",
    [[1e-3] * 300, [1e-3 * (1 + math.cos(math.pi * t / 200)) / 2 for t in range(200)], [0.0] * 5 + [0.1] * 20],
    ids=["flat", "cosine", "warmup"],
)
def test_strength_reaches_the_residual(rates, residual, schedule):
    f = lambda u: schedule_value(schedule, u)  # noqa: E731
    strength = strength_for(residual, rates, f)
    model = make("v2")
    (group, _) = find_groups(model, ["d_inner"])
    masks = {group.name: torch.arange(46) >= 10}
    left = 1.0
    for t, lr in enumerate(rates):
        amount = min(MAX_DECAY, lr * strength * f((t + 1) / len(rates)))
        left *= 1 - amount
    assert left == pytest.approx(residual, rel=1e-3)
    if len(rates) == 25:
        before = copy.deepcopy(model)
        for t, lr in enumerate(rates):
            decay_([group], masks, min(MAX_DECAY, lr * strength * f((t + 1) / len(rates))))
        new, old = (m.backbone.layers[0].mixer.out_proj.weight for m in (model, before))
        torch.testing.assert_close(new[:, :10], old[:, :10] * residual, rtol=1e-2, atol=0)
        assert torch.equal(new[:, 10:], old[:, 10:])


def test_too_few_steps():
    with pytest.raises(ValueError, match="2 steps are too few to shrink the leaving channels to 1e-06"):
        strength_for(1e-6, [0.1, 0.1], lambda u: 1.0)
    with pytest.raises(ValueError, match="3 steps are too few"):
        strength_for(0.5, [0.0, 0.0, 0.0], lambda u: 1.0)
    with pytest.raises(ValueError, match="0 steps are too few"):
        strength_for(0.5, [], lambda u: 1.0)
