"""The cache by both its names, with every version of transformers; and nothing deprecated in what the models do."""

import inspect
import logging

import pytest
import torch
from test_language_cache import CLOSE, tokens
from tiny import make, mixers
from transformers import DynamicCache

from mamba_rsst import speed


NAMES = ["cache", "cache_params"]


def filled(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    return cache


@pytest.fixture
def said(monkeypatch):
    """What transformers logs from here on, though it may have said it before."""
    records = []
    logger = logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    monkeypatch.setattr(type(logger), "warning_once", lambda self, *args, **kwargs: self.warning(*args, **kwargs))
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_forward_takes_both_names(name):
    model, ids = make("lm"), tokens()
    expected = model(ids)
    found = model(ids[:, 9:], **{name: filled(model, ids[:, :9])})
    torch.testing.assert_close(found.logits, expected.logits[:, 9:], **CLOSE)
    found = model.backbone(ids[:, 9:], **{name: filled(model, ids[:, :9])})
    torch.testing.assert_close(found.last_hidden_state, model.backbone(ids).last_hidden_state[:, 9:], **CLOSE)
    x = torch.randn(2, 12, 20)
    for module in (model.backbone.layers[0], mixers(model)[0]):
        cache = DynamicCache(config=model.config)
        parts = [module(part, **{name: cache}) for part in x.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), module(x), **CLOSE)


@pytest.mark.parametrize("output", [lambda model, ids: model(ids), lambda model, ids: model.backbone(ids)])
def test_outputs_are_read_by_both_names(output):
    model = make("lm")
    out = output(model, tokens())
    assert list(out.keys())[1:] == ["cache"] and isinstance(out.cache, DynamicCache)
    for name in NAMES:
        assert name in out and getattr(out, name) is out[name] is out.get(name) is out[1] is out.cache
    without = model(tokens(), use_cache=False)
    for name in NAMES:
        assert name not in without and getattr(without, name) is None and without.get(name) is None
    with pytest.raises(KeyError):
        without["cache_params"]


def test_both_at_once_are_refused():
    model, ids = make("lm"), tokens()
    cache = filled(model, ids)
    with pytest.raises(ValueError, match="one of `cache` and `cache_params`"):
        model(ids, cache=cache, cache_params=cache)
    with torch.no_grad():
        expected = model(ids[:, :1], cache=filled(model, ids)).logits
        assert torch.equal(model(ids[:, :1], cache=cache, cache_params=None).logits, expected)


def test_speed_takes_the_current_name():
    assert speed.cache_name(make("lm")) == "cache"
    assert speed.cache_name(make("mamba")) in NAMES
    assert speed.cache_name(make("v2")) is None
    assert set(NAMES) <= set(inspect.signature(make("lm").forward).parameters)


@pytest.mark.filterwarnings("ignore:.*is deprecated.*`MambaForCausalLM.generate`:FutureWarning")
def test_generate_goes_on_from_a_given_cache():
    model, ids = make("lm"), tokens()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **options)[:, ids.shape[1] :]
    with torch.no_grad():
        cache = filled(model, ids[:, :9])
    # By its name in generate(), which is transformers' own.
    name = speed.cache_name(make("mamba"))
    found = model.generate(ids[:, 9:], **options, **{name: cache})
    assert torch.equal(found[:, ids.shape[1] - 9 :], expected)


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [dict(), dict(do_sample=True), dict(num_beams=2), dict(cache_implementation="static"), dict(use_cache=False)],
    ids=str,
)
def test_nothing_deprecated_is_used(said, options):
    model, ids = make("lm"), tokens()
    model(ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=3, **{"do_sample": False, "eos_token_id": None, **options})
    assert not [message for message in said if "deprecated" in message]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_either_name_compiles_whole(name):
    model, ids = make("lm"), tokens()
    expected, cache = model(ids).logits[:, 20], filled(model, ids[:, :20])
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(ids[:, 20:21].clone(), **{name: cache}).logits[:, 0], expected, **CLOSE)
