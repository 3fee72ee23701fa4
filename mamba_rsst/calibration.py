"""Text for scores that look at data: a few batches of tokens from local files."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch


SUFFIXES = (".txt", ".jsonl", ".parquet")


def text_calibration(path: str | Path, tokenizer, block_size: int, count: int, batch_size: int = 4) -> list[dict]:
    """`count` sequences of `block_size` tokens, packed from the beginning of the text, as batches with labels.

    path: a .txt, .jsonl or .parquet file (of the latter two, what stands under "text"), or a folder of them.
    Raises FileNotFoundError or ValueError for files that are absent, of another kind, or hold too little text.
    """
    if block_size < 2 or count < 1:
        raise ValueError(f"Text is scored in 1 or more sequences of 2 or more tokens, not {count} of {block_size}.")
    wanted, ids = block_size * count, []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in _texts(Path(path).expanduser()):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) >= wanted:
            break
    whole = min(count, len(ids) // block_size)
    if whole == 0:
        raise ValueError(f"{str(path)!r} holds {len(ids)} tokens, too few for one sequence of {block_size}.")
    blocks = torch.tensor(ids[: whole * block_size]).view(whole, block_size)
    return [{"input_ids": part, "labels": part} for part in blocks.split(batch_size)]


def _texts(path: Path) -> Iterator[str]:
    if not path.exists():
        raise FileNotFoundError(f"There is no text at {str(path)!r}.")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or any(file.suffix not in SUFFIXES for file in files):
        raise ValueError(f"{str(path)!r} must be, or hold, files of these kinds: {list(SUFFIXES)}.")
    for file in files:
        try:
            for text in _texts_of(file):
                if not isinstance(text, str):
                    raise TypeError(f"it holds {text!r}")
                yield text
        except (KeyError, TypeError, ValueError, OSError) as error:  # pyarrow's errors are of these kinds too
            raise ValueError(f"{str(file)!r} cannot be read as text under the key 'text': {error}") from error


def _texts_of(file: Path) -> Iterator[str]:
    if file.suffix == ".txt":
        yield file.read_text(encoding="utf-8")
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines if line.strip())
    else:
        import pyarrow.parquet

        for rows in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from rows.to_pydict()["text"]
