"""The one Mamba mixer: one direction for language, one or two for images. Widths come from the config, per layer."""

# Legend: B batch, L length, D hidden_size, E d_inner, N d_state, R dt_rank, K d_conv
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .cache_name import takes_old_name
from .causal_conv1d import causal_conv1d_silu
from .configuration_mamba_rsst import MambaRsstBaseConfig
from .cpu_linear import CpuLinear, linear
from .selective_scan import selective_scan
from .selective_scan_torch import exp_, log_base


# Read in fp32 whatever dtype a checkpoint is loaded in: small differences in these change how fast a state decays.
FP32_PARAMETERS = ["A_log", "A_b_log", "mixer.D", "dt_proj.bias", "dt_proj_b.bias"]


class MambaMixer(nn.Module):
    """Selective state space mixer (Gu & Dao 2023, arXiv:2312.00752, sec. 3.4), optionally bidirectional.

    Parameter names are those of transformers' Mamba and, for the reverse direction, Vim's (Zhu et al. 2024,
    arXiv:2401.09417): `bidirectional="v1"` adds A_b_log, "v2" adds conv1d_b, x_proj_b, dt_proj_b, A_b_log and D_b.
    `in_proj` and `out_proj` are shared by the directions, so both have the same E channels.

    With the config's `mixer_rms_eps`, B, C and dt pass through RMS norms without weights (FalconMamba).
    """

    def __init__(self, config: MambaRsstBaseConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.d_inner = config.widths("d_inner")[layer_idx]
        self.d_state = config.widths("d_state")[layer_idx]
        self.dt_rank = config.widths("dt_rank")[layer_idx]
        self.d_conv = config.d_conv
        self.bidirectional = getattr(config, "bidirectional", "none")
        self.scale_out = 0.5 if self.bidirectional != "none" and config.divide_out else 1.0
        self.mixer_rms_eps = getattr(config, "mixer_rms_eps", None)
        self.scan_implementation = config.scan_implementation

        self.in_proj = CpuLinear(config.hidden_size, 2 * self.d_inner, bias=config.use_bias)
        self._add_direction("", "A_log", config, own=True)
        if self.bidirectional != "none":
            self._add_direction("_b", "A_b_log", config, own=self.bidirectional == "v2")
        self.out_proj = CpuLinear(self.d_inner, config.hidden_size, bias=config.use_bias)

    def _add_direction(self, suffix, decay_name, config, own):
        """The parameters of one direction; without `own` it shares all but the decay A with the forward direction."""
        E, N, R, K = self.d_inner, self.d_state, self.dt_rank, self.d_conv
        modules = {}
        if own:
            modules["conv1d"] = nn.Conv1d(E, E, K, groups=E, padding=K - 1, bias=config.use_conv_bias)
            modules["x_proj"] = CpuLinear(E, R + 2 * N, bias=False)
            modules["dt_proj"] = nn.Linear(R, E, bias=True)
            self.register_parameter("D" + suffix, nn.Parameter(torch.ones(E)))
        for name, module in modules.items():
            self.add_module(name + suffix, module)
        self.register_parameter(decay_name, nn.Parameter(torch.zeros(E, N)))

    def directions(self):
        """What each direction runs on: (conv1d, x_proj, dt_proj, A_log, D), the forward direction first."""
        forward = (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        if self.bidirectional == "none":
            return [forward]
        if self.bidirectional == "v1":
            return [forward, (self.conv1d, self.x_proj, self.dt_proj, self.A_b_log, self.D)]
        return [forward, (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)]

    @takes_old_name
    def forward(
        self, hidden_states: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """hidden_states (B, L, D) -> (B, L, D), same dtype.

        cache: the state after the tokens before these, which is brought up to date; it carries values, never
            gradients. One direction only.
        attention_mask: (B, at least L), its last L columns 0 for padding and else 1. Padding reaches neither the
            convolution nor the state, so a sequence padded on the left gives what it gives alone.
        """
        conv_state, state = self._states(cache)
        one = conv_state is not None and hidden_states.shape[1] == 1 and attention_mask is None
        if one and not torch.is_grad_enabled() and not cache.layers[self.layer_idx].record_past:
            return self._step(hidden_states, conv_state, state)
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -x.shape[1] :, None].to(x.dtype)
            x = x * attention_mask  # behind in_proj, whose bias would otherwise be a past that the sequence has not
        u = self._convolve(x, conv_state)
        if attention_mask is not None:
            u = u * attention_mask
        # v1 has one convolution and one projection: only the scan runs both ways.
        own = self.directions()[: len(u)]
        inputs = [self._scan_inputs(u_g, x_proj, dt_proj) for u_g, (_, x_proj, dt_proj, _, _) in zip(u, own)]
        decays = [-torch.exp(_wide(A_log)) for *_, A_log, _ in self.directions()]
        skips = [_wide(D) for *_, D in self.directions()]
        biases = [_wide(dt_proj.bias) for _, _, dt_proj, _, _ in self.directions()]
        if self.bidirectional == "none":
            arguments = (u[0], *inputs[0], *decays, *skips, *biases, False)
            if cache is None:
                y = self._scan(*arguments)
            else:
                if state is not None and torch.is_grad_enabled():
                    state = state.clone()  # kept for the backward, while the cache's own is written over
                y, last = self._scan(*arguments, initial_state=state, return_last_state=True)
                inner = x.detach().transpose(1, 2)
                cache.update_conv_state(inner, self.layer_idx, conv_kernel_size=self.d_conv)
                cache.update_recurrent_state(last.detach(), self.layer_idx)
        else:
            delta, B, C = (torch.stack(parts).expand(2, -1, -1, -1) for parts in zip(*inputs))
            A, D, bias = (torch.stack(pair) for pair in (decays, skips, biases))
            y = self._scan(u.expand(2, -1, -1, -1), delta, B, C, A, D, bias, (False, True)).sum(0)
            if self.scale_out != 1.0:
                y = y * self.scale_out
        return self.out_proj(y * F.silu(gate))

    def _states(self, cache):
        """The cache's convolution state (B, E, at least K) and scan state (B, E, N); None where there is no past."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        layer = cache.layers[self.layer_idx]
        return layer.conv_states[0], layer.recurrent_states[0]

    def _step(self, hidden_states, conv_state, state):
        """One token: (B, 1, D) -> (B, 1, D). Few ops of static shapes, which write both states where they lie, so that
        a whole model's step can be captured as one CUDA graph. What is small is computed in the state's dtype."""
        narrow, wide, base = hidden_states.dtype, state.dtype, log_base(state.device)
        conv1d = self.conv1d
        x, gate = self.in_proj(hidden_states[:, 0]).to(wide).chunk(2, dim=-1)
        window = torch.cat([conv_state[..., 1:], x[..., None]], dim=-1)
        conv_state.copy_(window)
        u = (window * conv1d.weight[:, 0]).sum(-1)
        u = F.silu(u if conv1d.bias is None else u + conv1d.bias)
        low_rank, B, C = self._project(u.to(narrow), self.x_proj)
        dt = F.softplus(F.linear(low_rank, self.dt_proj.weight) + self.dt_proj.bias)
        rate = exp_(self.A_log.to(wide) * base)
        state.mul_(exp_((dt * -base)[..., None] * rate))
        state.addcmul_((dt * u)[..., None], B[:, None].to(wide))
        y = torch.bmm(state, C[..., None].to(wide))[..., 0]
        y = torch.addcmul(y, u, self.D) * F.silu(gate)
        return self.out_proj(y.to(narrow))[:, None]

    def _convolve(self, x, past):
        """(B, L, E) -> (G, B, L, E) for the G convolutions that the mixer has, behind the SiLU."""
        convs = [self.conv1d, self.conv1d_b] if self.bidirectional == "v2" else [self.conv1d]
        taps = torch.stack([conv.weight[:, 0].t() for conv in convs])
        bias = None if self.conv1d.bias is None else torch.stack([conv.bias for conv in convs])
        return causal_conv1d_silu(x, taps, bias, (False, True)[: len(convs)], past)

    def _scan_inputs(self, u, x_proj, dt_proj):
        """delta (B, L, E) before bias and softplus, B and C (B, L, N) of one direction."""
        low_rank, B, C = self._project(u, x_proj)
        return linear(low_rank, dt_proj.weight), B, C

    def _scan(self, u, delta, B, C, A, D, bias, reverse, **states):
        return selective_scan(
            u, delta, A, B, C, D, bias, True, reverse=reverse, implementation=self.scan_implementation, **states
        )

    def _project(self, u, x_proj):
        """dt's low rank, B and C, each through its norm if the mixer has norms."""
        parts = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.mixer_rms_eps is None:
            return parts
        return [F.rms_norm(part, part.shape[-1:], eps=self.mixer_rms_eps) for part in parts]


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def init_mixer_(mixer: MambaMixer, config: MambaRsstBaseConfig, residual_scale: float = 1.0) -> None:
    """The paper's initialisation (sec. 3.6): A = -(1..N), dt log-uniform in [time_step_min, time_step_max], D = 1.

    residual_scale: divides out_proj's initial weights, 1/sqrt(number of residual additions) as in GPT-2.
    """
    for conv1d, _, dt_proj, A_log, D in mixer.directions():
        states = torch.arange(1, mixer.d_state + 1, dtype=torch.float32, device=A_log.device)
        init.copy_(A_log, torch.log(states).expand_as(A_log))
        init.ones_(D)
        bound = mixer.dt_rank**-0.5 * config.time_step_scale
        init.uniform_(dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.exp(torch.rand(mixer.d_inner, device=dt_proj.bias.device) * (high - low) + low)
        dt = dt.clamp(min=config.time_step_floor)
        init.copy_(dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        init.kaiming_uniform_(conv1d.weight, a=math.sqrt(5))
        if conv1d.bias is not None:
            init.zeros_(conv1d.bias)
    if residual_scale != 1.0:
        init.copy_(mixer.out_proj.weight, mixer.out_proj.weight * residual_scale)


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: vectors (biases, norms, D), A_log and tokens."""
    tokens = getattr(model, "_token_parameters", ())
    names = set()
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.dim() < 2 or last in ("A_log", "A_b_log") or last in tokens:
            names.add(name)
    return names
