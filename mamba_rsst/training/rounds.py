"""The rounds of a run: which stages it has, and the folder that lets it go on after an interruption anywhere."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..pruning import Group, Masks
from .arguments import UNPRUNED, RSSTConfig


@dataclass(frozen=True)
class Stage:
    """One stretch of training. Order of events: select, train, cut, rewind.

    select: choose what leaves, from the weights at the start.  decay: penalise the leaving channels while training;
    spread: all channels instead.  cut: remove what leaves at the end (unstructured: zero it).  rewind: then set the
    survivors back.  masked: weights that are zero stay so.  round: 1-based; 0 = before pruning.
    """

    name: str
    epochs: float
    learning_rate: float
    round: int = 0
    select: bool = False
    decay: bool = False
    spread: bool = False
    cut: bool = False
    rewind: bool = False
    masked: bool = False


def plan_stages(args: RSSTConfig) -> list[Stage]:
    """The stages of a run, see RSSTConfig."""
    epochs = float(args.num_train_epochs)
    stages = [Stage("train", epochs, args.learning_rate)]
    if args.method in UNPRUNED:
        return stages

    def default(value, other):
        return float(other if value is None else value)

    recovery = default(args.recovery_epochs, epochs)
    recovery_rate = default(args.recovery_learning_rate, args.learning_rate)
    decay_rate = default(args.rsst_learning_rate, args.learning_rate)
    rewind, unstructured = args.rewinds_to != "none", args.method == "unstructured"
    for r in range(1, args.num_rounds + 1):
        if args.spread_epochs > 0:
            stages.append(Stage(f"spread-{r}", float(args.spread_epochs), decay_rate, r, decay=True, spread=True))
        if args.method == "rsst":
            length = default(args.rsst_epochs, epochs)
            if length == 0:
                raise ValueError("`rsst_epochs` must be set when `num_train_epochs` is 0.")
            stages.append(Stage(f"rsst-{r}", length, decay_rate, r, select=True, decay=True, cut=True, rewind=rewind))
        else:
            name = f"mask-{r}" if unstructured else f"prune-{r}"
            stages.append(Stage(name, 0.0, args.learning_rate, r, select=True, cut=True, rewind=rewind))
        if recovery > 0:
            stages.append(Stage(f"recover-{r}", recovery, recovery_rate, r, masked=unstructured))
    return stages


UNWRITTEN = frozenset(
    ["lr_scheduler_kwargs", "optim_args", "label_smoothing_factor", "data_seed", "train_sampling_strategy"]
    + ["dataloader_drop_last", "total_train_batch_size", "bf16", "fp16", "neftune_noise_alpha"]
    + ["load_best_model_at_end", "metric_for_best_model", "greater_is_better"]
)
"""Settings that decide the outcome, but are missing from the states of runs made before version 0.1.0 was finished."""


@dataclass
class RunState:
    """What a run has done so far, as JSON in its folder; all else follows from it and the stages' folders."""

    stages: list[str]
    settings: dict = field(default_factory=dict)
    """What decides the outcome; resuming with other settings is refused."""
    done: int = 0
    """Stages that are finished, their models saved."""
    history: list[dict] = field(default_factory=list)
    """The log entries of finished stages, with `stage` and cumulative `step` and `epoch`."""
    metrics: dict[str, dict] = field(default_factory=dict)
    """Stage -> {"before_cut": metrics, "after_cut": metrics, "end": metrics}, as `evaluate` gives them."""
    dense_widths: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    spent: dict[str, dict] = field(default_factory=dict)
    """Finished stage -> {"epochs", "steps", "seconds"}; of an interrupted stage the seconds since it was resumed."""

    def difference(self, settings: dict, but: Iterable[str] = ()) -> str | None:
        """The first of `settings` that the run was not made with, as "name=before, not now". A setting that came after
        the run has its default, which changes nothing; one that was there and not written down is not compared."""
        unknown = UNWRITTEN - self.settings.keys()
        for name in sorted((settings.keys() | self.settings.keys()).difference(but, unknown)):
            before, now = self.settings.get(name, vars(RSSTConfig).get(name)), settings.get(name)
            if before != now:
                return f"{name}={before!r}, not {now!r}"
        return None

    def take_over(self, other: "RunState", channel_sparsity: bool) -> None:
        """Begin where `other`, a run of one stage, ended. channel_sparsity: in the log, as of a run that prunes."""
        more = {"channel_sparsity": 0.0} if channel_sparsity else {}
        self.history = [{**entry, **more} if "loss" in entry else entry for entry in other.history]
        self.metrics, self.spent, self.done = dict(other.metrics), dict(other.spent), 1
        self.steps, self.epochs, self.seconds = other.steps, other.epochs, other.seconds


class RunFolder:
    """The layout of a run's folder.

    rsst_state.json; start/ the initial weights; stages/<i>-<name>/: masks.safetensors (what that stage chose),
    checkpoint-*/ and what of it goes to the hub, upload/, while it trains, model/ once it is finished, rewind/ the
    weights that a run rewinds to: those of a step, kept by the first stage, or of a cut, cut alike.
    """

    STATE, MASKS, MODEL, POINT = "rsst_state.json", "masks.safetensors", "model", "rewind"

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def exists(self) -> bool:
        return (self.path / self.STATE).is_file()

    def saved_state(self) -> RunState:
        """Raises ValueError for a file that is damaged."""
        file = self.path / self.STATE
        try:
            state = RunState(**json.loads(file.read_text(encoding="utf-8")))
            if not 0 <= state.done <= len(state.stages):
                raise ValueError(f"{state.done} of {len(state.stages)} stages are done")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is damaged: {error}.") from error
        return state

    def read(self, stages: list[Stage], settings: dict) -> RunState:
        """Raises ValueError if the folder's run has other stages or settings than this one."""
        state = self.saved_state()
        names = [s.name for s in stages]
        if state.stages != names:
            raise ValueError(f"{str(self.path)!r} holds a run with the stages {state.stages}, not {names}.")
        if found := state.difference(settings):
            raise ValueError(f"{str(self.path)!r} was started with {found}.")
        return state

    def write(self, state: RunState) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        beside = self.path / f".{self.STATE}.tmp"
        beside.write_text(json.dumps(asdict(state), indent=1))
        os.replace(beside, self.path / self.STATE)

    @property
    def start(self) -> Path:
        return self.path / "start"

    def stage(self, index: int, stage: Stage) -> Path:
        return self.path / "stages" / f"{index}-{stage.name}"

    @staticmethod
    def upload(stage: str | os.PathLike) -> Path:
        """What goes to the hub while the stage of that folder trains."""
        return Path(stage) / "upload"

    def masks(self, index: int, stage: Stage) -> Path:
        """What that stage chose."""
        return self.stage(index, stage) / self.MASKS

    def model(self, index: int, stages: list[Stage]) -> Path:
        """The model that stage `index` starts from."""
        return self.start if index == 0 else self.stage(index - 1, stages[index - 1]) / self.MODEL

    def cuts(self, stages: list[Stage]) -> list[Masks]:
        """What each of `stages` that cuts has chosen, in order."""
        return [load_masks(self.masks(i, stage)) for i, stage in enumerate(stages) if stage.cut]

    def kept_point(self, index: int, stages: list[Stage]) -> Path:
        """The weights to rewind to that stage `index` has kept."""
        return self.stage(index, stages[index]) / self.POINT

    def rewind_point(self, index: int, stages: list[Stage], from_step: bool = False) -> Path:
        """Where the survivors of stage `index` go back to: the newest cut copy of the point, before the first cut the
        initial weights. from_step: those of a step instead; raises ValueError where no stage has kept them."""
        for i in range(index - 1, -1, -1):
            if (path := self.kept_point(i, stages)).is_dir():
                return path
        if from_step:
            raise ValueError(f"{str(self.path)!r} has lost the weights of the step that the run rewinds to.")
        return self.start


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors, written beside and renamed: masks and scores of a stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, beside)
    os.replace(beside, path)


def replace_folder(model, path, processor=None) -> None:
    """Save a model, and its tokenizer or image processor, beside `path`, then put it in place: whole or absent."""
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    if processor is not None:
        processor.save_pretrained(beside)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


def save_masks(masks: Masks, path: Path) -> None:
    """Masks of channels, or of weights."""
    save_tensors(masks, path)


def load_masks(path: Path) -> Masks:
    return load_file(path)


def survivors(masks: Iterable[Masks], dim: str) -> list[int] | None:
    """The dense model's channels of a dimension that it has once ("num_hidden_layers", "hidden_size"), by their place
    in it, that cuts by these masks leave, one cut after the other. A cut numbers them anew. None where no mask is of
    that dimension."""
    alive = None
    for chosen in masks:
        for name, mask in chosen.items():
            if name.endswith(f":{dim}"):
                places = range(len(mask)) if alive is None else alive
                alive = [place for place, keep in zip(places, mask.tolist(), strict=True) if keep]
    return alive


def surviving_blocks(masks: Iterable[Masks]) -> list[int] | None:
    """The dense model's blocks that these cuts leave, see `survivors`."""
    return survivors(masks, "num_hidden_layers")


def dense_widths_of(groups: Iterable[Group], dense: dict[str, int], masks: Iterable[Masks]) -> dict[str, int]:
    """The dense model's widths of these groups, whose blocks are numbered as the cuts so far have left them."""
    blocks = surviving_blocks(masks)
    if blocks is None:
        return dense

    def then(group: Group) -> str:
        if group.layer is None:
            return group.name
        return re.sub(rf"\.{group.layer}(?=[.:])", f".{blocks[group.layer]}", group.name, count=1)

    return {group.name: dense[then(group)] for group in groups}


WHOLE = ("optimizer.pt",)
"""Files by which a checkpoint of whole weights is known; `sharding.checkpoint_files` has those of FSDP."""


def last_complete_checkpoint(folder: Path, processes: int = 1, files: tuple[str, ...] = WHOLE) -> str | None:
    """The newest checkpoint whose writing was finished: trainer_state.json, and every process's random numbers.

    files: what else it must hold. One written under FSDP cannot be read without it, and the other way round.
    """
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    checkpoints = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
            if not all((path / name).is_file() for name in (*states, *files)):
                continue
            checkpoints.append((int(path.name.rpartition("-")[2]), str(path)))
        except (OSError, ValueError):
            continue  # interrupted while it was written
    return max(checkpoints)[1] if checkpoints else None


def remove_checkpoints(folder: Path) -> None:
    for path in (*folder.glob("checkpoint-*"), RunFolder.upload(folder)):
        shutil.rmtree(path, ignore_errors=True)


NOT_UPLOADED = ["_*", "report.html", "stages/*", "start/*", RunFolder.STATE, "training_args.bin"]
"""What of a run's folder is no part of the model: patterns as `upload_folder` takes them."""
