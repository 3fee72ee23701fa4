"""mamba_rsst: Mamba models made really smaller and really faster inside the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModelForImageClassification

from ._version import __version__
from .models import (
    MambaForImageClassification,
    MambaMixer,
    MambaRsstConfig,
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
AutoConfig.register(MambaRsstVisionConfig.model_type, MambaRsstVisionConfig, exist_ok=True)
AutoConfig.register(MambaRsstConfig.model_type, MambaRsstConfig, exist_ok=True)
AutoModelForImageClassification.register(MambaRsstVisionConfig, MambaForImageClassification, exist_ok=True)
MambaRsstVisionConfig.register_for_auto_class()
MambaForImageClassification.register_for_auto_class("AutoModelForImageClassification")

_LAZY = {
    "RSSTConfig": "training.arguments",
    "RSSTTrainer": "training.trainer",
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
    "MambaForImageClassification",
    "MambaMixer",
    "MambaRsstConfig",
    "MambaRsstVisionConfig",
    "MambaVisionModel",
    "PruningConfig",
    "RSSTConfig",
    "RSSTTrainer",
    "__version__",
    "apply_masks_",
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
