"""What the commands share: the words of the command line, checked, and what they name."""

import argparse


def fraction(word: str):
    """0.5 -> 0.5, d_inner=0.5 -> ("d_inner", 0.5)."""
    target, equals, number = word.rpartition("=")
    try:
        return (target, float(number)) if equals else float(number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a fraction nor TARGET=FRACTION") from error


def new_folder(name: str, source: str):
    """The path of a folder to write, which must not exist, nor lie inside the folder that is read."""
    from pathlib import Path

    from ..report import check_writable

    out = Path(name).expanduser()
    if not name.strip():
        raise ValueError("The output folder has no name.")
    if out.exists():
        raise ValueError(f"{name!r} exists; choose a new folder.")
    if Path(source).is_dir() and Path(source).resolve() in out.absolute().resolve().parents:
        raise ValueError(f"{name!r} lies inside {source!r}, which is being read; choose a folder beside it.")
    return check_writable(out, name)


def json_file(name: str | None):
    """The path of --json's file, None where it was not given; said to be unwritable before any work is done."""
    from pathlib import Path

    from ..report import check_writable

    if name is None or name == "-":
        return None
    file = Path(name).expanduser()
    if file.is_dir():
        raise ValueError(f"--json {name!r} is a folder.")
    return check_writable(file, name)


def move(model, device: str) -> None:
    import torch

    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing can be computed there")
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown device and for a missing one
        raise ValueError(f"--device {device!r} cannot be used: {error}") from error


def short_names(paths: list[str]) -> dict[str, str]:
    """{a name for the table: path}; the whole path where short ones are alike."""
    from pathlib import Path

    folders = {path: Path(path).expanduser().resolve() for path in paths}
    if len(set(folders.values())) < len(paths):
        raise ValueError(f"There is nothing to compare: both models are {paths[0]!r}.")
    # A run keeps the models of its stages in folders like stages/0-train/model.
    short = {f.parent.name if f.name == "model" else f.name: path for path, f in folders.items()}
    return short if len(short) == len(paths) else {path: path for path in paths}


def check_classes(model, path: str, data) -> None:
    if len(data.id2label) != model.config.num_labels:
        raise ValueError(f"{path!r} has {len(data.id2label)} classes, the model {model.config.num_labels}.")
