"""MambaForImageClassification: Vision Mamba (Vim) as a Hugging Face model."""

# Legend: B batch, T tokens, D hidden_size
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, ImageClassifierOutputWithNoAttention

from .configuration_mamba_rsst_vision import MambaRsstVisionConfig
from .mamba_block import MambaBlock, MambaPreTrainedModel, make_norm


def draw_branch_scales(rate: float, layers: int, x: Tensor) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), drawn for all layers at once: (layers, 2, B, 1, 1) fp32.

    What a layer's two branches are multiplied by: 0 with the layer's rate for a sample, else 1 / (1 - rate); the rates
    grow linearly from 0 to `rate`. Drawn outside the blocks, so that blocks which differ only in their rate share
    compiled code, and made on the device, so that a CUDA graph can hold it.
    """
    keep = 1.0 - torch.arange(layers, device=x.device) * (rate / max(1, layers - 1))
    keep = keep[:, None, None].expand(-1, 2, x.shape[0])
    return (torch.bernoulli(keep) / keep)[..., None, None]


class MambaVisionEmbeddings(nn.Module):
    """Patches, class token(s) and position embedding: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, config: MambaRsstVisionConfig):
        super().__init__()
        self.image_size, self.num_channels = config.image_size, config.num_channels
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        patches = (config.image_size // config.patch_size) ** 2
        places = {"none": [], "start": [0], "middle": [patches // 2], "end": [patches], "both": [0, patches + 1]}
        self.class_token_places = places[config.class_token]
        count = len(self.class_token_places)
        if count:
            self.cls_token = nn.Parameter(torch.zeros(1, count, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, patches + count, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        expected = (self.num_channels, self.image_size, self.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must be (batch, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}."
            )
        x = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype)).flatten(2).transpose(1, 2)
        for i, place in enumerate(self.class_token_places):
            token = self.cls_token[:, i : i + 1].expand(x.shape[0], -1, -1).to(x.dtype)
            x = torch.cat([x[:, :place], token, x[:, place:]], dim=1)
        return self.dropout(x + self.position_embeddings)


class MambaVisionPreTrainedModel(MambaPreTrainedModel):
    config_class = MambaRsstVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a plain mean: the trainer must divide by the accumulation steps
    _token_parameters = ("cls_token", "position_embeddings")

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MambaVisionEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=0.02)
            if module.class_token_places:
                init.trunc_normal_(module.cls_token, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            init.trunc_normal_(module.weight, std=fan_in**-0.5)
            init.zeros_(module.bias)


class MambaVisionModel(MambaVisionPreTrainedModel):
    """The backbone: images to normalised token features."""

    def __init__(self, config: MambaRsstVisionConfig):
        super().__init__(config)
        self.embeddings = MambaVisionEmbeddings(config)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embeddings

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None):
        """pixel_values (B, C, H, W) -> last_hidden_state (B, T, D); hidden_states: the stream before each block."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = self.embeddings(pixel_values)
        scales = [None] * len(self.layers)
        if self.training and self.config.drop_path_rate > 0:
            scales = draw_branch_scales(self.config.drop_path_rate, len(self.layers), hidden_states).unbind(0)
        kept = []
        for layer, scale in zip(self.layers, scales):
            if wanted:
                kept.append(hidden_states)
            hidden_states = layer(hidden_states, scale)
        hidden_states = self.norm_f(hidden_states.to(self.norm_f.weight.dtype))
        kept = (*kept, hidden_states) if wanted else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(x for x in (hidden_states, kept) if x is not None)
        return BaseModelOutputWithNoAttention(last_hidden_state=hidden_states, hidden_states=kept)


class MambaForImageClassification(MambaVisionPreTrainedModel):
    """The backbone with a linear head on its class token (or on the mean of all tokens).

    forward(pixel_values (B, C, H, W), labels) -> loss, logits (B, num_labels). labels are class indices (B,), or soft
    targets (B, num_labels) as Mixup makes them; the loss is the cross-entropy in fp32. Raises ValueError for images of
    another size than the config's.
    """

    def __init__(self, config: MambaRsstVisionConfig):
        super().__init__(config)
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(f"`problem_type` must be single_label_classification, got {config.problem_type!r}.")
        self.num_labels = config.num_labels
        self.backbone = MambaVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.is_head = True
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        outputs = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        tokens = outputs.last_hidden_state
        places = self.backbone.embeddings.class_token_places
        # One slice a class token: an index list would be copied to the device, which a CUDA graph cannot hold.
        pooled = sum(tokens[:, p] for p in places) / len(places) if places else tokens.mean(dim=1)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels if labels.dim() == 1 else labels.float())
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(x for x in (loss, logits, outputs.hidden_states) if x is not None)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["MambaForImageClassification", "MambaVisionModel", "MambaVisionPreTrainedModel"]
