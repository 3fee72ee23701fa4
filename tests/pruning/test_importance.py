import dataclasses
import math

import pytest
import torch
from tiny import BIDIRECTIONAL, KINDS, MIXER_TARGETS, PAIRS, batch_of, make, mixers

from mamba_rsst import PruningConfig, find_groups, prune_, register_importance, select_channels
from mamba_rsst.pruning.importance import IMPORTANCE, NEEDS_DATA, Calibration, score_channels
from mamba_rsst.pruning.prune import score_groups


R, N, E = 5, 7, 46


def channels_of(owner, target, pick=lambda p: p.detach()):
    """The producer and consumer slices of a mixer or MLP, written out by hand: a list of (channels, numbers)."""
    mats = []

    def take(module, name, *, rows=None, columns=None):
        parameter = getattr(module, name, None)
        if parameter is not None:
            x = pick(parameter).double()
            x = x if rows is None else x[rows]
            x = x if columns is None else x[:, columns].T
            mats.append(x.reshape(x.shape[0], -1))

    if target == "intermediate_size":
        take(owner.fc1, "weight")
        take(owner.fc1, "bias")
        take(owner.fc2, "weight", columns=slice(None))
        return mats
    suffixes = ("", "_b") if hasattr(owner, "x_proj_b") else ("",)
    for s in suffixes:
        conv, x_proj, dt_proj = (getattr(owner, name + s) for name in ("conv1d", "x_proj", "dt_proj"))
        if target == "d_inner":
            take(conv, "weight")
            take(conv, "bias")
            take(x_proj, "weight", columns=slice(None))
        if target == "d_state":
            take(x_proj, "weight", rows=slice(R, R + N))
            take(x_proj, "weight", rows=slice(R + N, R + 2 * N))
        if target == "dt_rank":
            take(x_proj, "weight", rows=slice(0, R))
            take(dt_proj, "weight", columns=slice(None))
    if target == "d_inner":
        for rows in (slice(0, E), slice(E, 2 * E)):
            take(owner.in_proj, "weight", rows=rows)
            take(owner.in_proj, "bias", rows=rows)
        take(owner.out_proj, "weight", columns=slice(None))
    return mats


def scores_of(model, importance, targets, batches=None, seed=0):
    groups = find_groups(model, targets)
    return groups, score_channels(groups, importance, Calibration(model, batches, seed))


TARGETS_OF = {"state_energy": ["d_state"], "leave_one_out": ["num_hidden_layers"]}
"""Importance -> targets to try it on, where not any."""


def batches_of(model, count=3):
    return [batch_of(model, count=2 + i, seed=i) for i in range(count)]


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kind, target", PAIRS)
def test_magnitudes(kind, target, biases):
    model = make(kind, use_bias=biases, use_conv_bias=biases)
    for importance, formula in (
        ("magnitude_l1", lambda mats: sum(m.abs().sum(1) for m in mats)),
        ("magnitude_l2", lambda mats: torch.cat(mats, dim=1).norm(dim=1)),
    ):
        groups, scores = scores_of(model, importance, [target])
        assert set(scores) == {g.name for g in groups}
        for group in groups:
            expected = formula(channels_of(group.owner, target))
            assert scores[group.name].dtype == torch.float32
            torch.testing.assert_close(scores[group.name].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind, target", PAIRS)
def test_taylor(kind, target):
    """|sum of w dL/dw| a batch, then summed: signs cancel within a batch, not between batches."""
    model = make(kind)
    batches = batches_of(model)
    groups, scores = scores_of(model, "taylor", [target], batches)
    expected = {g.name: 0.0 for g in groups}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for g in groups:
            products = channels_of(g.owner, target, pick=lambda p: p.detach() * p.grad)
            expected[g.name] = expected[g.name] + sum(m.sum(1) for m in products).abs()
    for g in groups:
        scale = expected[g.name].max()
        torch.testing.assert_close(scores[g.name].double() / scale, expected[g.name] / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [*MIXER_TARGETS, "intermediate_size"])
def test_taylor_is_not_a_magnitude(target):
    """An earlier implementation fell back to L1 without a word."""
    model = make("v2")
    groups, taylor = scores_of(model, "taylor", [target], batches_of(model))
    for other in ("magnitude_l1", "magnitude_l2"):
        _, scores = scores_of(model, other, [target])
        for g in groups:
            both = torch.stack([taylor[g.name], scores[g.name]])
            assert torch.corrcoef(both)[0, 1] < 0.99
            assert not torch.equal(both[0].argsort(), both[1].argsort())


def test_taylor_predicts_what_removal_does():
    """First order: the slope of the loss as all of a channel's scored slices grow together, by finite differences."""
    model = make("v2").double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(model).items()}
    (group, _), scores = scores_of(model, "taylor", ["d_inner"], [batch])
    step = 1e-2  # the loss is fp32: smaller differences drown in its rounding
    for c in (0, 17, 45):
        losses = []
        for sign in (1, -1):
            changed = make("v2").double()
            (other, _) = find_groups(changed, ["d_inner"])
            with torch.no_grad():
                for view in other.scored_views():
                    view.tensor.narrow(view.axis, c, 1).mul_(1 + sign * step)
            losses.append(changed(**batch).loss)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert scores[group.name][c].item() == pytest.approx(abs(slope.item()), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("importance", ["taylor", "saliency"])
def test_scores_by_gradients_without_gradients(importance):
    """Evaluation code stands under no_grad."""
    model = make("none")
    expected = scores_of(model, importance, ["d_inner"], batches_of(model))[1]
    with torch.no_grad():
        found = scores_of(model, importance, ["d_inner"], batches_of(model))[1]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_taylor_leaves_no_gradients_behind():
    model = make("v2")
    scores_of(model, "taylor", ["d_inner"], batches_of(model))
    assert all(p.grad is None for p in model.parameters())


def test_taylor_without_what_it_needs():
    model = make("v2")
    batch = batch_of(model)
    with pytest.raises(ValueError, match="'taylor' needs a loss: put `labels` into the calibration batches"):
        scores_of(model, "taylor", ["d_inner"], [{"pixel_values": batch["pixel_values"]}])
    for batches in (None, []):
        with pytest.raises(ValueError, match="looks at data: give `calibration`"):
            scores_of(model, "taylor", ["d_inner"], batches)
    model.backbone.layers[1].mixer.x_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'taylor' needs gradients, but 1 of the pruned parameters are frozen"):
        scores_of(model, "taylor", ["d_inner"], [batch])
    scores_of(model, "taylor", ["intermediate_size"], [batch])


def test_taylor_where_no_gradient_arrives():
    model = make("v2")
    mixer = mixers(model)[1]
    mixer.out_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 20)
    with pytest.raises(ValueError, match="no gradient reached '.*' of 'backbone.layers.1.mixer:d_inner'"):
        scores_of(model, "taylor", ["d_inner"], [batch_of(model)])


@pytest.mark.parametrize("kind, target", PAIRS)
def test_activation(kind, target):
    model = make(kind)
    batches = batches_of(model)
    groups, scores = scores_of(model, "activation", [target], batches)
    seen = {}

    def keep(name, side):
        def hook(module, args, output):
            seen.setdefault(name, []).append((args[0] if side == "in" else output).detach().flatten(0, -2).double())

        return hook

    suffixes = ("", "_b") if kind == "v2" else ("",)
    for group in groups:
        if target in ("d_inner", "intermediate_size"):
            module = group.owner.out_proj if target == "d_inner" else group.owner.fc2
            module.register_forward_hook(keep((group.name, ""), "in"))
        else:
            for s in suffixes:
                getattr(group.owner, "x_proj" + s).register_forward_hook(keep((group.name, s), "out"))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    ranges = {"dt_rank": [slice(0, R)], "d_state": [slice(R, R + N), slice(R + N, R + 2 * N)]}
    for group in groups:
        expected = 0.0
        for (name, _), parts in seen.items():
            if name == group.name:
                squares = torch.cat(parts).square().sum(0)
                expected = expected + sum(squares[r] for r in ranges.get(target, [slice(None)]))
        torch.testing.assert_close(scores[group.name].double(), expected, rtol=1e-5, atol=0)


def test_activation_takes_its_hooks_away():
    model = make("v2")
    scores_of(model, "activation", MIXER_TARGETS, batches_of(model))
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="looks at data"):
        scores_of(model, "activation", MIXER_TARGETS)
    assert not any(m._forward_hooks for m in model.modules())


def test_random_follows_the_seed():
    model = make("v2")
    _, first = scores_of(model, "random", ["d_inner"], seed=3)
    torch.rand(7)
    _, again = scores_of(model, "random", ["d_inner"], seed=3)
    _, other = scores_of(model, "random", ["d_inner"], seed=4)
    a, b = first.values()
    assert not torch.equal(a, b)
    for name in first:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    masks = [select_channels(model, PruningConfig(importance="random", seed=s, round_to=1)) for s in (3, 3, 4)]
    assert all(torch.equal(masks[0][k], masks[1][k]) for k in masks[0])
    assert any(not torch.equal(masks[0][k], masks[2][k]) for k in masks[0])


@pytest.mark.parametrize("importance", sorted(NEEDS_DATA))
@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode(importance, training):
    """Scores are taken in evaluation mode; afterwards every module is as it was, those in a mode of their own too."""
    model = make("v2", drop_path_rate=0.9, hidden_dropout_prob=0.5).train(training)
    odd = model.backbone.layers[1]
    odd.train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    batches = batches_of(model)
    _, scores = scores_of(model, importance, TARGETS_OF.get(importance, ["d_inner"]), batches)
    assert {name: module.training for name, module in model.named_modules()} == before
    _, quiet = scores_of(model.eval(), importance, TARGETS_OF.get(importance, ["d_inner"]), batches)
    assert all(torch.equal(scores[name], quiet[name]) for name in scores)


def test_the_mode_comes_back_after_an_error():
    model = make("v2").train()
    with pytest.raises(ValueError, match="labels"):
        scores_of(model, "taylor", ["d_inner"], [{"pixel_values": batch_of(model)["pixel_values"]}])
    assert model.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_batches_may_be_a_generator():
    model = make("v2")
    batches = batches_of(model)
    _, listed = scores_of(model, "taylor", MIXER_TARGETS, batches)
    _, generated = scores_of(model, "taylor", MIXER_TARGETS, (b for b in batches))
    assert all(torch.equal(listed[name], generated[name]) for name in listed)


@pytest.fixture
def own():
    yield "own"
    IMPORTANCE.pop("own", None)
    NEEDS_DATA.discard("own")


def test_a_score_of_ones_own(own):
    @register_importance(own, needs_data=True)
    def first_is_best(groups, calibration):
        assert len(list(calibration)) == 2
        return {g.name: torch.arange(g.size, 0, -1) for g in groups}

    assert own in NEEDS_DATA and IMPORTANCE[own] is first_is_best
    model = make("v2")
    config = PruningConfig(importance=own, sparsity=0.5, round_to=1, scope="layer")
    masks = select_channels(model, config, batches_of(model, 2))
    assert all(torch.equal(mask, torch.arange(46) < 23) for mask in masks.values())
    with pytest.raises(ValueError, match="There already is an importance called 'own'"):
        register_importance(own)(first_is_best)


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda g: torch.zeros(g.size + 1), r"Importance 'own' gave \(47,\) for Group"),
        (
            lambda g: torch.full((g.size,), math.nan),
            "'own' is not finite for 'backbone.layers.0.mixer:d_inner'",
        ),
        (lambda g: torch.full((g.size,), math.inf), "has the model diverged"),
    ],
)
def test_scores_that_make_no_sense(own, result, message):
    register_importance(own)(lambda groups, calibration: {g.name: result(g) for g in groups})
    with pytest.raises(ValueError, match=message):
        select_channels(make("v2"), PruningConfig(importance=own))


def test_a_diverged_model_is_refused():
    model = make("v2")
    with torch.no_grad():
        mixers(model)[1].out_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="'magnitude_l2' is not finite for 'backbone.layers.1.mixer:d_inner'"):
        prune_(model, PruningConfig())


def test_unknown_importance():
    message = "Unknown importance 'tailor'; choose from .*'activation', .*'magnitude_l1', .*'taylor'"
    with pytest.raises(ValueError, match=message):
        PruningConfig(importance="tailor")
    with pytest.raises(ValueError, match=message):
        scores_of(make("v2"), "tailor", ["d_inner"])


@pytest.mark.parametrize("importance", sorted(IMPORTANCE))
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_scores_leave_the_weights_alone(kind, importance):
    model = make(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores_of(model, importance, TARGETS_OF.get(importance, MIXER_TARGETS), batches_of(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("importance", sorted(IMPORTANCE))
def test_permuting_a_group_permutes_its_scores(importance):
    if importance in ("random", "leave_one_out"):
        return
    model = make("v2")
    batches = batches_of(model)
    (target,) = TARGETS_OF.get(importance, ["d_inner"])
    order = torch.randperm(46 if target == "d_inner" else N)
    _, before = scores_of(model, importance, [target], batches)
    with torch.no_grad():
        for group in find_groups(model, [target]):
            for view in group.views():
                view.tensor.copy_(view.tensor.index_select(view.axis, order))
    _, after = scores_of(model, importance, [target], batches)
    for name in before:
        scale = before[name].max()
        torch.testing.assert_close(after[name] / scale, before[name][order] / scale, rtol=1e-3, atol=1e-5)


def test_bf16_models_are_scored_in_fp32():
    model = make("v2")
    targets = {k: TARGETS_OF.get(k, ["d_inner"]) for k in sorted(IMPORTANCE)}
    expected = {k: scores_of(model, k, targets[k], batches_of(model))[1] for k in targets}
    model = model.bfloat16()
    for importance, wanted in expected.items():
        _, scores = scores_of(model, importance, targets[importance], batches_of(model))
        for name, values in scores.items():
            assert values.dtype == torch.float32
            if importance not in (
                "taylor",
                "saliency",
            ):  # differences of large numbers: rounding stays
                rtol = 0.2 if importance == "state_energy" else 0.05  # to the fourth power in what is rounded
                torch.testing.assert_close(values, wanted[name], rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", ["none", "v1", "v2", "lm", "lm_norms", "mamba", "falcon_mamba"])
def test_state_energy(kind):
    """Against the energy of what each state adds to the scan's output, token by token, in fp64."""
    model = make(kind)
    batches = batches_of(model, 2)
    groups, scores = scores_of(model, "state_energy", ["d_state"], batches)
    seen = {}

    def keep(key):
        return lambda module, args, output: seen.setdefault(key, []).append((args[0].double(), output.double()))

    for g in groups:
        for s in ("", "_b") if kind == "v2" else ("",):
            getattr(g.owner, "x_proj" + s).register_forward_hook(keep((g.name, s)))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    for g in groups:
        owner, energy = g.owner, torch.zeros(N, dtype=torch.float64)
        runs = {"v1": [("", "A_log", 1), ("", "A_b_log", -1)], "v2": [("", "A_log", 1), ("_b", "A_b_log", -1)]}
        for s, decay, step in runs.get(kind, [("", "A_log", 1)]):
            A, dt_proj = -getattr(owner, decay).detach().double().exp(), getattr(owner, "dt_proj" + s).double()
            for u, out in seen[g.name, s]:
                low, B, C = out.split([R, N, N], dim=-1)
                if kind in ("lm_norms", "falcon_mamba"):
                    low, B, C = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (low, B, C))
                delta = torch.nn.functional.softplus(dt_proj(low)).detach()
                h = torch.zeros(u.shape[0], E, N, dtype=torch.float64)
                for t in range(u.shape[1])[::step]:
                    h = torch.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * B[:, t, None]
                    energy += (h * C[:, t, None]).square().sum((0, 1))
        torch.testing.assert_close(scores[g.name].double(), energy, rtol=1e-4, atol=0)


def test_state_energy_is_for_states():
    model = make("lm")
    with pytest.raises(ValueError, match="'state_energy' scores d_state, not 'd_inner'"):
        scores_of(model, "state_energy", ["d_inner"], batches_of(model))


@pytest.mark.parametrize("target", [*MIXER_TARGETS, "intermediate_size", "hidden_size", "num_hidden_layers"])
def test_wanda(target):
    """|w| times the norm of its input, by hand, over the linear layers that are called."""
    model = make("lm_mlp", tie_word_embeddings=True)
    batches = batches_of(model, 2)
    groups, scores = scores_of(model, "wanda", [target], batches)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs = {}
    for name, module in linear.items():
        module.register_forward_hook(lambda m, args, out, n=name: inputs.setdefault(n, []).append(args[0]))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    cost = {}
    for name, parts in inputs.items():
        x = torch.cat([part.detach().flatten(0, -2) for part in parts])
        cost[name] = linear[name].weight.detach().abs() * x.norm(dim=0)
    layers = [{n.removeprefix(p): c for n, c in cost.items() if n.startswith(p)} for p in _prefixes(2)]
    rows, columns = (lambda c: c.sum(1)), (lambda c: c.sum(0))
    if target == "hidden_size":
        expected = [
            columns(cost["lm_head"])
            + sum(columns(c["mixer.in_proj"]) + rows(c["mixer.out_proj"]) for c in layers)
            + sum(columns(c["mlp.fc1"]) + rows(c["mlp.fc2"]) for c in layers)
        ]
    elif target == "num_hidden_layers":
        expected = [torch.stack([c["mixer.out_proj"].sum() + c["mlp.fc2"].sum() for c in layers])]
    else:
        expected = [
            {
                "d_inner": lambda c: (
                    rows(c["mixer.in_proj"]).view(2, E).sum(0)
                    + columns(c["mixer.x_proj"])
                    + columns(c["mixer.out_proj"])
                ),
                "d_state": lambda c: rows(c["mixer.x_proj"])[R:].view(2, N).sum(0),
                "dt_rank": lambda c: rows(c["mixer.x_proj"])[:R],
                "intermediate_size": lambda c: rows(c["mlp.fc1"]) + columns(c["mlp.fc2"]),
            }[target](c)
            for c in layers
        ]
    for g, values in zip(groups, expected):
        torch.testing.assert_close(scores[g.name], values, rtol=1e-4, atol=0)


def _prefixes(count):
    return [f"backbone.layers.{i}." for i in range(count)]


@pytest.mark.parametrize("importance", ["wanda", "activation", "taylor"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_whole_model(kind, importance):
    """The residual width has scores of every sort; blocks those that need no place to be watched at."""
    model = make(kind)
    groups, scores = scores_of(model, importance, ["hidden_size"], batches_of(model, 1))
    assert len(scores[groups[0].name]) == 20 and scores[groups[0].name].std() > 0
    if importance == "activation":
        with pytest.raises(ValueError, match="never called what hands on 'model:num_hidden_layers'"):
            scores_of(model, importance, ["num_hidden_layers"], batches_of(model, 1))
    else:
        _, scores = scores_of(model, importance, ["num_hidden_layers"], batches_of(model, 1))
        assert scores["model:num_hidden_layers"].std() > 0


# ---- Refill's criteria ----
@pytest.mark.parametrize("target", ["d_inner", "intermediate_size", "d_state"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_remain_counts_what_one_global_threshold_leaves(target, sparsity):
    model = make("v2")
    config = PruningConfig(targets=[target], sparsity=sparsity, round_to=1)
    groups = find_groups(model, [target])
    mats = {g.name: channels_of(g.owner, target) for g in groups}
    values = torch.cat([m.flatten() for ms in mats.values() for m in ms]).abs()
    threshold = values.sort(descending=True).values[round((1 - sparsity) * len(values)) - 1]
    for importance, formula in (
        ("remain", lambda m: (m.abs() >= threshold).sum(1)),
        ("remain_l1", lambda m: (m.abs() * (m.abs() >= threshold)).sum(1)),
    ):
        scores = score_groups(model, dataclasses.replace(config, importance=importance))
        for g in groups:
            expected = sum(formula(m) for m in mats[g.name]).float()
            torch.testing.assert_close(scores[g.name], expected, rtol=1e-5, atol=0)


def test_remain_in_a_later_round_counts_by_what_is_left_of_the_dense_model():
    """Half of the dense channels are to stay, and three quarters are left: the mask keeps 2/3 of their weights."""
    model = make("v2")
    dense = {g.name: g.size for g in find_groups(model, ["intermediate_size"])}
    prune_(model, PruningConfig(targets=["intermediate_size"], sparsity=0.25, round_to=1, scope="layer"))
    config = PruningConfig(targets=["intermediate_size"], sparsity=0.5, importance="remain", round_to=1)
    groups = find_groups(model, config.targets)
    kept = sum(float(s.sum()) for s in score_groups(model, config, dense=dense).values())
    weights = sum(m.numel() for g in groups for m in channels_of(g.owner, "intermediate_size"))
    share = sum(dense.values()) * 0.5 / sum(g.size for g in groups)
    assert kept / weights == pytest.approx(share, abs=1e-3) and share < 0.7


@pytest.mark.parametrize("kind", ["none", "v2"])
@pytest.mark.parametrize("target", ["d_inner", "intermediate_size"])
def test_saliency(kind, target):
    """|sum over positions of a dL/da| a sample, by gates of one on the activations: dL/dgate is that sum."""
    model = make(kind)
    batches = batches_of(model)
    groups, scores = scores_of(model, "saliency", [target], batches)
    for group in groups:
        last = group.owner.out_proj if target == "d_inner" else group.owner.fc2
        expected = torch.zeros(group.size)
        for batch in batches:
            gate = torch.ones(len(batch["labels"]), 1, group.size, requires_grad=True)
            handle = last.register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate,))
            model(**batch).loss.backward()
            handle.remove()
            expected += gate.grad[:, 0].abs().sum(0)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-4, atol=1e-6 * expected.max().item())
    model.zero_grad()


def test_saliency_of_the_residual_stream_is_that_of_what_is_written_to_it():
    """The readers of a channel add up to its writers: a stage of the stream must not count what later blocks read."""
    model = make("lm").double()
    batch = {k: v[:1] for k, v in batch_of(model).items()}
    groups, scores = scores_of(model, "saliency", ["hidden_size"], [batch])
    gate = torch.ones(groups[0].size, dtype=torch.float64, requires_grad=True)
    writers = [model.backbone.embeddings, *(block.mixer.out_proj for block in model.backbone.layers)]
    handles = [writer.register_forward_hook(lambda module, args, output: output * gate) for writer in writers]
    (expected,) = torch.autograd.grad(model(**batch).loss, gate)
    for handle in handles:
        handle.remove()
    expected = expected.abs().float()
    torch.testing.assert_close(scores[groups[0].name], expected, rtol=1e-3, atol=1e-4 * expected.max().item())


def test_saliency_without_what_it_needs():
    model = make("v2")
    batch = batch_of(model)
    with pytest.raises(ValueError, match="'saliency' needs a loss"):
        scores_of(model, "saliency", ["d_inner"], [{"pixel_values": batch["pixel_values"]}])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="'saliency' needs gradients"):
        scores_of(model, "saliency", ["d_inner"], [batch])
