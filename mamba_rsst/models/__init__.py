"""Hugging Face models on one shared MambaMixer. It imports nothing of the package: the Hub runs copies of it."""

from .configuration_mamba_rsst import (
    LM_PRESETS,
    MambaRsstConfig,
    config_from_transformers,
    config_to_transformers,
)
from .configuration_mamba_rsst_vision import PRESETS, MambaRsstVisionConfig
from .mamba_mixer import MambaMixer
from .modeling_mamba_rsst import MambaForCausalLM, MambaRsstModel
from .modeling_mamba_rsst_vision import MambaForImageClassification, MambaVisionModel
from .selective_scan import selective_scan


__all__ = [
    "LM_PRESETS",
    "PRESETS",
    "MambaForCausalLM",
    "MambaForImageClassification",
    "MambaMixer",
    "MambaRsstConfig",
    "MambaRsstModel",
    "MambaRsstVisionConfig",
    "MambaVisionModel",
    "config_from_transformers",
    "config_to_transformers",
    "selective_scan",
]
