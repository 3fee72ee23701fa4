"""The causal language model against transformers' own classes, and by itself. Its cache: test_language_cache.py."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import LANGUAGE, LM, batch_of, logits_of, make, mixers
from transformers import AutoModelForCausalLM

from mamba_rsst import MambaForCausalLM, MambaRsstConfig, MambaRsstModel, find_groups


LISTS = dict(d_inner=[46, 31, 22], intermediate_size=[33, 0, 17], d_state=[7, 4, 9], dt_rank=[5, 3, 2])
OPTIONS = [
    *({**overrides, "tie_word_embeddings": tied} for overrides in LANGUAGE.values() for tied in (True, False)),
    dict(norm="layer", intermediate_size=33),
    dict(use_bias=False, use_conv_bias=False),
    dict(residual_in_fp32=False),
    dict(d_conv=1),
    dict(num_hidden_layers=3, **LISTS),
]
STOCK_OPTIONS = [
    dict(),
    dict(use_bias=False, tie_word_embeddings=False),
    dict(use_conv_bias=False),
    dict(layer_norm_epsilon=0.1, time_step_rank="auto"),
    dict(conv_kernel=4, residual_in_fp32=False),
]


def stock_and_ours(tmp_path, kind="mamba", **overrides):
    """A model of transformers' class, perturbed, and this package's, loaded from the folder it was saved to."""
    stock = make(kind, **overrides)
    stock.save_pretrained(tmp_path)
    ours, info = MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    return stock, ours


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("overrides", STOCK_OPTIONS, ids=str)
def test_equals_transformers(kind, overrides, tmp_path):
    """Logits, loss and every gradient, by the parameters' names."""
    if kind == "falcon_mamba":
        overrides = {"mixer_rms_eps": 0.01, **overrides}
    stock, ours = stock_and_ours(tmp_path, kind, **overrides)
    batch = batch_of(stock)
    expected, out = stock(**batch), ours(**batch)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)
    names = dict(stock.named_parameters())
    assert set(names) == set(dict(ours.named_parameters()))
    wanted = torch.autograd.grad(expected.loss, list(names.values()))
    found = torch.autograd.grad(out.loss, [ours.get_parameter(name) for name in names])
    for name, a, b in zip(names, found, wanted):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, b.abs().max().item()), rtol=0, msg=name)


def test_tied_embeddings_count_once():
    tied, untied = make("lm"), make("lm", tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embeddings.weight
    assert untied.num_parameters() - tied.num_parameters() == 53 * 20


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
def test_saved_equals_reloaded(overrides, tmp_path):
    model = make("lm", **overrides)
    model.save_pretrained(tmp_path)
    for loader in (MambaForCausalLM, AutoModelForCausalLM):
        reloaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(reloaded) is MambaForCausalLM and not any(info.values()), info
        assert torch.equal(logits_of(reloaded), logits_of(model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mamba_rsst"


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
def test_gradients_reach_every_parameter(overrides):
    model = make("lm", **overrides).train()
    model(**batch_of(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", LANGUAGE)
def test_gradient_checkpointing_changes_nothing(kind):
    model = make(kind).train()
    batch = batch_of(model)
    plain = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    out = model(**batch, use_cache=True)
    assert out.cache is None
    for a, b in zip(torch.autograd.grad(out.loss, list(model.parameters())), plain):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_loss_is_of_the_next_token_and_knows_the_number_of_items():
    model = make("lm")
    ids = batch_of(model)["input_ids"]
    labels = ids.clone()
    labels[0, :4] = labels[2, 7] = -100
    out = model(ids, labels=labels)
    chosen = labels[:, 1:] != -100
    every = F.cross_entropy(out.logits[:, :-1][chosen], labels[:, 1:][chosen], reduction="none")
    torch.testing.assert_close(out.loss, every.mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, every.sum() / 50)
    assert model.accepts_loss_kwargs
    assert model(ids).loss is None


def test_outputs():
    model = make("lm_mlp")
    batch = batch_of(model)
    ids = batch["input_ids"]
    out = model(**batch, output_hidden_states=True)
    assert out.logits.shape == (3, 10, 53) and out.logits.dtype == torch.float32
    assert [tuple(x.shape) for x in out.hidden_states] == [(3, 10, 20)] * 3
    assert torch.equal(out.hidden_states[0], model.backbone.embeddings(ids))
    loss, logits, cache, states = model(**batch, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits) and cache.has_previous_state()
    assert torch.equal(states[-1], model.backbone(ids).last_hidden_state)
    assert torch.equal(model.backbone(ids, return_dict=False)[0], states[-1])
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, out.logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": states[0]}):
        with pytest.raises(ValueError, match="Give either `input_ids` or `inputs_embeds`"):
            model(**wrong)


@pytest.mark.parametrize("keep, positions", [(0, range(10)), (1, [9]), (3, [7, 8, 9]), (torch.tensor([0, 4]), [0, 4])])
def test_logits_to_keep(keep, positions):
    model = make("lm")
    ids = batch_of(model)["input_ids"]
    kept = model(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, model(ids).logits[:, list(positions)], atol=1e-6, rtol=1e-6)


def test_embeddings_can_be_resized():
    model = make("lm")
    before = logits_of(model)
    model.resize_token_embeddings(60, mean_resizing=False)
    assert model.config.vocab_size == 60 and model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(model, {"input_ids": batch_of(make("lm"))["input_ids"]})[..., :53], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_that_stay_fp32(dtype, tmp_path):
    model = make("lm_norms")
    model.save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wide = {f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in ("A_log", "D", "dt_proj.bias")}
    assert {n for n, p in loaded.named_parameters() if p.dtype == torch.float32} == wide
    assert {n for n, p in loaded.named_parameters() if p.dtype == dtype} == set(dict(loaded.named_parameters())) - wide
    expected, found = logits_of(model), logits_of(loaded)
    assert found.dtype == torch.float32
    # 8 and 11 bits, rounded at every layer
    assert (found - expected).abs().max() <= {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype] * expected.abs().max()


def test_a_stock_config_keeps_its_dtype(tmp_path):
    make("mamba").bfloat16().save_pretrained(tmp_path)
    assert MambaForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_initial_weights():
    model = MambaForCausalLM(MambaRsstConfig(**{**LM, "intermediate_size": 33, "initializer_range": 0.3}))
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert torch.equal(mixer.A_log[3], torch.arange(1, 8.0).log()) and (mixer.D == 1).all()
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 0.001 * 0.999 and dt.max() <= 0.1 * 1.001 and dt.std() > 0.005
        assert mixer.dt_proj.weight.abs().max() <= 5**-0.5 and (mixer.in_proj.bias == 0).all()
        # two additions a layer, two layers
        assert 0.8 * (46 * 4) ** -0.5 <= mixer.out_proj.weight.abs().max() <= (46 * 4) ** -0.5
        assert 0.8 * (33 * 4) ** -0.5 <= layer.mlp.fc2.weight.abs().max() <= (33 * 4) ** -0.5
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_backbone_alone(tmp_path):
    model = make("lm")
    model.save_pretrained(tmp_path)
    ids = batch_of(model)["input_ids"]
    backbone = MambaRsstModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


def test_no_weight_decay_names():
    model = make("lm_mlp", tie_word_embeddings=False)
    decayed = set(dict(model.named_parameters())) - model.no_weight_decay()
    matrices = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    expected = {f"backbone.layers.{i}.mixer.{name}.weight" for i in range(2) for name in matrices}
    expected |= {f"backbone.layers.{i}.mlp.{name}.weight" for i in range(2) for name in ("fc1", "fc2")}
    assert decayed == expected | {"backbone.embeddings.weight", "lm_head.weight"}


@pytest.mark.parametrize("kind", LANGUAGE)
def test_forward_compiles_whole(kind):
    model = make(kind)
    batch = batch_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**batch, use_cache=False)
    torch.testing.assert_close(out.logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(out.loss, list(model.parameters())), wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_bf16_autocast_is_near_fp32(kind):
    model = make(kind).train()
    batch = batch_of(model)
    plain = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    assert (mixed.logits - plain.logits).abs().max() <= 0.05 * plain.logits.abs().max()
    assert mixed.loss.item() == pytest.approx(plain.loss.item(), rel=0.02)


def test_the_130m_shape():
    with torch.device("meta"):
        model = MambaForCausalLM(MambaRsstConfig())
        stock = transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=24))
    assert model.num_parameters() == stock.num_parameters() == 129_135_360
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert len(find_groups(model, ["d_inner"])) == 24
    assert math.isclose(mixers(model)[0].dt_rank, 768 / 16)
