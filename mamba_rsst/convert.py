"""Checkpoints of other libraries, as MambaForCausalLM: transformers' Mamba and FalconMamba, and mamba_ssm's format."""

import math
import os
import pickle

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from .errors import one_line
from .hub import load_checked, read_config
from .models import MambaForCausalLM, MambaRsstConfig
from .models.configuration_mamba_rsst import TRANSFORMERS_TYPES


WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# mamba_ssm's names -> ours: of MambaConfig's ssm_cfg, which go to its Mamba module, ...
_SSM_CFG = {
    **{"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank"},
    **{"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_scale": "time_step_scale"},
    **{"dt_init_floor": "time_step_floor", "conv_bias": "use_conv_bias", "bias": "use_bias"},
}
# ... and of those the ones that say nothing about a trained model: a kernel, an initialisation, the layer's version.
_SSM_CFG_WITHOUT_MEANING = ("layer", "use_fast_path", "dt_init")


def convert_checkpoint(path: str | os.PathLike, **kwargs) -> MambaForCausalLM:
    """A checkpoint of transformers or mamba_ssm from a local folder or the Hub; kwargs go to from_pretrained.

    Raises FileNotFoundError or ValueError naming what is wrong: another format or architecture, unreadable weights,
    missing, extra or ill-fitting ones.
    """
    name = str(path)
    content = read_config(name)
    if content.get("model_type") in TRANSFORMERS_TYPES:
        return load_checked(MambaForCausalLM, name, **kwargs)
    if "model_type" in content or not {"d_model", "n_layer"} <= set(content):
        raise ValueError(
            f"{name!r} has model_type {content.get('model_type')!r}; what can be converted are "
            f"{list(TRANSFORMERS_TYPES)} and the format of mamba_ssm, whose config.json has d_model and n_layer."
        )
    try:
        config = config_from_mamba_ssm(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be converted: {one_line(error)}") from error
    return load_checked(MambaForCausalLM, name, state_dict=_read_weights(name), config=config, **kwargs)


def config_from_mamba_ssm(content: dict) -> MambaRsstConfig:
    """The config.json of a mamba_ssm checkpoint, parsed, as this package's config.

    Raises ValueError for what this package's model does not have: Mamba-2, attention layers, gated MLPs, unknown keys.
    """
    ssm = content.get("ssm_cfg") or {}
    if (layer := ssm.get("layer", "Mamba1")) != "Mamba1":
        raise ValueError(f"its layers are {layer}, and only Mamba1 is supported.")
    for key, what in (("attn_layer_idx", "attention layers"), ("d_intermediate", "gated MLPs")):
        if content.get(key):
            raise ValueError(f"it has {what} ({key!r} is {content[key]!r}), which are not supported.")
    if unknown := sorted(set(ssm) - set(_SSM_CFG) - set(_SSM_CFG_WITHOUT_MEANING)):
        raise ValueError(f"unknown key {unknown[0]!r} in its ssm_cfg; known are {sorted(_SSM_CFG)}.")
    multiple = content.get("pad_vocab_size_multiple", 8)
    return MambaRsstConfig(
        hidden_size=content["d_model"],
        num_hidden_layers=content["n_layer"],
        vocab_size=math.ceil(content.get("vocab_size", 50277) / multiple) * multiple,
        norm="rms" if content.get("rms_norm", True) else "layer",
        residual_in_fp32=content.get("residual_in_fp32", True),
        tie_word_embeddings=content.get("tie_embeddings", True),
        **{_SSM_CFG[key]: value for key, value in ssm.items() if key in _SSM_CFG},
    )


def config_to_mamba_ssm(config: MambaRsstConfig) -> dict:
    """The reverse: the content of the config.json of mamba_ssm's MambaLMHeadModel.

    Raises ValueError for what that class does not have: norms of B, C and dt, MLPs like ours, another epsilon than
    1e-5, layers of different widths, a d_inner that is no multiple of the hidden size.
    """
    if config.mixer_rms_eps is not None:
        raise ValueError("it has norms of B, C and dt, and mamba_ssm's Mamba has none.")
    if any(config.widths("intermediate_size")):
        raise ValueError("its blocks have MLPs without gates, and those of mamba_ssm have gates.")
    if config.layer_norm_epsilon != 1e-5:  # MambaLMHeadModel leaves MixerModel's default (models/mixer_seq_simple.py)
        raise ValueError(f"its norms' epsilon is {config.layer_norm_epsilon}, and that of mamba_ssm is always 1e-05.")
    for name in ("d_inner", "d_state", "dt_rank"):
        if isinstance(getattr(config, name), list):
            raise ValueError(f"its layers differ in {name}, and mamba_ssm has one for all layers.")
    # modules/mamba_simple.py: d_inner = int(expand * d_model), but the caches of generation have d_model * expand
    # channels as it stands, so a fraction fails there.
    expand, rest = divmod(config.d_inner, config.hidden_size)
    if rest:
        raise ValueError(
            f"its d_inner {config.d_inner} is no multiple of its hidden_size {config.hidden_size}, as mamba_ssm wants."
        )
    ssm = {theirs: getattr(config, ours) for theirs, ours in _SSM_CFG.items()}
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba1", **ssm, "expand": expand},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.norm == "rms",
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _read_weights(name: str) -> dict[str, torch.Tensor]:
    for file in WEIGHTS:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        try:
            weights = load_file(found) if file.endswith(".safetensors") else _unpickle(found)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{file} of {name!r} cannot be read as tensors: {one_line(error)}") from error
        return {key.replace("backbone.embedding.", "backbone.embeddings."): value for key, value in weights.items()}
    raise FileNotFoundError(f"{name!r} has no weights: looked for {' and '.join(WEIGHTS)}.")


def _unpickle(file: str) -> dict[str, torch.Tensor]:
    weights = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise pickle.UnpicklingError(f"it holds a {type(weights).__name__}, not named tensors.")
    return weights
