"""Models for tests: tiny, every size another, every parameter perturbed, so that no axis and no slice can hide."""

import torch
import transformers
from torch import nn
from transformers import FalconMambaConfig, MambaConfig

from mamba_rsst import (
    MambaForCausalLM,
    MambaForImageClassification,
    MambaRsstConfig,
    MambaRsstVisionConfig,
    find_groups,
)


TINY = dict(hidden_size=20, d_inner=46, d_state=7, dt_rank=5, d_conv=3)
VISION = dict(
    **TINY, intermediate_size=33, num_hidden_layers=2, image_size=12, patch_size=4, num_labels=6, use_bias=True
)
TOKENS = dict(num_hidden_layers=2, vocab_size=53, bos_token_id=0, eos_token_id=0, pad_token_id=0)
LM = dict(**TINY, **TOKENS, use_bias=True)
STOCK = dict(hidden_size=20, intermediate_size=46, state_size=7, time_step_rank=5, conv_kernel=3, use_bias=True)
STOCK = dict(**STOCK, **TOKENS)
BIDIRECTIONAL = ("none", "v1", "v2")
LANGUAGE = {"lm": {}, "lm_mlp": dict(intermediate_size=33), "lm_norms": dict(mixer_rms_eps=1e-6)}
OWN = (*BIDIRECTIONAL, *LANGUAGE)
"""This package's models, whose config holds one width a layer."""
KINDS = (*OWN, "mamba", "falcon_mamba")
WITH_MLP = (*BIDIRECTIONAL, "lm_mlp")
WITH_NORMS = ("lm_norms", "falcon_mamba")
MIXER_TARGETS = ("d_inner", "d_state", "dt_rank")
PAIRS = [(kind, target) for kind in KINDS for target in MIXER_TARGETS]
PAIRS += [(kind, "intermediate_size") for kind in WITH_MLP]
"""Every kind of model with every target that its layers have."""
MODEL_PAIRS = [(kind, target) for kind in KINDS for target in ("hidden_size", "num_hidden_layers")]
"""... and those of the model as a whole."""


def make(kind, seed=0, **overrides):
    """A perturbed model in eval mode: this package's image classifier by its `bidirectional`, its language model, or a
    stock class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in BIDIRECTIONAL:
            model = MambaForImageClassification(
                MambaRsstVisionConfig(**{**VISION, "bidirectional": kind, **overrides})
            )
        elif kind in LANGUAGE:
            model = MambaForCausalLM(MambaRsstConfig(**{**LM, **LANGUAGE[kind], **overrides}))
        elif kind == "mamba":
            model = transformers.MambaForCausalLM(MambaConfig(**{**STOCK, **overrides}))
        else:
            model = transformers.FalconMambaForCausalLM(FalconMambaConfig(**{**STOCK, **overrides}))
    return perturb_(model, seed).eval()


@torch.no_grad()
def perturb_(module, seed=0):
    """Add noise to every parameter: A_log, D, biases and norms start out alike for all channels. Steps become longer,
    so that the decays matter within ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = 0.4 if parameter.dim() < 2 or name.endswith("_log") else 0.2
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
            parameter.add_(4.0)
    return module


def batch_of(model, count=3, seed=1):
    """Inputs and labels for `model`."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if isinstance(model, MambaForImageClassification):
        pixels = torch.randn(count, config.num_channels, config.image_size, config.image_size, generator=generator)
        labels = torch.randint(config.num_labels, (count,), generator=generator)
        return {"pixel_values": pixels.to(model.dtype), "labels": labels}
    ids = torch.randint(config.vocab_size, (count, 10), generator=generator)
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits_of(model, batch=None):
    return model(**(batch or batch_of(model))).logits


def mixers(model):
    return [layer.mixer for layer in model.backbone.layers]


def layer_groups(model):
    """The groups of the widths that layers have of their own."""
    return [group for group in find_groups(model) if group.layer is not None]


def random_masks(groups, seed=0, share=0.5):
    """Group name -> a mask that keeps about `share` of the channels, at least one and never all."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups:
        keep = torch.zeros(group.size, dtype=torch.bool)
        count = int(torch.randint(1, max(2, int(2 * share * group.size)), (), generator=generator))
        keep[torch.randperm(group.size, generator=generator)[:count]] = True
        masks[group.name] = keep
    return masks


def even_masks(groups, seed=0):
    """As `random_masks`, with one width for all groups of a target: what transformers' own classes can hold."""
    generator = torch.Generator().manual_seed(seed)
    keep = {"d_inner": 19, "d_state": 3, "dt_rank": 2, "intermediate_size": 14, "hidden_size": 8}
    keep["num_hidden_layers"] = 1
    return {
        g.name: torch.zeros(g.size, dtype=torch.bool).index_fill_(
            0, torch.randperm(g.size, generator=generator)[: keep[g.target]], True
        )
        for g in groups
    }


class Keyword(nn.Module):
    """`model(x=...)` around a module that takes its input by position."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)
