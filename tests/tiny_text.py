"""Language-model runs for tests: real text without a network (Python's own docstrings), by trainer or by recipe."""

import functools
import inspect
import json
from pathlib import Path

import tiny_runs
import torch
from tiny import perturb_
from tiny_runs import COMMON

from mamba_rsst import MambaForCausalLM, MambaRsstConfig, PruningConfig, RSSTConfig, RSSTTrainer
from mamba_rsst.training.text import TextCollator, TextDataConfig, load_text_data, text_tokenizer


SHAPE = dict(hidden_size=16, num_hidden_layers=2, d_inner=28, d_state=3)
LENGTH = 32
STEPS = 4
"""Optimizer steps an epoch: 64 blocks in batches of 16."""
PRUNING = dict(targets=["d_inner"], sparsity=0.5, round_to=1)


@functools.cache
def docstrings() -> list[str]:
    """What the standard library says about itself."""
    import argparse
    import collections
    import logging
    import pathlib

    found = []
    for module in (argparse, collections, logging, pathlib):
        for _, value in sorted(vars(module).items()):
            if inspect.isclass(value) or inspect.isfunction(value):
                found.append(inspect.getdoc(value) or "")
    return [text for text in dict.fromkeys(found) if len(text) > 40]


def write_parquet(folder: Path, splits=("train", "test"), column="text", **more) -> Path:
    """A folder with one parquet file a split, a document a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    documents = docstrings()
    parts = {"train": documents[3:], "test": documents[:3]}
    for split in splits:
        texts = parts.get(split, documents)
        pq.write_table(
            pa.table({column: texts, **{k: [v] * len(texts) for k, v in more.items()}}), folder / f"{split}.parquet"
        )
    return folder


def write_jsonl(file: Path, texts, key="text") -> Path:
    file.write_text("".join(json.dumps({key: text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return file


def data_config(folder, **changes) -> TextDataConfig:
    defaults = dict(path=str(folder), tokenizer="bytes", block_size=LENGTH)
    defaults |= dict(max_train_tokens=64 * LENGTH, max_eval_tokens=20 * LENGTH)
    return TextDataConfig(**{**defaults, **changes})


def load(config: TextDataConfig):
    return load_text_data(config, text_tokenizer(config))


def make_model(seed=0, vocab_size=264, **overrides):
    torch.manual_seed(seed)
    return perturb_(MambaForCausalLM(MambaRsstConfig(vocab_size=vocab_size, **{**SHAPE, **overrides})), seed)


def make_trainer(folder, data, model=None, pruning=PRUNING, cls=RSSTTrainer, **arguments):
    defaults = dict(
        num_train_epochs=1,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        report_to="none",
        dataloader_pin_memory=False,
        **COMMON,
    )
    return cls(
        model=make_model() if model is None else model,
        args=RSSTConfig(output_dir=str(folder), **{**defaults, **arguments}),
        pruning=pruning and PruningConfig(**pruning),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=TextCollator(data.train),
        eval_data_collator=TextCollator(data.eval, evaluation=True),
    )


RECIPE = {
    "task": "causal-lm",
    "model": {"preset": "mamba_nano", **SHAPE},
    "data": {
        "tokenizer": "bytes",
        "block_size": LENGTH,
        "max_train_tokens": 64 * LENGTH,
        "max_eval_tokens": 20 * LENGTH,
    },
    "pruning": PRUNING,
    "training": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        **COMMON,
    },
}


def write_recipe(path, data_path, output_dir=None, **sections):
    """The tiny recipe as a file, on that text."""
    recipe = {**RECIPE, "data": {**RECIPE["data"], "path": str(data_path)}}
    return tiny_runs.write_recipe(path, output_dir, recipe, **sections)
