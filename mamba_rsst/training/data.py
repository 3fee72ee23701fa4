"""Image data as uint8 tensors in memory: loading, a resumable shuffle and a deterministic collator."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler, Subset

from .augmentation import uniforms
from .image_ops import send_all
from .image_sources import load_splits


# M images in a split, B in a batch, C channels, H = W = image_size, K classes.


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    path: str = "digits"
    """`digits` (scikit-learn's 8x8 handwritten digits, no download), a local folder, or a hub id.

    A folder holds parquet files named after their split (`train.parquet`, `train-00000-of-00002.parquet`) or images
    (`train/cat/1.png`). The images are kept in memory."""
    name: str | None = None
    """Configuration of a hub data set."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to evaluate on."""
    image_column: str | None = None
    """Column of the images; None = found by its name or type."""
    label_column: str | None = None
    """Column of the labels; None = found by its name or type."""
    max_train_samples: int | None = None
    """Train on the first so many images only."""
    max_eval_samples: int | None = None
    """Evaluate on the first so many images only."""
    resize: bool = False
    """Scale and centre-crop images of another size to the model's; without it they are an error."""
    mean: list[float] | None = None
    """Mean per channel, for pixels in [0, 1]; None = measured on the training images."""
    std: list[float] | None = None
    """Standard deviation per channel, for pixels in [0, 1]; None = measured on the training images."""

    def __post_init__(self):
        for name in ("path", "train_split", "eval_split", "name", "image_column", "label_column"):
            value = getattr(self, name)
            optional = name in ("name", "image_column", "label_column")
            if not (isinstance(value, str) and value.strip()) and not (optional and value is None):
                raise ValueError(f"`{name}` must be a non-empty string{' or None' * optional}, got {value!r}.")
        if self.image_column is not None and self.image_column == self.label_column:
            raise ValueError(f"`image_column` and `label_column` are both {self.image_column!r}.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1 or None, got {value!r}.")
        if self.resize not in (True, False):
            raise ValueError(f"`resize` must be true or false, got {self.resize!r}.")
        for name, low in (("mean", 0), ("std", 1e-6)):
            value = getattr(self, name)
            ok = isinstance(value, Sequence) and all(isinstance(x, (int, float)) and low <= x <= 1 for x in value)
            if value is not None and not (ok and len(value) in (1, 3)):
                raise ValueError(f"`{name}` must hold 1 or 3 numbers in [{low}, 1], one per channel, got {value!r}.")


class ImageTensors(Dataset):
    """images: (M, C, H, W) uint8; labels: (M,) int64.

    `dataset[i]` is `i` itself: the collator gathers a whole batch with one tensor index, on the device that holds the
    images, where single images would have to be stacked again. So a DataLoader needs `ImageCollator`, no workers,
    and, once the images are on a GPU, no pinned memory.

    `epoch` is read by the sampler and the collator and set by every loader that iterates over this data set. A second
    loader in the middle of an epoch needs a `copy.copy` of it, which shares the memory.
    """

    def __init__(self, images, labels):
        assert images.dtype == torch.uint8 and images.ndim == 4 and labels.shape == images.shape[:1]
        self.images, self.labels, self.epoch = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return index

    def to(self, device):
        """Move the tensors in place; returns self."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def first(self, count: int) -> list[int]:
        """Items for the collator."""
        return list(range(min(count, len(self))))


@dataclass(frozen=True, kw_only=True)
class ImageData:
    train: ImageTensors
    eval: ImageTensors
    id2label: dict[int, str]
    mean: list[float]
    std: list[float]


def load_image_data(config, *, image_size, num_channels=3):
    """Load the two splits of an `ImageDataConfig` into memory. Returns an `ImageData`."""
    if num_channels not in (1, 3):
        raise ValueError(f"`num_channels` must be 1 or 3, got {num_channels!r}.")
    for name in ("mean", "std"):
        if len(getattr(config, name) or [0] * num_channels) != num_channels:
            raise ValueError(f"`data.{name}` has {len(getattr(config, name))} values for {num_channels} channels.")
    splits = load_splits(config)
    for split in (config.train_split, config.eval_split):
        if split not in splits:
            raise ValueError(f"{config.path!r} has no split {split!r}; choose from {sorted(splits)}.")
        if len(splits[split][0]) == 0:
            raise ValueError(f"Split {split!r} of {config.path!r} is empty.")
    id2label = _class_names(*splits[config.train_split][1:])
    train_labels = _class_ids(splits[config.train_split], config.max_train_samples, id2label, config.train_split)
    if len(train_labels.unique()) < 2:
        part = "" if config.max_train_samples is None else f" in its first {len(train_labels)} training images"
        only = id2label[train_labels[0].item()]
        raise ValueError(f"{config.path!r} has only one class ({only!r}){part}: a classifier needs at least two.")
    eval_labels = _class_ids(splits[config.eval_split], config.max_eval_samples, id2label, config.eval_split)
    parts = []
    for split, ids in ((config.train_split, train_labels), (config.eval_split, eval_labels)):
        where = f"split {split!r} of {config.path!r}"
        images = _decode(splits[split][0], len(ids), image_size, num_channels, config.resize, where)
        parts.append(ImageTensors(images, ids))
    mean, std = _channel_statistics(parts[0].images)
    mean, std = list(config.mean or mean), list(config.std or std)
    return ImageData(train=parts[0], eval=parts[1], id2label=id2label, mean=mean, std=std)


# --------------------------------------------------------------------------------------------------- labels and pixels


def _class_names(labels, names):
    """id2label of the training labels: the data set's own names, else the sorted labels themselves."""
    if names is not None:
        return dict(enumerate(names))
    odd = [label for label in labels if not isinstance(label, (int, str))]
    if odd:
        raise ValueError(f"Labels must be whole numbers or strings, got {odd[0]!r}.")
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError("Labels must be all whole numbers or all strings, got both.")
    found = sorted(set(labels))
    if not isinstance(found[0], str) and found != list(range(len(found))):
        raise ValueError(f"Labels must be 0..{len(found) - 1} for {len(found)} classes, got {found[0]}..{found[-1]}.")
    return {i: str(label) for i, label in enumerate(found)}


def _class_ids(source, limit, id2label, split):
    """The first `limit` labels of a split as int64 class ids, (M,): by name where the split names its classes."""
    _, labels, names = source
    if names is not None:
        labels = [names[label] if label in range(len(names)) else label for label in labels[:limit]]
    label2id = {name: i for i, name in id2label.items()}
    ids = [label2id.get(label, -1) if isinstance(label, str) else label for label in labels[:limit]]
    for label, i in zip(labels, ids):
        if i not in id2label:
            raise ValueError(f"Split {split!r} has the label {label!r}, which is none of the {len(id2label)} classes.")
    return torch.tensor(ids, dtype=torch.long)


def _decode(images, count, size, channels, resize, where):
    """The first `count` images, decoded or opened by several threads, as uint8 (count, channels, size, size)."""
    from tqdm.auto import tqdm

    def pixels(image, number):
        if image is None:
            raise ValueError(f"Image {number} of {where} is missing: its cell is empty.")
        try:
            if isinstance(image, dict):
                image = Image.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
            image = image.convert("L" if channels == 1 else "RGB")
        except Exception as error:
            raise ValueError(f"Image {number} of {where} cannot be decoded: {error}") from error
        if image.size != (size, size):
            if not resize:
                raise ValueError(
                    f"Image {number} of {where} is {image.width}x{image.height}, the model takes {size}x{size}; "
                    "`data.resize=true` in a recipe, or --resize, scales and centre-crops."
                )
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)

    result = np.empty((count, channels, size, size), dtype=np.uint8)
    bar = tqdm(total=count, desc="decoding images", unit="img", disable=count <= 5000)
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, count, 1000):
            numbers = range(start, min(start + 1000, count))
            for number, image in zip(numbers, pool.map(pixels, images[start : numbers.stop], numbers)):
                result[number] = image
            bar.update(len(numbers))
    return torch.from_numpy(result)


def _channel_statistics(images):
    """Mean and standard deviation per channel of pixels in [0, 1]; a constant channel keeps a deviation of 1/255."""
    total = square = 0.0
    for part in images.split(4096):
        part = part.double() / 255
        total, square = total + part.sum((0, 2, 3)), square + part.square().sum((0, 2, 3))
    count = images[:, 0].numel()
    mean = total / count
    return mean.tolist(), (square / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255).tolist()


# --------------------------------------------------------------------------------------------------- order and batches


def whole_of(dataset):
    """What a Subset, also one of a Subset, is taken from; any other data set itself."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


class EpochSampler(Sampler):
    """A shuffle that depends on (seed, epoch) alone, so that a resumed run sees the order of an unbroken one.

    The epoch lives in the data set where that has `set_epoch`: accelerate reaches either the sampler or the data set,
    and which of the two depends on how often it has wrapped the sampler (processes, skipped batches).
    """

    def __init__(self, dataset, seed=0):
        self.dataset, self.seed, self._epoch = dataset, seed, 0
        self._keeper = whole_of(dataset)  # of the epoch, which augmentation reads

    def __len__(self):
        return len(self.dataset)

    @property
    def epoch(self):
        return getattr(self._keeper, "epoch", self._epoch) if hasattr(self._keeper, "set_epoch") else self._epoch

    def set_epoch(self, epoch):
        self._epoch = epoch
        if hasattr(self._keeper, "set_epoch"):
            self._keeper.set_epoch(epoch)

    def __iter__(self):
        return iter(np.random.default_rng((self.seed, self.epoch)).permutation(len(self)).tolist())


def rebound(collator, dataset, kind: type):
    """The collator, or a copy of it, that gathers from `dataset`: a `kind`, or a Subset of one, whose items are the
    indices of the whole. Raises ValueError for any other, whose items it would take for those of its own."""
    whole = whole_of(dataset)
    if whole is collator.dataset:
        return collator
    if not isinstance(whole, kind):
        raise ValueError(
            f"{type(collator).__name__} gathers from a {kind.__name__} or a Subset of one, not from a "
            f"{type(whole).__name__}: give another collator with it."
        )
    collator = copy.copy(collator)
    collator.dataset = whole
    return collator


class ImageCollator:
    """Turns indices into `pixel_values`, normalised float32 (B, C, H, W), and `labels` on the data set's device.

    Labels are ids (B,), or with an augmentation soft targets (B, K). An augmented sample, partner included, is a pure
    function of (seed, dataset.epoch, index): batch size, number of processes and resuming do not change it.
    """

    def __init__(self, dataset, *, mean, std, num_classes, augmentation=None, seed=0):
        self.dataset, self.num_classes, self.augmentation, self.seed = dataset, num_classes, augmentation, seed
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))

    def for_dataset(self, dataset):
        """The same for another ImageTensors, or a Subset of one. Raises ValueError for any other set."""
        return rebound(self, dataset, ImageTensors)

    def __call__(self, indices):
        images, labels, device = self.dataset.images, self.dataset.labels, self.dataset.images.device
        if self.mean.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        index, augmentation = torch.from_numpy(np.array(indices, dtype=np.int64)), self.augmentation
        if augmentation is None:
            here = send_all({"here": index.numpy()}, device)["here"]
            pixels, targets = images[here].float() / 255, labels[here]
        else:
            numbers = uniforms(self.seed, self.dataset.epoch, index, 1 + augmentation.draws)
            wanted = [index]
            if augmentation.mixes:
                wanted.append((numbers[:, 0].double() * len(images)).long())  # the partners
            wanted = send_all({"here": torch.stack(wanted).numpy()}, device)["here"].unbind(0)
            chosen = [part for here in wanted for part in (images[here], labels[here])]
            chosen += [None] * (4 - len(chosen))
            pixels, targets = augmentation(*chosen, numbers[:, 1:], self.num_classes)
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": targets}
