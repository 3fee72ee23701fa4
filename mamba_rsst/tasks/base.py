"""The interface between a run and its task."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The forwards that a run's models are measured with."""

    speed_inputs: dict[str, Any]
    """Timed, and looked at for the peak memory."""
    items_each: int
    """What one entry of that batch counts as in the speed: an image, or so many tokens."""
    macs_inputs: dict[str, Any]
    """One entry, whose multiply-accumulates are counted."""
    macs_items: int
    """Images or tokens that those are divided by."""
    notes: dict[str, Any]
    """What the results say about these inputs: batch_size, and the task's own."""


class Task(ABC):
    """Recipes of one `task`. A run asks for its methods in the order in which they stand here."""

    name: str
    model_class: type
    config_class: type
    """Has `preset(name, **overrides)`; its fields are what a recipe's `model` may override."""
    presets: dict[str, dict]
    data_config: type
    """The dataclass of the recipe's section `data`."""
    augments = False
    """Whether a recipe may have a section `augmentation`."""
    seeds_data = False
    """Whether what `load_data` gives depends on training.seed."""
    metrics: tuple[str, ...]
    """What a row of the results says about quality: keys of compute_metrics, those that the evaluation gave."""
    speed: str
    """What a row calls its speed, such as "images_per_s"."""

    @abstractmethod
    def load_data(self, recipe):
        """The data of a recipe, in memory or as streams. Raises ValueError or FileNotFoundError."""

    @abstractmethod
    def start_model(self, recipe, data):
        """The model that the run starts from, fp32. Raises ValueError where it does not fit the data."""

    @abstractmethod
    def prepare(self, recipe, args, model, data) -> dict[str, Any]:
        """RSSTTrainer's arguments for the data: data sets, collators, metrics, `calibration`, and what is saved beside
        the model. Raises ValueError for settings that do not go with the task."""

    @abstractmethod
    def workload(self, model, recipe) -> Workload:
        """The forwards to measure `model` with, where it is."""


def calibration_batches(args, data, collate) -> list[dict[str, torch.Tensor]]:
    """The first batches of the training data, in their own order: what scores look at.

    data.first(count): items.  collate: items -> a batch.
    """
    size = args.train_batch_size * args.world_size
    items = data.first(size * args.calibration_batches)
    return [collate(items[start : start + size]) for start in range(0, len(items), size)]
