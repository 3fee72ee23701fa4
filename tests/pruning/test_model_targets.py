"""The widths of the model as a whole: the residual stream and the number of blocks; and dt_rank by SVD."""

import copy

import pytest
import torch
from tiny import (
    BIDIRECTIONAL,
    KINDS,
    LANGUAGE,
    MIXER_TARGETS,
    OWN,
    WITH_NORMS,
    batch_of,
    layer_groups,
    logits_of,
    make,
    mixers,
    random_masks,
)

from mamba_rsst import PruningConfig, apply_masks_, find_groups, prune_, select_channels, shrink_
from mamba_rsst.pruning import BudgetError, align_
from mamba_rsst.pruning.groups import CARRIED, PRODUCER
from mamba_rsst.pruning.importance import Calibration, score_channels


STREAM, BLOCKS = "model:hidden_size", "model:num_hidden_layers"


def group_of(model, target):
    (group,) = find_groups(model, [target])
    return group


# ---- hidden_size ----
@pytest.mark.parametrize("kind", KINDS)
def test_every_axis_of_the_stream_is_in_the_table(kind):
    """hidden_size is the only 20 there is: each axis of that size is covered, once."""
    model = make(kind)
    group = group_of(model, "hidden_size")
    assert (group.name, group.size, group.layer, group.config_field) == (STREAM, 20, None, "hidden_size")
    covered = [(id(v.parameter), v.axis) for v in group.views()]
    assert len(set(covered)) == len(covered) and all((v.start, v.size) == (0, 20) for v in group.views())
    expected = [(id(p), axis) for p in model.parameters() for axis, size in enumerate(p.shape) if size == 20]
    assert sorted(covered) == sorted(expected)
    norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
    assert {id(v.parameter) for v in group.views(CARRIED)} == norms


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_any_slice_of_the_stream_shows(kind):
    model = make(kind)
    before = logits_of(model)
    order = torch.arange(20).roll(7)
    for i, view in enumerate(group_of(model, "hidden_size").views()):
        changed = copy.deepcopy(model)
        for j, other in enumerate(group_of(changed, "hidden_size").views()):
            if i != j:
                with torch.no_grad():
                    other.tensor.copy_(other.tensor.index_select(other.axis, order))
        assert (logits_of(changed) - before).abs().max() > 2e-3, (view.module, view.name)


@pytest.mark.parametrize("kind", OWN)
def test_the_norms_are_corrected(kind):
    """In fp64, with an epsilon that matters: masked and cut are one function to the last bits."""
    model = make(kind, layer_norm_epsilon=0.3, residual_in_fp32=False).double()
    masks = random_masks([group_of(model, "hidden_size")])
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(model).items()}
    masked, cut = copy.deepcopy(model), shrink_(copy.deepcopy(model), masks)
    apply_masks_(find_groups(masked), masks)
    masked, expected = (m.backbone(*list(batch.values())[:1]).last_hidden_state for m in (cut, masked))
    torch.testing.assert_close(masked, expected[..., masks[STREAM]] * 1.0, atol=1e-12, rtol=1e-12)
    kept = int(masks[STREAM].sum())
    assert cut.config.hidden_size == kept and cut.config.layer_norm_epsilon == pytest.approx(0.3 * 20 / kept)
    old, new = model.backbone.norm_f, cut.backbone.norm_f
    torch.testing.assert_close(new.weight, old.weight[masks[STREAM]] * (20 / kept) ** 0.5)
    assert new.eps == cut.config.layer_norm_epsilon and new.normalized_shape == (kept,)


@pytest.mark.parametrize("kind", KINDS)
def test_all_widths_at_once_saved_and_reloaded(kind, tmp_path):
    """Blocks, the stream and everything in the blocks; one function masked, cut and reloaded."""
    model = make(kind, num_hidden_layers=3, tie_word_embeddings=kind not in BIDIRECTIONAL)
    masks = random_masks(find_groups(model)) if kind in OWN else random_masks(find_groups(model, "hidden_size"))
    masks[BLOCKS] = torch.tensor([True, False, True])
    masked = copy.deepcopy(model)
    apply_masks_(find_groups(masked), masks)
    shrink_(model, masks)
    torch.testing.assert_close(logits_of(model), logits_of(masked), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(reloaded), logits_of(model))
    for again in (model, reloaded):
        assert len(again.backbone.layers) == again.config.num_hidden_layers == 2
        assert [m.layer_idx for m in mixers(again)] == [0, 1]
        assert again.config.hidden_size == int(masks[STREAM].sum())
        for module in again.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                sizes = [getattr(module, n, None) for n in ("out_features", "in_features")]
                sizes = [s for s in sizes if s] or [module.num_embeddings, module.embedding_dim]
                assert list(module.weight.shape) == sizes
    if kind in OWN:
        for target in MIXER_TARGETS:
            kept = [int(masks[f"backbone.layers.{i}.mixer:{target}"].sum()) for i in (0, 2)]
            assert reloaded.config.widths(target) == kept
    if kind not in BIDIRECTIONAL:
        assert model.lm_head.weight is model.backbone.embeddings.weight, "tied: cut once, held twice"


@pytest.mark.parametrize("kind", [*LANGUAGE, "mamba", "falcon_mamba"])
def test_shallower_and_narrower_models_generate(kind):
    model = make(kind, num_hidden_layers=3)
    shrink_(model, {STREAM: torch.arange(20) % 3 > 0, BLOCKS: torch.tensor([False, True, True])})
    ids = batch_of(model)["input_ids"]
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    for position in range(ids.shape[1], out.shape[1]):  # with the cache and without
        assert torch.equal(out[:, position], model(out[:, :position]).logits[:, -1].argmax(-1))


def test_a_tied_parameter_is_scored_and_decayed_once():
    tied, untied = (make("lm", tie_word_embeddings=tie) for tie in (True, False))
    names = [view.name for view in group_of(tied, "hidden_size").scored_views()]
    assert len(names) + 1 == len(list(group_of(untied, "hidden_size").scored_views()))


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_layer_norms_refuse(kind):
    model = make(kind, norm="layer")
    assert "hidden_size" not in {g.target for g in find_groups(model)}
    with pytest.raises(ValueError, match="has no 'hidden_size' to prune: its LayerNorms subtract a mean"):
        find_groups(model, ["hidden_size"])
    shrink_(model, {BLOCKS: torch.tensor([False, True])})  # blocks do not mind


# ---- blocks ----
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_channels(kind):
    model = make(kind, num_hidden_layers=3)
    group = group_of(model, "num_hidden_layers")
    assert (group.name, group.size, group.layer) == (BLOCKS, 3, None)
    per_block = {"mamba": 2, "falcon_mamba": 2, "lm": 2, "lm_norms": 2}.get(kind, 4)  # out_proj, fc2; each with bias
    views = list(group.views())
    assert len(views) == 3 * per_block and {v.role for v in views} == {PRODUCER}
    norms = sum(v.norms().square() for v in views).sqrt()
    for i, layer in enumerate(model.backbone.layers):
        parts = [layer.mixer.out_proj, *([layer.mlp.fc2] if per_block == 4 else [])]
        flat = torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])
        torch.testing.assert_close(norms[i], flat.norm())


def test_blocks_leave_greedily_by_the_loss():
    """By hand: really cut, one at a time, the one without which the loss is lowest."""
    model = make("lm", num_hidden_layers=4)
    batches = [batch_of(model, seed=s) for s in range(2)]
    alive, gone = list(range(4)), []
    for _ in range(2):
        losses = {}
        for i in alive:
            cut = copy.deepcopy(model)
            shrink_(cut, {BLOCKS: torch.tensor([j in alive and j != i for j in range(4)])})
            losses[i] = sum(float(cut(**batch).loss) for batch in batches)
        gone.append(min(losses, key=losses.get))
        alive.remove(gone[-1])
    config = PruningConfig(targets=["num_hidden_layers"], sparsity=0.5)
    assert config.importance_of("num_hidden_layers") == "leave_one_out"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = select_channels(model, config, batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert masks[BLOCKS].tolist() == [i in alive for i in range(4)]
    scores = score_channels([group_of(model, "num_hidden_layers")], "leave_one_out", Calibration(model, batches))
    assert scores[BLOCKS].argsort()[:2].tolist() == gone
    table = prune_(model, config, batches)
    assert list(table) == [{"layer": None, "target": "num_hidden_layers", "before": 4, "after": 2}]
    assert table.parameters_after == model.num_parameters() and "  all  num_hidden_layers" in str(table)


def test_blocks_need_a_loss():
    model = make("lm")
    ids = {"input_ids": batch_of(model)["input_ids"]}
    with pytest.raises(ValueError, match="'leave_one_out' needs a loss"):
        prune_(model, PruningConfig(targets=["num_hidden_layers"]), [ids])
    with pytest.raises(BudgetError, match="Cannot remove 90.0% of the num_hidden_layers"):
        prune_(model, PruningConfig(targets=["num_hidden_layers"], sparsity=0.9, importance="random"))


def test_layers_of_different_widths_leave_with_their_widths():
    model = make("v2", num_hidden_layers=3, intermediate_size=[33, 0, 17], d_inner=[46, 30, 22])
    shrink_(model, {BLOCKS: torch.tensor([False, True, True])})
    config = model.config
    assert (config.intermediate_size, config.d_inner, config.num_hidden_layers) == ([0, 17], [30, 22], 2)
    shrink_(model, {BLOCKS: torch.tensor([True, False])})
    assert (config.intermediate_size, config.d_inner) == (0, 30)
    assert [g.layer for g in layer_groups(model)] == [0, 0, 0]


# ---- dt_rank by SVD ----
def svd_config(**more):
    return PruningConfig(targets=["dt_rank"], dt_rank_method="svd", round_to=1, floor=0.0, **more)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_NORMS])
def test_svd_is_the_best_of_its_rank(kind):
    model = make(kind)
    before = logits_of(model)
    products = {}
    for i, mixer in enumerate(mixers(model)):
        for s in ("", "_b") if kind == "v2" else ("",):
            x_proj, dt_proj = getattr(mixer, f"x_proj{s}"), getattr(mixer, f"dt_proj{s}")
            products[i, s] = (dt_proj.weight @ x_proj.weight[:5]).detach()
    align_(model, svd_config())
    torch.testing.assert_close(logits_of(model), before, atol=2e-5, rtol=1e-4)  # another basis, the same function
    prune_(model, svd_config(sparsity=0.4, scope="layer"))
    for (i, s), product in products.items():
        mixer = mixers(model)[i]
        x_proj, dt_proj = getattr(mixer, f"x_proj{s}"), getattr(mixer, f"dt_proj{s}")
        u, values, vt = torch.linalg.svd(product, full_matrices=False)
        best = u[:, :3] * values[:3] @ vt[:3]
        torch.testing.assert_close(dt_proj.weight @ x_proj.weight[:3], best, atol=1e-5, rtol=1e-4)
        sizes = [dt_proj.weight.norm(dim=0), x_proj.weight[:3].norm(dim=1)]
        torch.testing.assert_close(*sizes, rtol=1e-4, atol=1e-6)  # balanced


def test_svd_is_exact_where_the_rank_is_lower():
    model = make("lm")
    with torch.no_grad():
        for mixer in mixers(model):  # every channel in use, two dimensions in all
            mixer.x_proj.weight[:5] = torch.randn(5, 2) @ mixer.x_proj.weight[:2]
    before = logits_of(model)
    prune_(model, svd_config(sparsity=0.6))
    assert model.config.dt_rank == 2
    torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=1e-4)
    chosen = make("lm")
    prune_(chosen, PruningConfig(targets=["dt_rank"], sparsity=0.6, round_to=1))
    assert (logits_of(chosen) - before).abs().max() > 1e-2


def test_svd_leaves_a_dry_run_alone_and_knows_its_place():
    model = make("lm")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prune_(model, svd_config(), dry_run=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for kind in WITH_NORMS:
        with pytest.raises(ValueError, match="a norm stands between x_proj and dt_proj"):
            prune_(make(kind), svd_config(scope="layer"))
    with pytest.raises(ValueError, match='dt_rank_method="svd" needs the target dt_rank'):
        PruningConfig(dt_rank_method="svd")
