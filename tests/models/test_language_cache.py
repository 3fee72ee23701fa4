"""Padding, the cache and generation: whatever the pieces a sequence comes in, it gives what one pass gives."""

import pytest
import torch
import transformers
from tiny import LANGUAGE, batch_of, layer_groups, make, mixers, random_masks
from transformers import CompileConfig, DynamicCache, StaticCache

from mamba_rsst import MambaForCausalLM, shrink_


CLOSE = dict(atol=1e-5, rtol=1e-5)


def tokens(count=2, length=23, seed=3):
    return torch.randint(1, 53, (count, length), generator=torch.Generator().manual_seed(seed))


def returned_cache(out):
    """What generate() returns the cache as: since transformers 5.24 `cache`, before `past_key_values`."""
    return out["cache" if "cache" in out else "past_key_values"]


def in_pieces(model, ids, lengths, **inputs):
    """The logits of one sequence given in calls of these lengths."""
    cache, parts = DynamicCache(config=model.config), []
    for piece in ids.split(lengths, dim=1):
        parts.append(model(piece, cache=cache, **inputs).logits)
    return torch.cat(parts, dim=1), cache


PIECES = [[23], [1] * 23, [2, 1, 20], [1, 1, 15, 1, 5], [16, 7], [22, 1]]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", LANGUAGE)
@pytest.mark.parametrize("lengths", PIECES, ids=str)
def test_pieces_equal_one_pass(kind, lengths, grad):
    """Prefill, chunks and single tokens in any order; with gradients single tokens take the scan, else `_step`."""
    model, ids = make(kind), tokens()
    with torch.set_grad_enabled(grad):
        expected = model(ids, use_cache=False).logits
        logits, cache = in_pieces(model, ids, lengths)
    torch.testing.assert_close(logits, expected, **CLOSE)
    whole = model(ids).cache
    for layer, other in zip(cache.layers, whole.layers):
        torch.testing.assert_close(layer.recurrent_states[0], other.recurrent_states[0].detach(), **CLOSE)
        torch.testing.assert_close(layer.conv_states[0], other.conv_states[0].detach(), **CLOSE)
        assert not layer.recurrent_states[0].requires_grad and not layer.conv_states[0].requires_grad


@pytest.mark.parametrize(
    "overrides", [dict(d_conv=1), dict(d_conv=4), dict(use_conv_bias=False, use_bias=False)], ids=str
)
@torch.no_grad()
def test_pieces_equal_one_pass_with_other_options(overrides):
    model, ids = make("lm", **overrides), tokens()
    expected = model(ids).logits
    torch.testing.assert_close(in_pieces(model, ids, [3, 1, 1, 18])[0], expected, **CLOSE)


def test_gradients_stop_at_the_cache():
    """The last chunk has the gradients it would have with the earlier ones taken as given."""
    model, ids = make("lm"), tokens()
    _, cache = in_pieces(model, ids[:, :15], [8, 7])
    loss = model(ids[:, 15:], cache=cache, labels=ids[:, 15:]).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in grads)
    with torch.no_grad():
        _, cache = in_pieces(model, ids[:, :15], [15])
    again = torch.autograd.grad(model(ids[:, 15:], cache=cache, labels=ids[:, 15:]).loss, list(model.parameters()))
    for a, b in zip(grads, again):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", LANGUAGE)
@torch.no_grad()
def test_left_padding_equals_none(kind, use_bias):
    model = make(kind, use_bias=use_bias)
    ids, lengths = tokens(3, 12), (12, 7, 1)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    padded = ids * mask
    batch = model(padded, attention_mask=mask)
    chunked, cache = [], DynamicCache(config=model.config)
    for start, end in ((0, 4), (4, 11), (11, 12)):  # the mask of all tokens so far, or of these alone
        given = mask[:, :end] if start == 4 else mask[:, start:end]
        chunked.append(model(padded[:, start:end], attention_mask=given, cache=cache).logits)
    chunked = torch.cat(chunked, dim=1)
    following = model(ids[:, :1], cache=batch.cache).logits
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, 12 - n :])
        torch.testing.assert_close(batch.logits[row, 12 - n :], alone.logits[0], **CLOSE)
        torch.testing.assert_close(chunked[row, 12 - n :], alone.logits[0], **CLOSE)
        next_alone = model(ids[row : row + 1, :1], cache=alone.cache)
        torch.testing.assert_close(following[row], next_alone.logits[0], **CLOSE)


@pytest.fixture(scope="module", params=["mamba", "falcon_mamba"])
def pair(request, tmp_path_factory):
    """transformers' own model and ours of the same weights. Without biases: with them its padding leaks."""
    stock = make(request.param, use_bias=False)
    folder = tmp_path_factory.mktemp(request.param)
    stock.save_pretrained(folder)
    return stock, MambaForCausalLM.from_pretrained(folder)


GENERATE = [
    dict(do_sample=False),
    dict(do_sample=True, top_k=20, temperature=1.3, num_return_sequences=2),
    dict(num_beams=3, do_sample=False, num_return_sequences=2),
    dict(do_sample=False, use_cache=False),
    dict(do_sample=False, repetition_penalty=1.5, min_new_tokens=9, eos_token_id=5),
]


@pytest.mark.parametrize("options", GENERATE, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_equals_transformers(pair, options, padded):
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = mask[2, :5] = 0
        ids = ids * mask
    found = []
    for model in reversed(pair):
        torch.manual_seed(7)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=11,
                return_dict_in_generate=True,
                output_scores=True,
                **{"eos_token_id": None, **options},
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(found[0].scores, found[1].scores):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_cut_model_generates_with_its_own_states(kind):
    """Every layer's states have that layer's widths; with the cache or without, the same tokens."""
    model = make(kind, num_hidden_layers=3)
    shrink_(model, random_masks(layer_groups(model), seed=4))
    assert len({mixer.d_inner for mixer in mixers(model)}) == 3
    ids = tokens()
    cache = model(ids).cache
    for layer, mixer in zip(cache.layers, mixers(model)):
        assert layer.recurrent_states[0].shape == (2, mixer.d_inner, mixer.d_state)
        assert layer.conv_states[0].shape == (2, mixer.d_inner, 3)
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


def test_going_on_from_a_returned_cache():
    model, ids = make("lm"), tokens()
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(out.sequences[:, -1:], cache=returned_cache(out)).logits
        expected = model(out.sequences).logits[:, -1:]
    torch.testing.assert_close(logits, expected, **CLOSE)


@torch.no_grad()
def test_states_stay_where_they_are():
    """A captured step writes to the addresses that it was captured with; only these may change."""
    model, ids = make("lm"), tokens()
    cache = model(ids[:, :5]).cache
    states = [x for layer in cache.layers for x in (layer.conv_states[0], layer.recurrent_states[0])]
    before = [x.data_ptr() for x in states]
    for t in range(5, 9):
        model(ids[:, t : t + 1], cache=cache)
    model(ids[:, 9:], cache=cache)
    after = [x for layer in cache.layers for x in (layer.conv_states[0], layer.recurrent_states[0])]
    assert [x.data_ptr() for x in after] == before


@torch.no_grad()
def test_a_step_sees_changed_weights():
    """Nothing derived from a parameter is kept between steps, not even behind autograd's back."""
    model, ids = make("lm"), tokens()
    cache = model(ids[:, :5]).cache
    model(ids[:, 5:6], cache=cache)
    for mixer in mixers(model):
        mixer.A_log.data.add_(0.5)
    cache = model(ids[:, :5]).cache
    torch.testing.assert_close(model(ids[:, 5:6], cache=cache).logits[:, 0], model(ids[:, :6]).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_bf16_steps_are_as_near_fp32_as_one_pass(tmp_path):
    make("lm_norms").save_pretrained(tmp_path)
    model, ids = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tokens()
    whole, (found, cache) = model(ids).logits, in_pieces(model, ids, [10] + [1] * 13)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].conv_states[0].dtype == torch.bfloat16
    exact = model.float()(ids).logits
    for logits in (whole, found):  # 8 bits, rounded at every layer
        assert (logits - exact).norm() <= 0.02 * exact.norm()


@torch.no_grad()
def test_fp64_steps_are_fp64():
    model, ids = make("lm_norms", residual_in_fp32=False).double(), tokens()
    cache = DynamicCache(config=model.config)
    found = [model.backbone(x, cache=cache).last_hidden_state for x in ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), model.backbone(ids).last_hidden_state, atol=1e-12, rtol=1e-12)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float64


@pytest.mark.parametrize("kind", LANGUAGE)
@torch.no_grad()
def test_a_step_compiles_whole(kind):
    model, ids = make(kind), tokens()
    expected = model(ids).logits
    cache = model(ids[:, :20]).cache
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for t in range(20, 23):
        logits = step(ids[:, t : t + 1].clone(), cache=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], **CLOSE)


def test_generate_compiles_by_itself_with_a_static_cache():
    """On accelerators transformers compiles each step once `cache_implementation="static"` is asked for."""
    model, ids = make("lm"), tokens(2, 6)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **options)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    out = model.generate(
        ids, **options, cache_implementation="static", compile_config=compiling, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected)
    assert type(returned_cache(out)) is StaticCache
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph for all steps"


def test_an_assistant_may_record_its_past():
    """As transformers' assisted generation asks of an assistant's cache; it keeps more of the convolution's input."""
    model, ids = make("lm"), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        parts = [model(x, cache=cache).logits for x in ids.split([9, 1, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    assert cache.layers[0].conv_states[0].shape[-1] == 23


def test_text_generation_pipeline_finds_the_class(tmp_path):
    make("lm").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.can_generate() and model.generation_config.pad_token_id == 0
    ids = batch_of(model)["input_ids"]
    assert model.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (3, 12)
