"""Where images come from: scikit-learn's digits, local folders, the hub."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import reason_of
from .sources import looks_local, quiet, split_of


IMAGE_COLUMNS = ("img", "image", "images", "pixel_values", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


def _digits():
    """scikit-learn's handwritten digits: 1,437 for training and 360 for testing, always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = [Image.fromarray(pixels) for pixels in np.rint(digits.images * (255 / 16)).astype(np.uint8)]
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target.tolist(), test_size=360, stratify=digits.target, random_state=0
    )
    names = [str(digit) for digit in range(10)]
    return {"train": (train_x, train_y, names), "test": (test_x, test_y, names)}


def load_splits(config):
    """{split: (images, labels, class names or None)} of an `ImageDataConfig`; splits it does not name are None.

    Nothing is decoded yet: images is a sequence that slices into PIL images or {"bytes", "path"} dictionaries.
    """
    folder = Path(config.path).expanduser()
    if config.name is not None and (config.path == "digits" or folder.is_dir()):
        warnings.warn(f"`data.name` {config.name!r} is ignored: {config.path!r} is not on the hub.", stacklevel=3)
    if config.path == "digits":
        return _digits()

    import datasets

    if folder.is_dir():
        with quiet():
            loaded = _load_folder(folder, config)
    elif looks_local(config.path) or folder.exists():
        raise FileNotFoundError(f"`data.path`: {config.path!r} is not an existing folder.")
    else:
        try:
            loaded = datasets.load_dataset(config.path, config.name)
        except ConnectionError as error:
            raise ValueError(
                f"The hub could not be reached for the data set {config.path!r} and no local folder has that name; "
                "`data.path=` takes a local folder too."
            ) from error
        except Exception as error:
            raise ValueError(f"Cannot load {config.path!r} from the hub: {reason_of(error)}") from error
    result = {}
    for split, rows in loaded.items():
        if split not in (config.train_split, config.eval_split):
            result[split] = None  # a choice to name, not to load
            continue
        image = _find_column(rows.features, "image", config.image_column, IMAGE_COLUMNS, datasets.Image)
        label = _find_column(rows.features, "label", config.label_column, LABEL_COLUMNS, datasets.ClassLabel)
        try:
            images = rows.cast_column(image, datasets.Image(decode=False))[image]
        except Exception as error:
            raise ValueError(f"Column {image!r} holds no images but {rows.features[image]}.") from error
        result[split] = images, rows[label][:], getattr(rows.features[label], "names", None)
    return result


def _load_folder(folder, config):
    """{split: datasets.Dataset} of the splits that the configuration names; of others the file names."""
    import datasets
    import pyarrow.parquet as pq

    splits = {}
    for file in sorted(folder.rglob("*.parquet")):
        splits.setdefault(split_of(file), []).append(str(file))
    kind, options = "parquet", {}
    if not splits:
        extensions = Image.registered_extensions()
        for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
            if any(file.suffix.lower() in extensions for file in sub.rglob("*")):
                splits[sub.name] = f"{sub}/**"
        described = any(folder.rglob("metadata.*"))
        kind, options = "imagefolder", {"drop_labels": None if described else False}
    if not splits:
        raise FileNotFoundError(
            f"`data.path`: {str(folder)!r} has neither parquet files (train.parquet) nor images (train/CLASS/1.png)."
        )
    for split in [split for split in splits if split in (config.train_split, config.eval_split)]:
        files = splits[split]
        try:
            if kind == "parquet" and not any(pq.read_metadata(file).num_rows for file in files):
                raise ValueError(f"split {split!r} is empty")  # load_dataset has no word for it
            splits[split] = datasets.load_dataset(kind, data_files={split: files}, **options)[split]
        except Exception as error:
            raise ValueError(f"Cannot read the {kind} data in {str(folder)!r}: {reason_of(error)}.") from error
    return splits


def _find_column(features, what, chosen, names, kind):
    if chosen is not None and chosen not in features:
        raise ValueError(f"`data.{what}_column`: no column {chosen!r}; choose from {list(features)}.")
    for name in names if chosen is None else [chosen]:
        if name in features:
            return name
    for name, feature in features.items():
        if isinstance(feature, kind):
            return name
    raise ValueError(f"No {what} column found among {list(features)}; name it with `data.{what}_column`.")
