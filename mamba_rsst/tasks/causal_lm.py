"""The task causal-lm."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from .. import speed
from ..convert import config_from_mamba_ssm, convert_checkpoint
from ..hub import load_model, read_config
from ..models import LM_PRESETS, MambaForCausalLM, MambaRsstConfig, config_from_transformers
from ..models.configuration_mamba_rsst import TRANSFORMERS_TYPES
from ..training.text import TextCollator, TextData, TextDataConfig, load_text_data, text_tokenizer
from .base import Task, Workload, calibration_batches


VOCABULARY_MULTIPLE = 8
"""A preset embeds its tokenizer's tokens, filled up to a multiple of this: 50,277 become the public models' 50,280."""


class CausalLM(Task):
    name = "causal-lm"
    model_class = MambaForCausalLM
    config_class = MambaRsstConfig
    presets = LM_PRESETS
    data_config = TextDataConfig
    seeds_data = True
    metrics = ("perplexity", "accuracy")
    speed = "tokens_per_s"

    def load_tokenizer(self, recipe):
        return text_tokenizer(recipe.data, recipe.model.path)

    def load_data(self, recipe) -> TextData:
        tokenizer = self.load_tokenizer(recipe)
        self._check_vocabulary(recipe, tokenizer)  # before minutes of reading
        return load_text_data(recipe.data, tokenizer, seed=recipe.training.get("seed", 42))

    def _check_vocabulary(self, recipe, tokenizer) -> None:
        if recipe.model.path is not None:
            name, size = repr(recipe.model.path), _vocabulary_of(recipe.model.path)
        else:
            name, size = "`model.vocab_size`", recipe.model.overrides.get("vocab_size")
        if size is not None and len(tokenizer) > size:
            raise ValueError(f"The tokenizer has {len(tokenizer):,} tokens, but {name} embeds {size:,}.")

    def start_model(self, recipe, data):
        if recipe.model.path is not None:
            return _load(recipe.model.path)
        tokenizer, multiple = data.tokenizer, VOCABULARY_MULTIPLE
        defaults = {
            "vocab_size": math.ceil(len(tokenizer) / multiple) * multiple,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        }
        return MambaForCausalLM(MambaRsstConfig.preset(recipe.model.preset, **{**defaults, **recipe.model.overrides}))

    def prepare(self, recipe, args, model, data):
        if args.label_smoothing_factor:
            raise ValueError(
                "`training.label_smoothing_factor` does not go with language models: the perplexity would be another."
            )
        train, held_out = data.train.to(args.device), data.eval.to(args.device)
        calibrates = recipe.pruning is not None
        return {
            "train_dataset": train,
            "eval_dataset": held_out,
            "data_collator": TextCollator(train),
            "eval_data_collator": TextCollator(held_out, evaluation=True),
            "calibration": calibration_batches(args, train, TextCollator(train, evaluation=True))
            if calibrates
            else None,
            "processing_class": data.tokenizer,
            "preprocess_logits_for_metrics": block_sums,
            "compute_metrics": _perplexity if held_out.answers is None else _perplexity_and_accuracy,
        }

    def workload(self, model, recipe) -> Workload:
        """Prefill, as generation begins: fill the cache and compute the last token's logits. The multiply-accumulates
        are those of every token's logits, as in training and scoring: what generating a token costs too."""
        batch, length = speed.default_batch_size(model), recipe.data.block_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)
        return Workload(
            speed_inputs={"input_ids": ids, "use_cache": True, "logits_to_keep": 1},
            items_each=length,
            macs_inputs={"input_ids": ids[:1], "use_cache": False},
            macs_items=length,
            notes={"batch_size": batch, "seq_len": length},
        )


# ---- checkpoints ----
def _vocabulary_of(path: str) -> int:
    """Tokens that a checkpoint embeds, from its config.json alone."""
    content = read_config(path)
    if content.get("model_type") == MambaRsstConfig.model_type:
        return MambaRsstConfig.from_pretrained(path).vocab_size
    if content.get("model_type") in TRANSFORMERS_TYPES:
        return config_from_transformers(content).vocab_size
    if "model_type" not in content and {"d_model", "n_layer"} <= set(content):
        return config_from_mamba_ssm(content).vocab_size
    raise ValueError(f"{path!r} has model_type {content.get('model_type')!r}: it is no Mamba language model.")


def _load(path: str) -> MambaForCausalLM:
    """fp32 whatever the file holds: the small steps of training and of the decay would be rounded away in bf16."""
    if read_config(path).get("model_type") == MambaRsstConfig.model_type:
        return load_model(path, dtype=torch.float32)
    return convert_checkpoint(path, dtype=torch.float32)


# ---- metrics ----
def block_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, 3) fp32 of a batch: loss summed, tokens counted, tokens predicted right. All that leaves the device of its
    (B, L, V) logits. A block at a time: the batch would take its logits' memory once more.

    Not from the trainer's mean loss a batch, which counts blocks twice where a batch is filled up for all processes.
    """
    rows = []
    for predicted, targets in zip(logits[:, :-1], labels[:, 1:]):
        loss = F.cross_entropy(predicted.float(), targets, reduction="sum")
        right = (predicted.argmax(-1) == targets).sum()  # no token is -100
        rows.append(torch.stack([loss, (targets != -100).sum(), right]))
    return torch.stack(rows)


def _perplexity(prediction) -> dict:
    """exp of the mean loss a token."""
    loss, counted, _ = prediction.predictions.sum(0, dtype=np.float64)
    return {"perplexity": math.exp(min(loss / counted, 700.0))}


def _perplexity_and_accuracy(prediction) -> dict:
    _, counted, right = prediction.predictions.sum(0, dtype=np.float64)
    return {**_perplexity(prediction), "accuracy": right / counted}
