"""The Mamba paper's synthetic tasks (Gu & Dao 2023, arXiv:2312.00752, sec. 4.1): made from a seed, no data."""

import torch
from torch import Tensor

from .text_sources import word_tokenizer


# M sequences of L tokens. A task gives tokens (M, L) int32 and answers (M, L) bool, those to be predicted.


def induction(count: int, length: int, symbols: int, num_to_copy: int, seed: int) -> tuple[Tensor, Tensor]:
    """Induction heads: random symbols, among them once the mark and behind it some symbol; the last two tokens are the
    mark again and that symbol, the answer. Token 0 is the mark, the symbols follow."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, symbols + 1, (count, length), generator=generator, dtype=torch.int32)
    rows = torch.arange(count)
    place = torch.randint(0, length - 3, (count,), generator=generator)
    tokens[rows, place] = 0
    tokens[:, -2] = 0
    tokens[:, -1] = tokens[rows, place + 1]
    answers = torch.zeros(count, length, dtype=torch.bool)
    answers[:, -1] = True
    return tokens, answers


def selective_copying(count: int, length: int, symbols: int, num_to_copy: int, seed: int) -> tuple[Tensor, Tensor]:
    """Symbols at random places among blanks, then the mark, then those symbols in order, the answer. Token 0 is the
    mark, 1 the blank, the symbols follow."""
    generator = torch.Generator().manual_seed(seed)
    context = length - 1 - num_to_copy
    data = torch.randint(2, symbols + 2, (count, num_to_copy), generator=generator, dtype=torch.int32)
    places = torch.rand(count, context, generator=generator).argsort(-1)[:, :num_to_copy].sort(-1).values
    tokens = torch.ones(count, length, dtype=torch.int32)
    tokens.scatter_(1, places, data)
    tokens[:, context] = 0
    tokens[:, context + 1 :] = data
    answers = torch.zeros(count, length, dtype=torch.bool)
    answers[:, context + 1 :] = True
    return tokens, answers


GENERATED = {"induction": induction, "selective_copying": selective_copying}
"""Task -> its function."""


def check_generated(task: str, length: int, symbols: int, num_to_copy: int) -> None:
    """Raises ValueError for sequences too short to hold the task."""
    least = 4 if task == "induction" else 2 * num_to_copy + 1
    if length < least:
        raise ValueError(f"`block_size` must be at least {least} for {task!r}, got {length}.")


def generated_tokenizer(task: str, symbols: int):
    """Words for the task's tokens, so that a saved model can be asked in text."""
    special = ["mark"] if task == "induction" else ["mark", "blank"]
    return word_tokenizer(special + [f"s{i}" for i in range(symbols)])
