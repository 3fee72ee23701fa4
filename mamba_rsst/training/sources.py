"""What sources of images and of text share: names of paths and splits, and keeping `datasets` quiet."""

import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path


def looks_local(path: str) -> bool:
    """Whether a name that is no existing file or folder was meant for one, not for the hub's `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count(os.sep) >= 2


def split_of(file: Path) -> str:
    """The split that a file belongs to: "train" of train.parquet, train-00000-of-00002.parquet and train/0.parquet."""
    return re.sub(r"(^|[-_.])\d+([-_.]of[-_.]\d+([-_.]\w+)?)?$", "", file.stem) or file.parent.name


@contextmanager
def quiet():
    """No progress bars or information from `datasets` inside."""
    import datasets

    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
