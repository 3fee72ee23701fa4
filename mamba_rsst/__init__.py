"""mamba_rsst: Mamba models made really smaller and really faster inside the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from ._version import __version__
from .models import (
    MambaForCausalLM,
    MambaForImageClassification,
    MambaMixer,
    MambaRsstConfig,
    MambaRsstModel,
    MambaRsstVisionConfig,
    MambaVisionModel,
    selective_scan,
)
from .pruning import (
    PruningConfig,
    apply_masks_,
    find_groups,
    prune_,
    register_importance,
    select_channels,
    shrink_,
)


# transformers' Auto classes load our checkpoints once this package is imported; saving one also copies the model files
# beside it, so that it loads with trust_remote_code=True where the package is absent.
for _config, _auto, _model in (
    (MambaRsstConfig, AutoModelForCausalLM, MambaForCausalLM),
    (MambaRsstVisionConfig, AutoModelForImageClassification, MambaForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _auto.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class(_auto.__name__)

_LAZY = {
    "RSSTConfig": "training.arguments",
    "RSSTTrainer": "training.trainer",
    "evaluate_lm": "lm_evaluation",
    "load_model": "hub",
    "load_recipe": "recipe",
    "run_recipe": "run",
}


def __getattr__(name):
    """What needs the trainer is imported when first asked for: it costs seconds, and models and pruning do without."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MambaForCausalLM",
    "MambaForImageClassification",
    "MambaMixer",
    "MambaRsstConfig",
    "MambaRsstModel",
    "MambaRsstVisionConfig",
    "MambaVisionModel",
    "PruningConfig",
    "RSSTConfig",
    "RSSTTrainer",
    "__version__",
    "apply_masks_",
    "evaluate_lm",
    "find_groups",
    "load_model",
    "load_recipe",
    "prune_",
    "register_importance",
    "run_recipe",
    "select_channels",
    "selective_scan",
    "shrink_",
]
