"""Text as blocks of tokens, in memory or streamed: documents end to end, an end-of-text token behind each."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .data import rebound
from .generated_text import GENERATED, check_generated, generated_tokenizer
from .image_ops import send
from .text_sources import TextSource, token_chunks


# M blocks in a split, B in a batch, L = block_size tokens.
GENERATED_BLOCKS = {"train": 8192, "eval": 1024}
"""Sequences of a generated task unless `max_train_tokens` and `max_eval_tokens` say otherwise."""


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    path: str = "induction"
    """A hub id; a folder of parquet, json or txt files named after their split (`train.parquet`); one such file; or
    `induction` or `selective_copying`, tasks of the Mamba paper that are generated and need no data."""
    name: str | None = None
    """Configuration of a hub data set."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = "test"
    """Split to evaluate on; None = the last part of the training split, as always with a single file."""
    holdout: float = 0.05
    """The fraction of the blocks that is then held out."""
    text_column: str | None = None
    """Column of the text; None = found by its name or type."""
    tokenizer: str | None = None
    """Folder or hub id, or `bytes`: one token a byte, no files. None = that of `model.path`."""
    block_size: int = 512
    """Tokens of a sequence, for a generated task its answer included."""
    max_train_tokens: int | None = None
    """Train on the first so many tokens only, in whole blocks."""
    max_eval_tokens: int | None = None
    """Evaluate on the first so many tokens only, in whole blocks."""
    streaming: bool = False
    """Read and tokenise the training text anew in every epoch instead of holding it in memory. An epoch then has
    `max_train_tokens` tokens, the first ones of the text, shuffled within a buffer."""
    shuffle_buffer: int = 4096
    """With `streaming`: blocks to draw from."""
    num_symbols: int = 16
    """Generated tasks: symbols in the vocabulary, the tokens with a meaning of their own not counted."""
    num_to_copy: int = 16
    """selective_copying: symbols to copy."""

    def __post_init__(self):
        for name in ("path", "name", "train_split", "eval_split", "text_column", "tokenizer"):
            value = getattr(self, name)
            optional = name not in ("path", "train_split")
            if not (isinstance(value, str) and value.strip()) and not (optional and value is None):
                raise ValueError(f"`{name}` must be a non-empty string{' or None' * optional}, got {value!r}.")
        least = {"block_size": 2, "shuffle_buffer": 1, "num_symbols": 2, "num_to_copy": 1}
        for name in (*least, "max_train_tokens", "max_eval_tokens"):
            value, low = getattr(self, name), least.get(name, self.block_size)
            if value is None and name not in least:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                what = "a whole number" + " or None" * (name not in least)
                bound = f"{low}, one block" if name not in least else low
                raise ValueError(f"`{name}` must be {what} of at least {bound}, got {value!r}.")
        if not isinstance(self.holdout, (int, float)) or not 0 < self.holdout < 1:
            raise ValueError(f"`holdout` must be in (0, 1), got {self.holdout!r}.")
        if self.streaming not in (True, False):
            raise ValueError(f"`streaming` must be true or false, got {self.streaming!r}.")
        if self.generated:
            check_generated(self.path, self.block_size, self.num_symbols, self.num_to_copy)
            names = ("name", "text_column", "tokenizer", "streaming")
            if ignored := [name for name in names if getattr(self, name)]:
                warnings.warn(f"{self.path!r} is generated: `data` ignores {ignored}.", stacklevel=4)
        elif self.streaming and self.max_train_tokens is None:
            raise ValueError("`streaming` needs `max_train_tokens`: it says how long an epoch is.")
        elif self.streaming and self.eval_split is None:
            raise ValueError("`streaming` needs an `eval_split`: nothing can be held out of a stream.")

    @property
    def generated(self) -> bool:
        return self.path in GENERATED


class TokenBlocks(Dataset):
    """tokens: (M, L) int32.  answers: (M, L) bool, the tokens that count in the loss; None = all.

    `dataset[i]` is `i` itself: the collator gathers a whole batch with one index, on the device that holds the tokens.
    `epoch` is read by the sampler and set by every loader that iterates over this data set.
    """

    def __init__(self, tokens: Tensor, answers: Tensor | None = None):
        assert tokens.dtype == torch.int32 and tokens.ndim == 2
        self.tokens, self.answers, self.epoch = tokens, answers, 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return index

    def to(self, device):
        """Move the tensors in place; returns self."""
        self.tokens = self.tokens.to(device)
        self.answers = None if self.answers is None else self.answers.to(device)
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def first(self, count: int) -> list[int]:
        """Items for the collator."""
        return list(range(min(count, len(self))))


class TokenStream(IterableDataset):
    """Blocks (L,) int32, read and packed as they are asked for, and shuffled within a buffer.

    blocks: makes an iterator over the blocks, from the first one.  length: blocks of an epoch, which begins anew with
    the first one; a shorter text is repeated. Which block comes when depends on (seed, epoch) alone, so a resumed run
    that skips what it has seen goes on in the same order. `seed` and `epoch` are set by the trainer.
    """

    def __init__(self, blocks: Callable[[], Iterator[Tensor]], length: int, buffer: int, seed: int = 0):
        self.blocks, self.length, self.buffer, self.seed, self.epoch = blocks, length, buffer, seed, 0

    def __len__(self):
        return self.length

    def to(self, device):
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def first(self, count: int) -> list[Tensor]:
        """The first blocks of the text, not shuffled: items for the collator."""
        return [block for _, block in zip(range(min(count, self.length)), self._endless())]

    def _endless(self):
        while True:
            yield from self.blocks()

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        held = []
        for _, block in zip(range(self.length), self._endless()):
            if len(held) < self.buffer:
                held.append(block)
                continue
            place = int(rng.integers(len(held)))
            held[place], block = block, held[place]
            yield block
        for place in rng.permutation(len(held)):
            yield held[place]


class TextCollator:
    """Turns items into `input_ids` and `labels`, (B, L) int64 on the data set's device.

    labels: the tokens themselves, which the model shifts; -100 for what counts for nothing, which the first token of a
    block never does: nothing comes before it. evaluation: tell the model to build no cache, as it does in training.
    """

    def __init__(self, dataset, evaluation: bool = False):
        self.dataset, self.evaluation = dataset, evaluation

    def for_dataset(self, dataset):
        """The same for another TokenBlocks, or a Subset of one. Raises ValueError for any other set."""
        return self if isinstance(dataset, IterableDataset) else rebound(self, dataset, TokenBlocks)

    def __call__(self, items):
        answers = None
        if isinstance(items[0], Tensor):
            tokens = torch.stack(items).long()
        else:
            index = send(torch.tensor(items), self.dataset.tokens)
            tokens = self.dataset.tokens[index].long()
            answers = None if self.dataset.answers is None else self.dataset.answers[index]
        labels = tokens.clone() if answers is None else tokens.masked_fill(~answers, -100)
        labels[:, 0] = -100
        return {"input_ids": tokens, "labels": labels} | ({"use_cache": False} if self.evaluation else {})


@dataclass(frozen=True, kw_only=True)
class TextData:
    train: TokenBlocks | TokenStream
    eval: TokenBlocks
    tokenizer: Any


def text_tokenizer(config: TextDataConfig, model_path: str | None = None):
    """The tokenizer of a configuration: the one it names, the generated task's own, or that of the model.

    Raises ValueError where there is none.
    """
    from .text_sources import BYTES, load_tokenizer

    if config.generated:
        return generated_tokenizer(config.path, config.num_symbols)
    if config.tokenizer is None and model_path is None:
        raise ValueError(f"`data.tokenizer` is missing: name a folder, a hub id, or `{BYTES}`.")
    return load_tokenizer(config.tokenizer or model_path)


def load_text_data(config: TextDataConfig, tokenizer, seed: int = 0) -> TextData:
    """Load the two splits of a `TextDataConfig`; `seed` is that of generated tasks.

    Raises FileNotFoundError or ValueError naming what is wrong: no such data, split or column, or less than a block.
    """
    if config.generated:
        return _generate(config, tokenizer, seed)
    source = TextSource(config.path, name=config.name, text_column=config.text_column, streaming=config.streaming)
    single = source.splits == [""]
    train_split = "" if single else config.train_split
    eval_split = None if single else config.eval_split
    if source.splits is not None:
        for split in (train_split, eval_split):
            if split is not None and split not in source.splits:
                raise ValueError(f"{config.path!r} has no split {split!r}; choose from {source.splits}.")
    if eval_split is None:
        if config.streaming:
            raise ValueError(f"{config.path!r} has no split to evaluate on, and nothing can be held out of a stream.")
        blocks = pack_split(config, source, train_split, tokenizer)
        held = max(1, round(config.holdout * len(blocks)))
        if held == len(blocks):
            raise ValueError(f"{_where(config, train_split)} is one block of {config.block_size} tokens: too few.")
        train, held_out = blocks[:-held], blocks[-held:]
        train = train[: _blocks(config, config.max_train_tokens)].clone()
        held_out = held_out[: _blocks(config, config.max_eval_tokens)].clone()
        return TextData(train=TokenBlocks(train), eval=TokenBlocks(held_out), tokenizer=tokenizer)
    held_out = pack_split(config, source, eval_split, tokenizer, config.max_eval_tokens)
    if config.streaming:
        train = TokenStream(
            lambda: _stream(config, source, train_split, tokenizer),
            length=_blocks(config, config.max_train_tokens),
            buffer=config.shuffle_buffer,
        )
        train.first(1)  # what is wrong with the text shows now
    else:
        train = TokenBlocks(pack_split(config, source, train_split, tokenizer, config.max_train_tokens))
    return TextData(train=train, eval=TokenBlocks(held_out), tokenizer=tokenizer)


def _blocks(config, tokens: int | None) -> int | None:
    return None if tokens is None else tokens // config.block_size


def _where(config, split: str) -> str:
    return f"Split {split!r} of {config.path!r}" if split else f"The text of {config.path!r}"


def pack_split(config: TextDataConfig, source: TextSource, split: str, tokenizer, limit: int | None = None) -> Tensor:
    """A split's first `limit` tokens as blocks (M, L) int32; what is left over at the end is dropped."""
    from tqdm.auto import tqdm

    parts, count = [], 0
    with tqdm(desc=f"tokenising {split or config.path}", unit="token", unit_scale=True, delay=5) as bar:
        for tokens in token_chunks(source.documents(split), tokenizer):
            parts.append(tokens)
            count += len(tokens)
            bar.update(len(tokens))
            if limit is not None and count >= limit:
                break
    _check_length(config, split, count)
    size = config.block_size
    whole = count // size if limit is None else min(count, limit) // size
    return torch.from_numpy(np.concatenate(parts)[: whole * size].reshape(whole, size))


def _stream(config, source, split, tokenizer) -> Iterator[Tensor]:
    """The blocks of a split, one at a time."""
    size, rest, count = config.block_size, np.zeros(0, dtype=np.int32), 0
    for tokens in token_chunks(source.documents(split), tokenizer):
        count += len(tokens)
        rest = np.concatenate([rest, tokens])
        whole = len(rest) // size * size
        yield from torch.from_numpy(rest[:whole].reshape(-1, size))
        rest = rest[whole:].copy()
    _check_length(config, split, count)


def _check_length(config, split, count: int) -> None:
    if count == 0:
        raise ValueError(f"{_where(config, split)} is empty.")
    if count < config.block_size:
        raise ValueError(
            f"{_where(config, split)} has {count} tokens, fewer than one block of {config.block_size}; lower "
            "`data.block_size`."
        )


def _generate(config, tokenizer, seed) -> TextData:
    parts = {}
    for i, (part, default) in enumerate(GENERATED_BLOCKS.items()):
        count = _blocks(config, getattr(config, f"max_{part}_tokens")) or default
        shape = (count, config.block_size, config.num_symbols, config.num_to_copy)
        parts[part] = TokenBlocks(*GENERATED[config.path](*shape, 2 * seed + i))
    return TextData(**parts, tokenizer=tokenizer)
