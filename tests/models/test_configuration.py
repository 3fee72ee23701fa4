import json

import pytest
import torch
from tiny import TINY
from transformers import AutoConfig, FalconMambaConfig, MambaConfig

from mamba_rsst import MambaRsstConfig, MambaRsstVisionConfig
from mamba_rsst.models import PRESETS, config_from_transformers


BOTH = [MambaRsstConfig, MambaRsstVisionConfig]


@pytest.mark.parametrize("cls", BOTH)
def test_defaults_are_resolved(cls):
    config = cls(hidden_size=100, num_hidden_layers=3)
    assert (config.d_inner, config.dt_rank, config.d_state, config.intermediate_size) == (200, 7, 16, 0)
    assert cls(hidden_size=100, expand=1.5).d_inner == 150


@pytest.mark.parametrize("cls", BOTH)
def test_widths_win_over_expand(cls):
    config = cls(**TINY, expand=4)
    assert (config.d_inner, config.dt_rank) == (46, 5)
    assert json.loads(config.to_json_string())["d_inner"] == 46


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("name", ["d_inner", "d_state", "dt_rank", "intermediate_size"])
def test_one_width_per_layer(cls, name, tmp_path):
    config = cls(num_hidden_layers=3, **{name: [4, 5, 4]})
    assert getattr(config, name) == [4, 5, 4] and config.widths(name) == [4, 5, 4]
    config.save_pretrained(tmp_path)
    reloaded = cls.from_pretrained(tmp_path)
    assert getattr(reloaded, name) == [4, 5, 4]
    assert reloaded.to_dict() == config.to_dict()
    config.set_widths(name, [6, 6, 6])
    assert getattr(config, name) == 6 and config.widths(name) == [6, 6, 6]


def test_widths_are_copies():
    config = MambaRsstVisionConfig(num_hidden_layers=2, d_inner=[4, 5])
    config.widths("d_inner")[0] = 99
    assert config.d_inner == [4, 5]
    given = [6, 7]
    config.set_widths("d_inner", given)
    given[0] = 99
    assert config.d_inner == [6, 7]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"d_inner": 0}, "`d_inner` must be an int >= 1 or a list of them, got 0"),
        ({"d_inner": [4, 0]}, r"`d_inner` must be an int >= 1 or a list of them, got \[4, 0\]"),
        ({"d_inner": [4, 4, 4]}, "`d_inner` has 3 entries but `num_hidden_layers` is 2"),
        ({"d_inner": []}, "`d_inner` has 0 entries"),
        ({"d_state": True}, "`d_state` must be an int"),
        ({"d_state": 7.0}, "d_state"),
        ({"dt_rank": "all"}, "`dt_rank` must be an int"),
        ({"intermediate_size": -1}, "`intermediate_size` must be an int >= 0"),
        ({"hidden_size": 0}, "`hidden_size` must be an integer >= 1, got 0"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be an integer >= 1"),
        ({"d_conv": 0}, "`d_conv` must be an integer >= 1"),
        ({"expand": 0}, "`expand` must be a number"),
        ({"norm": "batch"}, r"`norm` must be one of \['rms', 'layer'\], got 'batch'"),
        ({"time_step_min": 0.2}, "`time_step_max` must be a number >= 0.2"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` must be a number"),
    ],
)
def test_wrong_values(cls, fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cls(**{"num_hidden_layers": 2, **fields})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patch_size": 5}, "`patch_size` 5 does not divide `image_size` 32"),
        ({"bidirectional": "v3"}, r"`bidirectional` must be one of \['none', 'v1', 'v2'\], got 'v3'"),
        ({"class_token": "first"}, "`class_token` must be one of .*'both', 'none'.*, got 'first'"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate` must be a number in"),
        ({"hidden_dropout_prob": -0.1}, "`hidden_dropout_prob` must be a number in"),
        ({"num_channels": 0}, "`num_channels` must be an integer"),
    ],
)
def test_wrong_vision_values(fields, message):
    with pytest.raises(ValueError, match=message):
        MambaRsstVisionConfig(**fields)


def test_wrong_language_values():
    with pytest.raises(ValueError, match="`vocab_size` must be an integer >= 1"):
        MambaRsstConfig(vocab_size=0)
    with pytest.raises(ValueError, match="`mixer_rms_eps` must be a number >= 0"):
        MambaRsstConfig(mixer_rms_eps=-1.0)


@pytest.mark.parametrize("stock", [MambaConfig, FalconMambaConfig])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(hidden_size=20, expand=3, state_size=7, time_step_rank=5, conv_kernel=3, num_hidden_layers=4),
        dict(use_bias=True, use_conv_bias=False, residual_in_fp32=False, tie_word_embeddings=False, vocab_size=9),
        dict(intermediate_size=70, time_step_max=0.2, time_step_floor=1e-3, initializer_range=0.3, eos_token_id=[1]),
    ],
    ids=str,
)
def test_from_transformers(stock, fields, tmp_path):
    given = stock(**fields)
    given.save_pretrained(tmp_path)
    config = MambaRsstConfig.from_pretrained(tmp_path)
    assert type(config) is MambaRsstConfig and config.model_type == "mamba_rsst"
    same = ("hidden_size", "num_hidden_layers", "vocab_size", "use_bias", "use_conv_bias", "residual_in_fp32")
    same += ("tie_word_embeddings", "time_step_max", "time_step_floor", "initializer_range", "eos_token_id")
    assert {name: getattr(config, name) for name in same} == {name: getattr(given, name) for name in same}
    assert (config.d_inner, config.d_state) == (given.intermediate_size, given.state_size)
    assert (config.dt_rank, config.d_conv, config.intermediate_size) == (given.time_step_rank, given.conv_kernel, 0)
    assert config.mixer_rms_eps == (1e-6 if stock is FalconMambaConfig else None)
    assert config_from_transformers(given.to_dict()).to_dict() == {**config.to_dict(), "_name_or_path": ""}


def test_from_transformers_config_files_of_old():
    """What lies on the Hub has leftovers of earlier formats, leaves defaults out, and an `expand` that is not used."""
    old = dict(model_type="mamba", d_model=768, d_inner=1536, n_layer=24, ssm_cfg={}, fused_add_norm=True, expand=16)
    old |= dict(hidden_size=768, intermediate_size=1536, num_hidden_layers=24, torch_dtype="float32")
    config = config_from_transformers(old)
    assert (config.d_inner, config.num_hidden_layers, config.dtype) == (1536, 24, torch.float32)
    assert not hasattr(config, "fused_add_norm")
    bare = config_from_transformers({"model_type": "falcon_mamba"})
    assert (bare.num_hidden_layers, bare.d_inner, bare.mixer_rms_eps) == (32, 1536, 1e-6)


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, r"`model_type` must be one of \['mamba', 'falcon_mamba'\], got None"),
        ({"model_type": "mamba2"}, "`model_type` must be one of .* got 'mamba2'"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "`hidden_act` must be silu, got 'gelu'"),
    ],
)
def test_what_is_not_of_transformers_mamba(content, message):
    with pytest.raises(ValueError, match=message):
        config_from_transformers(content)


def test_unknown_width():
    with pytest.raises(ValueError, match="Unknown width 'hidden_size'; choose from .*'d_inner'"):
        MambaRsstVisionConfig().set_widths("hidden_size", 4)


@pytest.mark.parametrize("cls", BOTH)
def test_auto_config_knows_it(cls, tmp_path):
    cls(**TINY, num_hidden_layers=2).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is cls


SHAPES = [("mamba_tiny", 96, 12, 8), ("mamba_small", 192, 24, 16), ("mamba_base", 384, 24, 16)]


@pytest.mark.parametrize("name, hidden, layers, states", SHAPES)
def test_presets(name, hidden, layers, states):
    config = MambaRsstVisionConfig.preset(name)
    assert (config.hidden_size, config.num_hidden_layers, config.d_state) == (hidden, layers, states)
    assert (config.d_inner, config.intermediate_size) == (2 * hidden, 4 * hidden)
    assert (config.image_size, config.patch_size, config.bidirectional) == (32, 4, "v2")
    assert MambaRsstVisionConfig.preset(name, d_state=3, num_labels=7).num_labels == 7


def test_all_presets_are_tested():
    assert sorted(PRESETS) == sorted(name for name, *_ in SHAPES)
    with pytest.raises(ValueError, match="Unknown preset 'mamba_huge'; choose from .*'mamba_tiny'"):
        MambaRsstVisionConfig.preset("mamba_huge")
