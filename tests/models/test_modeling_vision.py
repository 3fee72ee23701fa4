import copy
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import BIDIRECTIONAL, VISION, batch_of, logits_of, make, mixers
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from mamba_rsst import MambaForImageClassification, MambaMixer, MambaRsstVisionConfig, MambaVisionModel
from mamba_rsst.models import PRESETS
from mamba_rsst.models.modeling_mamba_rsst_vision import draw_branch_scales


PATCHES = 9  # 12 x 12 pixels in patches of 4 x 4
PLACES = {"none": [], "start": [0], "middle": [4], "end": [9], "both": [0, 10]}
LISTS = dict(d_inner=[46, 31, 22], intermediate_size=[33, 0, 17], d_state=[7, 4, 9], dt_rank=[5, 3, 2])
OPTIONS = [
    *[dict(bidirectional=b, use_bias=bias) for b in BIDIRECTIONAL for bias in (True, False)],
    *[dict(class_token=place) for place in PLACES],
    dict(norm="layer"),
    dict(intermediate_size=0),
    dict(use_conv_bias=False),
    dict(divide_out=False),
    dict(d_conv=1),
    dict(num_channels=1, image_size=8, patch_size=2),
    dict(num_hidden_layers=1),
    dict(num_hidden_layers=3, **LISTS),
]


def by_hand(model, pixels):
    """The model's logits, block by block from its parts."""
    config, backbone = model.config, model.backbone
    e = backbone.embeddings
    P = config.patch_size
    patches = pixels.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = list((patches @ e.patch_embeddings.weight.flatten(1).T + e.patch_embeddings.bias).unbind(1))
    for i, place in enumerate(PLACES[config.class_token]):
        x.insert(place, e.cls_token[0, i].expand(len(pixels), -1))
    x = torch.stack(x, dim=1) + e.position_embeddings

    def norm(module, x):
        if config.norm == "rms":
            return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * module.weight
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        return centred / scale * module.weight + module.bias

    for layer in backbone.layers:
        x = x + layer.mixer(norm(layer.norm, x))
        if layer.mlp is not None:
            h = norm(layer.norm2, x) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            x = x + h @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
    x = norm(backbone.norm_f, x)
    read = PLACES[config.class_token] or list(range(x.shape[1]))
    return x[:, read].mean(1) @ model.classifier.weight.T + model.classifier.bias


@pytest.mark.parametrize("class_token", PLACES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_equals_the_blocks_by_hand(class_token, norm):
    model = make("v2", class_token=class_token, norm=norm, layer_norm_epsilon=0.1)
    pixels = batch_of(model)["pixel_values"]
    with torch.no_grad():
        expected = by_hand(model, pixels)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("class_token", PLACES)
def test_where_the_class_token_stands(class_token):
    model = make("v2", class_token=class_token)
    e = model.backbone.embeddings
    torch.nn.init.zeros_(e.patch_embeddings.weight)
    torch.nn.init.zeros_(e.patch_embeddings.bias)
    torch.nn.init.zeros_(e.position_embeddings)
    tokens = e(batch_of(model)["pixel_values"])[0]
    assert tokens.shape == (PATCHES + len(PLACES[class_token]), 20)
    assert tokens.abs().sum(-1).nonzero().flatten().tolist() == PLACES[class_token]
    for i, place in enumerate(PLACES[class_token]):
        assert torch.equal(tokens[place], e.cls_token[0, i])


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
def test_saved_equals_reloaded(overrides, tmp_path):
    model = make(**{"kind": overrides.get("bidirectional", "v2"), **overrides})
    batch = batch_of(model)
    model.save_pretrained(tmp_path)
    for loader in (MambaForImageClassification, AutoModelForImageClassification):
        reloaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(reloaded) is MambaForImageClassification
        assert not any(info.values()), info
        assert reloaded.config.to_dict() == {**model.config.to_dict(), **_origin(reloaded)}
        assert torch.equal(logits_of(reloaded, batch), logits_of(model, batch))


def _origin(model):
    """What loading adds to a config."""
    config = model.config.to_dict()
    return {k: config[k] for k in ("_name_or_path", "architectures", "dtype", "auto_map") if k in config}


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
def test_gradients_reach_every_parameter(overrides):
    model = make(**{"kind": overrides.get("bidirectional", "v2"), **overrides}).train()
    model(**batch_of(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # A token that is read where its direction starts has no past there for the last block's decay to act on.
        starts = {"start": "1.mixer.A_log", "end": "1.mixer.A_b_log"}.get(overrides.get("class_token"), "-")
        assert parameter.grad.abs().max() > 0 or name.endswith(starts), name


def test_widths_of_each_layer():
    model = make("v2", num_hidden_layers=3, **LISTS)
    for i, layer in enumerate(model.backbone.layers):
        mixer = layer.mixer
        assert (mixer.d_inner, mixer.d_state, mixer.dt_rank) == tuple(
            LISTS[name][i] for name in ("d_inner", "d_state", "dt_rank")
        )
        assert mixer.A_log.shape == (LISTS["d_inner"][i], LISTS["d_state"][i])
        assert (layer.mlp.fc1.out_features if layer.mlp else 0) == LISTS["intermediate_size"][i]
        assert (layer.mlp is None) == (layer.norm2 is None)


def test_labels_as_indices_or_as_distributions():
    model = make("v2")
    batch = batch_of(model)
    hard = model(**batch)
    expected = -torch.log_softmax(hard.logits, -1)[torch.arange(3), batch["labels"]].mean()
    torch.testing.assert_close(hard.loss, expected)
    one_hot = F.one_hot(batch["labels"], 6).float()
    torch.testing.assert_close(model(batch["pixel_values"], labels=one_hot).loss, hard.loss)
    soft = torch.softmax(torch.randn(3, 6), -1)
    loss = model(batch["pixel_values"], labels=soft).loss
    torch.testing.assert_close(loss, -(soft * torch.log_softmax(hard.logits, -1)).sum(-1).mean())
    assert model(batch["pixel_values"]).loss is None


def test_outputs():
    model = make("v2")
    batch = batch_of(model)
    out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (3, 10, 20)
    loss, logits, states = model(**batch, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    assert all(torch.equal(a, b) for a, b in zip(states, out.hidden_states))
    assert model(**batch).hidden_states is None
    backbone = model.backbone(batch["pixel_values"])
    assert torch.equal(backbone.last_hidden_state, out.hidden_states[-1])
    assert torch.equal(model.backbone(batch["pixel_values"], return_dict=False)[0], backbone.last_hidden_state)
    assert torch.equal(model.backbone.embeddings(batch["pixel_values"]), out.hidden_states[0])


@pytest.mark.parametrize("shape", [(2, 3, 12, 11), (2, 3, 16, 16), (2, 1, 12, 12), (3, 12, 12)])
def test_images_of_another_size(shape):
    with pytest.raises(ValueError, match=r"`pixel_values` must be \(batch, 3, 12, 12\), got \("):
        make("v2")(torch.zeros(shape))


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_residual_stream_under_bf16(residual_in_fp32):
    model = make("v2", residual_in_fp32=residual_in_fp32)
    expected = logits_of(model)
    model = model.bfloat16()
    out = model(**batch_of(model), output_hidden_states=True)
    stream = torch.float32 if residual_in_fp32 else torch.bfloat16
    assert [x.dtype for x in out.hidden_states] == [torch.bfloat16, stream, torch.bfloat16]
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    # Every weight is rounded to 8 bits here, and so is every activation.
    assert (out.logits - expected).abs().max() <= 0.06 * expected.abs().max()


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_bf16_autocast_is_near_fp32(kind):
    model = make(kind).train()
    batch = batch_of(model)
    plain = model(**batch)
    grads = torch.autograd.grad(plain.loss, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    mixed_grads = torch.autograd.grad(mixed.loss, list(model.parameters()))
    # Matrix products round to 8 bits, one after the other through two blocks.
    assert (mixed.logits - plain.logits).abs().max() <= 0.05 * plain.logits.abs().max()
    for (name, parameter), a, b in zip(model.named_parameters(), mixed_grads, grads):
        assert a.dtype == parameter.dtype == torch.float32
        assert (a - b).norm() <= 0.1 * b.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_that_stay_fp32(dtype, tmp_path):
    model = make("v2")
    model.save_pretrained(tmp_path)
    loaded = MambaForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    own = ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")
    wide = {f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in own}
    assert {n for n, p in loaded.named_parameters() if p.dtype == torch.float32} == wide
    assert {n for n, p in loaded.named_parameters() if p.dtype == dtype} == set(dict(loaded.named_parameters())) - wide
    expected = logits_of(model)
    tolerance = {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]  # 8 and 11 bits, rounded at every layer
    assert (logits_of(loaded) - expected).abs().max() <= tolerance * expected.abs().max()
    loaded.save_pretrained(tmp_path / "again")
    again = MambaForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, batch_of(loaded)), logits_of(loaded))


def test_branch_scales_keep_the_expectation():
    scales = draw_branch_scales(0.3, 2, torch.ones(20000, 2, 3))
    assert scales.shape == (2, 2, 20000, 1, 1)
    assert (scales[0] == 1).all(), "rate 0 drops nothing"
    kept = 1 / (1 - torch.tensor(0.3)).item()
    assert sorted(scales[1].unique().tolist()) == pytest.approx([0.0, kept])
    for branch in scales[1]:
        assert abs(branch.mean().item() - 1.0) < 4 * (0.3 / 0.7 / 20000) ** 0.5
    assert (scales[1, 0] != scales[1, 1]).any(), "a block's branches are drawn apart"


def test_a_dropped_branch_leaves_the_sample_as_it_was():
    block = make("v2").backbone.layers[0].eval()
    x = torch.randn(3, 17, 20)
    scales = torch.ones(2, 3, 1, 1)
    scales[:, 1] = 0.0
    out = block(x, scales)
    assert torch.equal(out[1], x[1])
    assert torch.equal(out[0], block(x)[0])


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_blocks_of_equal_widths_share_compiled_code(rate):
    """One graph for the first block, whose input is the embedding, and at most one more for all others."""
    model = make("v2", num_hidden_layers=6, drop_path_rate=rate, d_inner=46, intermediate_size=33).train()
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.backbone.layers:
        block.compile(backend=counter, dynamic=False)
    model(**batch_of(model))
    assert 1 <= counter.frame_count <= 2
    torch._dynamo.reset()


def test_drop_path_rises_with_depth():
    model = make("v2", num_hidden_layers=5, drop_path_rate=0.2)
    kept = draw_branch_scales(0.2, 5, torch.ones(2000, 2, 3)).flatten(1).amax(1)
    assert torch.allclose(1 - 1 / kept, torch.tensor([0.0, 0.05, 0.1, 0.15, 0.2]), atol=1e-6)
    assert (draw_branch_scales(0.2, 1, torch.ones(2000, 2, 3)) == 1).all()
    same = make("v2", num_hidden_layers=5)
    assert torch.equal(logits_of(model), logits_of(same)), "none in evaluation"
    batch = batch_of(model, count=32)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_gradient_checkpointing(kind):
    model = make(kind, drop_path_rate=0.5, hidden_dropout_prob=0.1).train()
    batch = batch_of(model)
    calls = []
    for mixer in mixers(model):
        mixer.register_forward_hook(lambda *args: calls.append(1))

    def gradients():
        torch.manual_seed(5)
        calls.clear()
        return torch.autograd.grad(model(**batch).loss, list(model.parameters()))

    plain = gradients()
    assert len(calls) == 2
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == 4, "each block runs again in the backward pass"


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_compiled(kind):
    model = make(kind).train()
    batch = batch_of(model)
    plain = model(**batch)
    grads = torch.autograd.grad(plain.loss, list(model.parameters()))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    out = compiled(**batch)
    torch.testing.assert_close(out.logits, plain.logits)
    torch.testing.assert_close(torch.autograd.grad(out.loss, list(compiled.parameters())), grads)


def test_initial_weights():
    config = MambaRsstVisionConfig(**{**VISION, "hidden_size": 64, "d_inner": 150, "num_hidden_layers": 3})
    model = MambaForImageClassification(config)
    for mixer in mixers(model):
        assert isinstance(mixer, MambaMixer)
        for conv1d, _, dt_proj, A_log, D in mixer.directions():
            assert torch.equal(A_log, torch.arange(1.0, 8.0).log().expand(150, 7))
            assert torch.equal(D, torch.ones(150))
            dt = F.softplus(dt_proj.bias)
            assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
            # log-uniform: the middle of the range is its geometric mean
            assert abs(dt.log().mean() - math.log(1e-2)) < 5 * math.log(100) / math.sqrt(12 * 150)
            assert dt_proj.weight.abs().max() <= 5**-0.5 and dt_proj.weight.std() > 0.5 * 5**-0.5 / math.sqrt(3)
            assert (conv1d.bias == 0).all()
        assert (mixer.in_proj.bias == 0).all()
        assert mixer.A_log is not mixer.A_b_log and mixer.D is not mixer.D_b
        # uniform in +-1 / sqrt(fan in), scaled down for six additions to the residual stream
        for weight, scale in ((mixer.in_proj.weight, 1.0), (mixer.out_proj.weight, 6**-0.5)):
            bound = weight.shape[1] ** -0.5 * scale
            assert 0.95 * bound <= weight.abs().max() <= bound
    for layer in model.backbone.layers:
        assert 0.95 * (33 * 6) ** -0.5 <= layer.mlp.fc2.weight.abs().max() <= (33 * 6) ** -0.5
        assert (layer.norm.weight == 1).all()
    e = model.backbone.embeddings
    assert 0.01 < e.cls_token.std() < 0.03 and 0.01 < e.position_embeddings.std() < 0.03
    assert 0.01 < model.classifier.weight.std() < 0.03 and (model.classifier.bias == 0).all()


def test_residual_scale_can_be_switched_off():
    bounds = []
    for rescale in (True, False):
        model = MambaForImageClassification(MambaRsstVisionConfig(**VISION, rescale_prenorm_residual=rescale))
        bounds.append(mixers(model)[0].out_proj.weight.abs().max().item())
    assert bounds[1] == pytest.approx(46**-0.5, rel=0.05) and bounds[0] == pytest.approx((46 * 4) ** -0.5, rel=0.05)


def test_a_missing_parameter_is_initialised(tmp_path):
    """A checkpoint without some weights gets them as a new model would, and keeps those it has."""
    model = make("v1")
    model.save_pretrained(tmp_path)
    loaded = MambaForImageClassification.from_pretrained(tmp_path, bidirectional="v2")
    for old, new in zip(mixers(model), mixers(loaded)):
        assert torch.equal(new.A_b_log, old.A_b_log) and torch.equal(new.D, old.D)
        assert torch.equal(new.dt_proj.bias, old.dt_proj.bias)
        assert torch.equal(new.out_proj.weight, old.out_proj.weight)
        assert (new.D_b == 1).all() and (new.conv1d_b.bias == 0).all()
        assert F.softplus(new.dt_proj_b.bias).min() >= 1e-3 * 0.999


def test_no_weight_decay_names():
    model = make("v2")
    expected = {"classifier.bias", "backbone.norm_f.weight", "backbone.embeddings.patch_embeddings.bias"}
    expected |= {"backbone.embeddings.cls_token", "backbone.embeddings.position_embeddings"}
    vectors = ("in_proj.bias", "out_proj.bias", "conv1d.bias", "conv1d_b.bias", "dt_proj.bias", "dt_proj_b.bias")
    for i in range(2):
        layer = f"backbone.layers.{i}"
        expected |= {f"{layer}.mixer.{name}" for name in (*vectors, "A_log", "A_b_log", "D", "D_b")}
        expected |= {f"{layer}.{name}" for name in ("norm.weight", "norm2.weight", "mlp.fc1.bias", "mlp.fc2.bias")}
    assert model.no_weight_decay() == expected
    assert model.backbone.no_weight_decay() == {n.removeprefix("backbone.") for n in expected if "class" not in n}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    config = MambaRsstVisionConfig.preset(name, num_labels=10)
    with torch.device("meta"):
        model = MambaForImageClassification(config)
    assert len(model.backbone.layers) == config.num_hidden_layers
    D, E, N, R, F_ = config.hidden_size, 2 * config.hidden_size, config.d_state, config.hidden_size // 16, 4
    direction = E * 4 + E + (R + 2 * N) * E + R * E + E + E * N + E
    block = 2 * D * E + 2 * direction + E * D + (2 * F_ * D * D + F_ * D + D) + 2 * D
    rest = 48 * D + D + D + 65 * D + D + 10 * D + 10
    assert model.num_parameters() == config.num_hidden_layers * block + rest


def test_a_preset_runs():
    model = MambaForImageClassification(MambaRsstVisionConfig.preset("mamba_tiny", num_hidden_layers=2))
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 2)


def test_pipeline(tmp_path):
    names = {i: f"class {i}" for i in range(6)}
    model = make("v2", id2label=names, label2id={v: k for k, v in names.items()})
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
    processor.save_pretrained(tmp_path)
    image = Image.fromarray((torch.rand(20, 15, 3) * 255).byte().numpy())
    found = pipeline("image-classification", model=str(tmp_path), device="cpu")(image, top_k=6)
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt")["pixel_values"]).logits
    expected = torch.softmax(logits[0], -1)
    assert [entry["label"] for entry in found] == [names[i.item()] for i in expected.argsort(descending=True)]
    assert [e["score"] for e in found] == pytest.approx(expected.sort(descending=True).values.tolist(), rel=1e-4)


def test_backbone_alone(tmp_path):
    model = make("v2")
    model.save_pretrained(tmp_path)
    backbone = MambaVisionModel.from_pretrained(tmp_path)
    pixels = batch_of(model)["pixel_values"]
    assert torch.equal(backbone(pixels).last_hidden_state, model.backbone(pixels).last_hidden_state)
