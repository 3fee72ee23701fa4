"""Configurations: what every Mamba of this package shares, and the causal language model's own."""

import math

from transformers.configuration_utils import PreTrainedConfig


WIDTHS = ("d_inner", "intermediate_size", "d_state", "dt_rank")
"""The prunable widths. Each is one int, or a list with one int per layer once the layers differ."""


def _choice(config, name, choices):
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def _number(config, name, low, high=math.inf, kind=(int, float)):
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        bound = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"`{name}` must be {what} {bound}, got {value!r}.")


class MambaRsstBaseConfig(PreTrainedConfig):
    """The fields of the shared mixer and block.

    hidden_size: residual width D.  num_hidden_layers: number of blocks.
    d_inner: SSM channels E; default `expand * hidden_size`.
    intermediate_size: neurons F of the block's MLP; 0 = the block has no MLP.
    d_state: states N per channel.  dt_rank: rank R of the step-size projection; "auto" = ceil(hidden_size / 16).
    d_conv: taps K of the causal convolution.
    expand: only fills in `d_inner` when that is not given; every tensor is sized from the widths.
    use_bias: biases on in_proj and out_proj.  use_conv_bias: bias of the convolution.
    norm: "rms" or "layer".  layer_norm_epsilon: its epsilon.
    residual_in_fp32: the residual stream stays fp32 whatever the activations' dtype.
    time_step_min, time_step_max, time_step_floor, time_step_scale: initialisation of dt (Gu & Dao 2023, sec. 3.6).
    scan_implementation: "auto", or the selective scan's back end by name.

    Raises ValueError for a width that is not a positive int, a list of another length than `num_hidden_layers`, or any
    other value outside its range.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 24
    d_inner: int | list[int] | None = None
    intermediate_size: int | list[int] = 0
    d_state: int | list[int] = 16
    dt_rank: int | list[int] | str = "auto"
    d_conv: int = 4
    expand: int | float = 2
    use_bias: bool = False
    use_conv_bias: bool = True
    norm: str = "rms"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    rescale_prenorm_residual: bool = True
    initializer_range: float = 0.02
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    scan_implementation: str = "auto"

    def __post_init__(self, **kwargs):
        for name in ("hidden_size", "num_hidden_layers", "d_conv"):
            _number(self, name, 1, kind=int)
        for name in ("expand", "layer_norm_epsilon", "initializer_range", "time_step_min"):
            _number(self, name, 1e-12)
        _number(self, "time_step_max", self.time_step_min)
        _choice(self, "norm", ("rms", "layer"))
        if self.d_inner is None:
            self.d_inner = int(self.expand * self.hidden_size)
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.hidden_size / 16)
        for name in WIDTHS:
            self.set_widths(name, getattr(self, name))
        super().__post_init__(**kwargs)

    def widths(self, name: str) -> list[int]:
        """The width `name`, one int per layer."""
        value = getattr(self, name)
        return list(value) if isinstance(value, (list, tuple)) else [value] * self.num_hidden_layers

    def set_widths(self, name: str, value: int | list[int]) -> None:
        """Set the width `name`; a list whose entries agree is stored as one int."""
        if name not in WIDTHS:
            raise ValueError(f"Unknown width {name!r}; choose from {list(WIDTHS)}.")
        least = 0 if name == "intermediate_size" else 1
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
            raise ValueError(f"`{name}` must be an int >= {least} or a list of them, got {value!r}.")
        if isinstance(value, (list, tuple)) and len(values) != self.num_hidden_layers:
            raise ValueError(
                f"`{name}` has {len(values)} entries but `num_hidden_layers` is {self.num_hidden_layers}; "
                "give one int, or one per layer."
            )
        setattr(self, name, values[0] if len(set(values)) == 1 else values)


class MambaRsstConfig(MambaRsstBaseConfig):
    """Configuration of the causal language model (Gu & Dao 2023, arXiv:2312.00752).

    mixer_rms_eps: with a number, B, C and dt pass through weightless RMS norms of this epsilon, as in FalconMamba
        (Zuo et al. 2024, arXiv:2410.05355); None = no such norms.

    The defaults are those of `state-spaces/mamba-130m-hf`; `expand`, `d_state` and the like mean what they do there,
    except that a checkpoint is always rebuilt from its widths. `from_pretrained` reads the configs of transformers'
    Mamba and FalconMamba too; their weights have the same names.
    """

    model_type = "mamba_rsst"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50280
    mixer_rms_eps: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs):
        _number(self, "vocab_size", 1, kind=int)
        if self.mixer_rms_eps is not None:
            _number(self, "mixer_rms_eps", 0)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self):
        return ["linear_attention"] * self.num_hidden_layers

    @classmethod
    def preset(cls, name: str, **overrides) -> "MambaRsstConfig":
        """The named shape, with any field overridden. Raises ValueError for an unknown name."""
        if name not in LM_PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose from {sorted(LM_PRESETS)}.")
        return cls(**{**LM_PRESETS[name], **overrides})

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        content, kwargs = super().get_config_dict(*args, **kwargs)
        if content.get("model_type") in TRANSFORMERS_TYPES:
            content = config_from_transformers(content).to_dict()
        return content, kwargs


# Two for tests and quick runs, one of 30 million parameters with the 50,280 tokens of the public checkpoints, and the
# shapes of those (Gu & Dao 2023, appendix E.2; a block of Mamba's is half a Transformer layer, hence twice as many).
LM_PRESETS = {
    "mamba_nano": {"hidden_size": 32, "num_hidden_layers": 2, "d_state": 8},
    "mamba_micro": {"hidden_size": 128, "num_hidden_layers": 4},
    "mamba_30m": {"hidden_size": 384, "num_hidden_layers": 12},
    "mamba_130m": {"hidden_size": 768, "num_hidden_layers": 24},
    "mamba_370m": {"hidden_size": 1024, "num_hidden_layers": 48},
    "mamba_790m": {"hidden_size": 1536, "num_hidden_layers": 48},
    "mamba_1.4b": {"hidden_size": 2048, "num_hidden_layers": 48},
    "mamba_2.8b": {"hidden_size": 2560, "num_hidden_layers": 64},
}

TRANSFORMERS_TYPES = ("mamba", "falcon_mamba")
"""The model types whose configs `config_from_transformers` reads."""

# Our name -> transformers', where they differ; and what goes over under its own name.
_RENAMED = {"d_state": "state_size", "dt_rank": "time_step_rank", "d_conv": "conv_kernel"}
_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "layer_norm_epsilon", "use_bias", "use_conv_bias"),
    *("residual_in_fp32", "rescale_prenorm_residual", "initializer_range", "tie_word_embeddings", "use_cache"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def config_from_transformers(content: dict) -> MambaRsstConfig:
    """The config.json of transformers' Mamba or FalconMamba, parsed, as this package's config.

    What a file leaves out has transformers' default. Keys without a meaning here (those that choose a kernel or an
    initialisation, and leftovers of earlier formats) are dropped.
    Raises ValueError for another model type, or an activation other than silu.
    """
    kind = content.get("model_type")
    if kind not in TRANSFORMERS_TYPES:
        raise ValueError(f"`model_type` must be one of {list(TRANSFORMERS_TYPES)}, got {kind!r}.")
    if (act := content.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"`hidden_act` must be silu, got {act!r}.")
    given = {"num_hidden_layers": 32, "initializer_range": 0.1, "rescale_prenorm_residual": False, **content}
    if given.get("dtype") is None and given.get("torch_dtype") is not None:  # its name before transformers 5
        given["dtype"] = given["torch_dtype"]
    fields = {name: given[name] for name in _SAME if name in given}
    fields |= {ours: given[theirs] for ours, theirs in _RENAMED.items() if theirs in given}
    # FalconMamba's file says expand 16 beside an intermediate_size of twice the hidden size: the width counts.
    fields |= {"d_inner": given.get("intermediate_size"), "expand": given.get("expand", 2), "intermediate_size": 0}
    if kind == "falcon_mamba":
        fields["mixer_rms_eps"] = given.get("mixer_rms_eps", 1e-6)
    return MambaRsstConfig(**fields)


def config_to_transformers(config: MambaRsstConfig) -> dict:
    """The reverse: the content of the config.json of transformers' Mamba, or FalconMamba for a model with mixer norms.

    Raises ValueError for what those architectures do not have: MLPs, layer norms, layers of different widths.
    """
    if any(config.widths("intermediate_size")):
        raise ValueError("its blocks have MLPs, and those of transformers' Mamba have none.")
    if config.norm != "rms":
        raise ValueError(f"its norms are {config.norm!r}, and those of transformers' Mamba are 'rms'.")
    for name in ("d_inner", "d_state", "dt_rank"):
        if isinstance(getattr(config, name), list):
            raise ValueError(f"its layers differ in {name}, and transformers' Mamba has one for all layers.")
    fields = {name: getattr(config, name) for name in _SAME}
    fields |= {theirs: getattr(config, ours) for ours, theirs in _RENAMED.items()}
    # Those classes are strict about types, and their `expand` is whole; beside an `intermediate_size` it says nothing.
    floats = {name for name in _SAME if isinstance(getattr(MambaRsstConfig, name), float)}
    fields |= {name: float(fields[name]) for name in floats}
    fields |= {"intermediate_size": config.d_inner, "expand": max(1, round(config.d_inner / config.hidden_size))}
    # It says how weights start out; yet with it those classes divide the weights that they have loaded once more.
    fields["rescale_prenorm_residual"] = False
    if config.mixer_rms_eps is None:
        return {"model_type": "mamba", **fields}
    return {"model_type": "falcon_mamba", **fields, "mixer_rms_eps": float(config.mixer_rms_eps)}


__all__ = [
    "LM_PRESETS",
    "WIDTHS",
    "MambaRsstBaseConfig",
    "MambaRsstConfig",
    "config_from_transformers",
    "config_to_transformers",
]
