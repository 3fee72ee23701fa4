"""Data of the task files in this folder: plain files below one folder, read without a network and without a cache.

The folder is MAMBA_RSST_DATA in the environment, or `--metadata '{"data": "FOLDER"}'` of the lm_eval command. In it:

    lambada/test.jsonl          one passage a line, under the key "text"
    wikitext2/test.txt          the corpus's plain lines, tokenised (`@-@`, `<unk>`), articles one after the other
    wikitext2/valid.txt         the same; needed by no task, read if it is there

This file runs inside the harness, also where mamba_rsst is not installed, so it imports nothing from it.
"""

import json
import os
from pathlib import Path

import datasets

# The standard task's own functions, so that words and bytes are counted as there. They are imported here because the
# harness looks for a task's functions in the folder of the task's file.
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer


__all__ = ["lambada", "process_results", "wikitext2", "wikitext_detokenizer"]


def lambada(data=None, **metadata):
    """{"test": documents with a `text`}."""
    file = _file(data, "lambada/test.jsonl")
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Line {number} of {str(file)!r} is no JSON object with the key 'text'.") from error
        if not isinstance(text, str) or " " not in text.strip():
            raise ValueError(f"Line {number} of {str(file)!r} has no last word to guess: its 'text' is {text!r:.80}.")
        texts.append(text)
    return {"test": _documents(file, text=texts)}


def wikitext2(data=None, **metadata):
    """{"test": documents with a `page`, "validation": the same where its file is}."""
    files = {"test": _file(data, "wikitext2/test.txt")}
    validation = files["test"].with_name("valid.txt")
    if validation.is_file():
        files["validation"] = validation
    return {split: _documents(file, page=pages(file.read_text(encoding="utf-8"))) for split, file in files.items()}


def pages(text: str) -> list[str]:
    """The text cut before each line `= Title =`; `= = Section = =` is no title. Joined with newlines it is the text.

    The rule is that of the data set behind the standard task (EleutherAI/wikitext_document_level), which takes two
    lines of a formula in the test set for titles too: 62 pages there, of 60 articles.
    """
    found, page = [], []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append(page)
            page = []
        page.append(line)
    found = ["\n".join(lines) for lines in (*found, page)]
    return [page for page in found if page.strip()]


def _file(data, name):
    folder = data or os.environ.get("MAMBA_RSST_DATA")
    if not folder:
        raise FileNotFoundError(
            f"The environment variable MAMBA_RSST_DATA must name the folder that holds {name}; it is not set."
        )
    file = Path(folder).expanduser() / name
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r} (the folder comes from MAMBA_RSST_DATA or `data`).")
    return file


def _documents(file, **columns):
    if not any(columns.values()):
        raise ValueError(f"{str(file)!r} holds no text.")
    return datasets.Dataset.from_dict(columns)
