"""MambaForCausalLM: the causal language model; stock Mamba and FalconMamba checkpoints load into it by name."""

# Legend: B batch, L length, D hidden_size, V vocab_size
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .cache_name import CacheOutput, takes_old_name
from .configuration_mamba_rsst import MambaRsstConfig
from .cpu_linear import CpuLinear
from .mamba_block import MambaBlock, MambaPreTrainedModel, make_norm


logger = logging.get_logger(__name__)


@dataclass
class MambaRsstOutput(CacheOutput):
    """last_hidden_state (B, L, D); cache: the state after the last token; hidden_states: before each block,
    and the last one."""

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MambaRsstCausalLMOutput(CacheOutput):
    """loss (); logits (B, L, V) in fp32; the rest as in MambaRsstOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MambaRsstPreTrainedModel(MambaPreTrainedModel):
    config_class = MambaRsstConfig
    _is_stateful = True  # a state cannot be rolled back to an earlier token


class MambaRsstModel(MambaRsstPreTrainedModel):
    """The backbone: tokens to normalised features."""

    def __init__(self, config: MambaRsstConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, embeddings):
        self.embeddings = embeddings

    @takes_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MambaRsstOutput | tuple:
        """input_ids (B, L), or inputs_embeds (B, L, D) -> last_hidden_state (B, L, D).

        cache: what came before these tokens, in any number of calls of any lengths; it is brought up to date.
        use_cache: start a cache where none is given; default the config's, and False in training.
        attention_mask: (B, L or more), 0 for padding, which belongs on the left.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            logger.warning_once("Gradient checkpointing runs each block twice, so there is no cache in training.")
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        kept = []
        for layer in self.layers:
            if wanted:
                kept.append(hidden_states)
            hidden_states = layer(hidden_states, cache=cache, attention_mask=attention_mask)
        hidden_states = self.norm_f(hidden_states.to(self.norm_f.weight.dtype))
        kept = (*kept, hidden_states) if wanted else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(x for x in (hidden_states, cache, kept) if x is not None)
        return MambaRsstOutput(last_hidden_state=hidden_states, cache=cache, hidden_states=kept)


class MambaForCausalLM(MambaRsstPreTrainedModel, GenerationMixin):
    """The backbone with a linear head over the vocabulary, tied to the embeddings if the config says so.

    `from_pretrained` takes checkpoints of this class and of transformers' Mamba and FalconMamba; `mamba_rsst.convert`
    takes those of mamba_ssm.
    """

    accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch` where the trainer gives it
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: MambaRsstConfig):
        super().__init__(config)
        self.backbone = MambaRsstModel(config)
        self.lm_head = CpuLinear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.is_head = True
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, embeddings):
        self.backbone.set_input_embeddings(embeddings)

    def prepare_inputs_for_generation(self, *args, use_cache=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            *args, use_cache=use_cache, is_first_iteration=is_first_iteration, **kwargs
        )
        if use_cache and not is_first_iteration:
            inputs["attention_mask"] = None  # the padding is all in the past, and what is in the state has no place
        return inputs

    @takes_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MambaRsstCausalLMOutput | tuple:
        """As the backbone's, and:

        labels: (B, L), shifted inside, -100 = ignored; the loss is the cross-entropy in fp32.
        logits_to_keep: an int n for the last n positions (0 = all), or a tensor of positions.
        kwargs go to the loss: the trainer's `num_items_in_batch`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept].to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if not return_dict:
            values = (loss, logits, outputs.cache, outputs.hidden_states)
            return tuple(x for x in values if x is not None)
        return MambaRsstCausalLMOutput(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )


__all__ = ["MambaForCausalLM", "MambaRsstModel", "MambaRsstPreTrainedModel"]
