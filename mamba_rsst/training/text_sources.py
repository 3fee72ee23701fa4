"""Where text comes from: files of parquet, JSON or plain text, and the hub; and the tokenizers that read it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import reason_of
from .sources import looks_local, quiet, split_of


TEXT_COLUMNS = ("text", "content", "document", "article", "review", "sentence", "story", "body")
KINDS = {"parquet": (".parquet",), "json": (".jsonl", ".json"), "text": (".txt",)}
"""Kind of file -> its endings; of a folder that holds several kinds the first is read."""
BATCH = 256
"""Documents that are tokenised at a time."""
PIECE = 2**16
"""Characters of plain text that are tokenised at a time."""
BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


class TextSource:
    """The splits of what `path` names; `documents(split)` reads one from its beginning.

    splits: their names; None on the hub, which is asked for one at a time. A single file is one split, called "".
    Raises FileNotFoundError or ValueError naming what is wrong.
    """

    def __init__(self, path: str, *, name: str | None = None, text_column: str | None = None, streaming: bool = False):
        self.path, self.name, self.text_column, self.streaming = path, name, text_column, streaming
        self.files, self.kind, local = {}, None, Path(path).expanduser()
        if local.is_dir():
            for kind, endings in KINDS.items():
                for file in sorted(f for f in local.rglob("*") if f.suffix.lower() in endings and f.is_file()):
                    self.files.setdefault(split_of(file), []).append(str(file))
                if self.files:
                    self.kind = kind
                    break
            else:
                raise FileNotFoundError(f"`data.path`: {path!r} has no parquet, json or txt files (train.parquet).")
        elif local.is_file():
            self.kind = next((kind for kind, endings in KINDS.items() if local.suffix.lower() in endings), None)
            if self.kind is None:
                endings = [ending for endings in KINDS.values() for ending in endings]
                raise ValueError(f"`data.path`: {path!r} is none of the kinds of files that are read: {endings}.")
            self.files = {"": [str(local)]}
        elif looks_local(path):
            raise FileNotFoundError(f"`data.path`: there is no file or folder {path!r}.")

    @property
    def splits(self) -> list[str] | None:
        return sorted(self.files) if self.files else None

    def documents(self, split: str) -> Iterator[tuple[str, bool]]:
        """(text, whether its document ends there) of a split, in order. Plain text is one document a file."""
        if self.files and split not in self.files:
            raise ValueError(f"{self.path!r} has no split {split!r}; choose from {self.splits}.")
        if self.kind == "text":
            for file in self.files[split]:
                yield from _read_plain(file)
            return
        column = None
        try:
            with quiet():
                for batch in self._open(split).iter(batch_size=BATCH):
                    column = column or self._find_column(batch)
                    for text in batch[column]:
                        if text and not isinstance(text, str):
                            raise _Refused(f"Column {column!r} of {self.path!r} holds {text!r}, which is no text.")
                        if text:
                            yield text, True
        except _Refused as error:
            raise ValueError(str(error)) from None
        except ConnectionError as error:
            raise ValueError(
                f"The hub could not be reached for the data set {self.path!r} and nothing local has that name; "
                "`data.path=` takes a file or folder too."
            ) from error
        except Exception as error:
            part = f"split {split!r} of " if split else ""  # a single file has none
            raise ValueError(f"Cannot read {part}{self.path!r}: {reason_of(error)}") from error

    def _open(self, split):
        import datasets

        if self.files:  # never through the cache of `datasets`, which would copy them to read them once
            return datasets.load_dataset(self.kind, data_files={"rows": self.files[split]}, streaming=True)["rows"]
        return datasets.load_dataset(self.path, self.name, split=split, streaming=self.streaming)

    def _find_column(self, batch) -> str:
        first = {name: values[0] for name, values in batch.items()}
        chosen = self.text_column
        if chosen is not None and chosen not in first:
            raise _Refused(f"`data.text_column`: no column {chosen!r}; choose from {list(first)}.")
        texts = [name for name, value in first.items() if isinstance(value, str)]
        for name in TEXT_COLUMNS if chosen is None else [chosen]:
            if name in texts:
                return name
        if chosen is not None:
            raise _Refused(f"Column {chosen!r} holds no text but {type(first[chosen]).__name__}.")
        if len(texts) == 1:
            return texts[0]
        raise _Refused(f"No text column found among {list(first)}; name it with `data.text_column`.")


class _Refused(Exception):
    """Passes the handler of what `datasets` raises."""


def _read_plain(file: str) -> Iterator[tuple[str, bool]]:
    """A file in pieces that end with a line."""
    try:
        with open(file, encoding="utf-8") as lines:
            while piece := lines.readlines(PIECE):
                yield "".join(piece), False
    except UnicodeDecodeError as error:
        raise ValueError(f"{file!r} is not UTF-8 text: {error}") from error
    yield "", True


def token_chunks(documents: Iterator[tuple[str, bool]], tokenizer) -> Iterator[np.ndarray]:
    """The documents' tokens, int32, many documents at a time, each document followed by the end-of-text token."""
    texts, ends = [], []

    def chunk():
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        flat = []
        for tokens, end in zip(ids, ends):
            flat += tokens
            if end:
                flat.append(tokenizer.eos_token_id)
        return np.asarray(flat, dtype=np.int32)

    size = 0
    for text, end in documents:
        texts.append(text)
        ends.append(end)
        size += len(text)
        if len(texts) >= BATCH or size >= 16 * PIECE:
            yield chunk()
            texts, ends, size = [], [], 0
    if texts:
        yield chunk()


# ---- tokenizers ----
def load_tokenizer(name: str):
    """A tokenizer from a folder or the hub, or `bytes`. Raises ValueError where there is none, or no end of text."""
    if name == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    if not Path(name).expanduser().is_dir() and (looks_local(name) or Path(name).exists()):
        raise ValueError(f"There is no folder {name!r} to load a tokenizer from.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if Path(name).exists() else name)
    except Exception as error:
        raise ValueError(f"{name!r} holds no tokenizer that can be loaded: {reason_of(error)[:200]}") from error
    # Where a folder has a config.json alone, transformers makes up a tokenizer that knows no words.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name!r} holds no tokenizer; name one with `data.tokenizer`, or `{BYTES}`.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name!r} has no eos_token to stand between documents.")
    return tokenizer


def byte_tokenizer():
    """One token a byte of UTF-8, and the end of text as token 0: 257 tokens, without any file."""
    from tokenizers import decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {symbol: i for i, symbol in enumerate(symbols, 1)}
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _fast_tokenizer(models.BPE(vocab=vocabulary, merges=[]), whole, decoders.ByteLevel(), END_OF_TEXT)


def word_tokenizer(words: list[str]):
    """One token a word, numbered in order; words are parted by spaces."""
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(words)}
    return _fast_tokenizer(models.WordLevel(vocabulary, unk_token=words[0]), pre_tokenizers.WhitespaceSplit())


def _fast_tokenizer(model, pre_tokenizer, decoder=None, end=None):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    special = {} if end is None else {"bos_token": end, "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
