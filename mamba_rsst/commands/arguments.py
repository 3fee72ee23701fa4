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


def match_classes(model, path: str, data) -> None:
    """Number the data's classes as the model does, by their names. Raises ValueError for another number of them; other
    names are warned of and taken in their order."""
    import warnings

    import torch

    if len(data.id2label) != model.config.num_labels:
        raise ValueError(f"{path!r} has {len(data.id2label)} classes, the model {model.config.num_labels}.")
    theirs = [str(data.id2label[i]) for i in range(len(data.id2label))]
    ours = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    if theirs == ours or ours == [f"LABEL_{i}" for i in range(len(ours))]:
        return
    if sorted(theirs) != sorted(ours):
        warnings.warn(f"The classes of {path!r} are {theirs}, the model's {ours}: they are taken in this order.")
        return
    numbers = torch.tensor([ours.index(name) for name in theirs])
    for part in (data.train, data.eval):
        part.labels = numbers[part.labels]


def normalisation(model_path: str, data):
    """The mean and deviation that the model was trained with, from its preprocessor; else the data's own."""
    import json
    from pathlib import Path

    file = Path(model_path) / "preprocessor_config.json"
    if not file.is_file():
        return data.mean, data.std
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{str(file)!r} is damaged: it holds {saved!r}.")
    if "image_mean" not in saved or "image_std" not in saved:
        return data.mean, data.std
    mean, std = saved["image_mean"], saved["image_std"]
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != len(data.mean) or (name == "image_std" and min(values) <= 0):
            raise ValueError(f"{str(file)!r} is damaged: its {name!r} is {values!r}.")
    return mean, std
