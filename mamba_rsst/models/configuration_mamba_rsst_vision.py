"""Configuration of the bidirectional Mamba image classifier, and its presets for 32x32 images."""

from .configuration_mamba_rsst import MambaRsstBaseConfig, _choice, _number


BIDIRECTIONAL = ("none", "v1", "v2")
CLASS_TOKEN = ("middle", "start", "end", "both", "none")


class MambaRsstVisionConfig(MambaRsstBaseConfig):
    """Vision Mamba (Zhu et al. 2024, arXiv:2401.09417).

    image_size, patch_size: pixels of a side; the patch size must divide the image size.
    bidirectional: "none" (one direction), "v1" (one convolution and projection, a second A for the reverse direction)
        or "v2" (the reverse direction has its own convolution, x_proj, dt_proj, A and D).
    divide_out: halve the sum of the two directions, as Vim's later checkpoints do.
    class_token: where the class token stands: "middle" (default), "start", "end", "both" (one at each end, their
        outputs averaged) or "none" (the head reads the mean of all tokens).
    drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this rate at the last.
    hidden_dropout_prob: dropout after the position embedding.
    """

    model_type = "mamba_rsst_vision"

    hidden_size: int = 192
    image_size: int = 32
    patch_size: int = 4
    num_channels: int = 3
    bidirectional: str = "v2"
    divide_out: bool = True
    class_token: str = "middle"
    drop_path_rate: float = 0.0
    hidden_dropout_prob: float = 0.0

    def __post_init__(self, **kwargs):
        for name in ("image_size", "patch_size", "num_channels"):
            _number(self, name, 1, kind=int)
        if self.image_size % self.patch_size:
            raise ValueError(f"`patch_size` {self.patch_size} does not divide `image_size` {self.image_size}.")
        _choice(self, "bidirectional", BIDIRECTIONAL)
        _choice(self, "class_token", CLASS_TOKEN)
        _number(self, "drop_path_rate", 0, 0.999)
        _number(self, "hidden_dropout_prob", 0, 0.999)
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides) -> "MambaRsstVisionConfig":
        """The named shape, with any field overridden. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose from {sorted(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


# For 32x32 images: 8x8 patches of 4x4 pixels and a class token, an MLP of four times the residual width in each block.
PRESETS = {
    "mamba_tiny": {"hidden_size": 96, "num_hidden_layers": 12, "d_state": 8, "intermediate_size": 4 * 96},
    "mamba_small": {"hidden_size": 192, "num_hidden_layers": 24, "d_state": 16, "intermediate_size": 4 * 192},
    "mamba_base": {"hidden_size": 384, "num_hidden_layers": 24, "d_state": 16, "intermediate_size": 4 * 384},
}

__all__ = ["MambaRsstVisionConfig", "PRESETS"]
