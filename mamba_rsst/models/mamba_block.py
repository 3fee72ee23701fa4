"""The block of every model of this folder: a mixer, an optional MLP, their norms, and how they start out."""

# Legend: B batch, L length (tokens), D hidden_size, F intermediate_size
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from .cpu_linear import CpuLinear
from .mamba_mixer import FP32_PARAMETERS, MambaMixer, init_mixer_, no_weight_decay


class MambaMLP(nn.Module):
    """fc1 (D -> F), GELU, fc2 (F -> D)."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.intermediate_size = config.widths("intermediate_size")[layer_idx]
        self.fc1 = CpuLinear(config.hidden_size, self.intermediate_size)
        self.fc2 = CpuLinear(self.intermediate_size, config.hidden_size)
        self.fc2.ends_branch = True

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def make_norm(config) -> nn.Module:
    kind = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm]
    return kind(config.hidden_size, eps=config.layer_norm_epsilon)


class MambaBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm2(x)) where the layer has an MLP."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = make_norm(config)
        self.mixer = MambaMixer(config, layer_idx)
        if config.widths("intermediate_size")[layer_idx]:
            self.norm2 = make_norm(config)
            self.mlp = MambaMLP(config, layer_idx)
        else:
            self.norm2 = self.mlp = None

    def forward(self, hidden_states: Tensor, branch_scales: Tensor | None = None, **mixer_inputs) -> Tensor:
        """(B, L, D) -> (B, L, D); branch_scales (2, B, 1, 1): what the two branches are multiplied by, None = 1."""
        if self.residual_in_fp32:
            hidden_states = hidden_states.float()
        first, second = (None, None) if branch_scales is None else branch_scales.unbind(0)
        hidden_states = self._branch(hidden_states, self.norm, self.mixer, first, **mixer_inputs)
        return hidden_states if self.mlp is None else self._branch(hidden_states, self.norm2, self.mlp, second)

    def _branch(self, residual, norm, branch, scale, **inputs):
        out = branch(norm(residual.to(norm.weight.dtype)), **inputs)
        return residual + (out if scale is None else out * scale.to(out.dtype))


class MambaPreTrainedModel(PreTrainedModel):
    """What the models share: names, which parameters stay in fp32 or are never decayed, and the initial weights."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaBlock"]
    _keep_in_fp32_modules_strict = FP32_PARAMETERS

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return no_weight_decay(self)

    @torch.no_grad()
    def _init_weights(self, module):
        config = self.config
        additions = config.num_hidden_layers * (2 if any(config.widths("intermediate_size")) else 1)
        scale = additions**-0.5 if config.rescale_prenorm_residual else 1.0
        if isinstance(module, MambaMixer):
            init_mixer_(module, config, scale)
        elif isinstance(module, nn.Linear):
            # torch's own default; what a mixer wants otherwise is set when its turn comes, after its children. An MLP
            # and the head get no turn, having no parameters of their own: they mark their layers instead.
            if getattr(module, "is_head", False):
                init.trunc_normal_(module.weight, std=config.initializer_range)
            else:
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if getattr(module, "ends_branch", False):
                init.copy_(module.weight, module.weight * scale)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


__all__ = ["MambaBlock", "MambaMLP", "MambaPreTrainedModel", "make_norm"]
