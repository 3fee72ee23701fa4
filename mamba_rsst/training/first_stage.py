"""Sharing the first stage: runs that differ only in what follows it need to train it once."""

import dataclasses
import shutil
from pathlib import Path

import torch

from .arguments import RSSTConfig
from .rounds import RunFolder, RunState


LATER = frozenset(
    [
        *("method", "pruning", "num_rounds", "ramp", "round_rate", "rewind", "rewind_step", "calibration_batches"),
        *("spread_epochs", "spread_residual", "rsst_epochs", "rsst_learning_rate", "rsst_lr_scheduler_type"),
        *("recovery_epochs", "recovery_learning_rate", "distillation_weight", "distillation_temperature"),
        *("distillation_hidden_weight", "distillation_hidden_fade"),
        *("penalty", "penalty_scope", "schedule", "schedule_power", "lambda_max", "residual"),
        *("output_dir", "run_name", "hub_model_id", "logging_steps", "disable_tqdm", "per_device_eval_batch_size"),
    ]
)
"""Settings that matter only after the first stage, or not for what is learnt at all. All others decide its weights."""


def first_stage_settings(training: dict) -> dict:
    """Those of RSSTConfig's arguments that decide what the first stage ends in, defaults filled in."""
    known = {f.name: f.default for f in dataclasses.fields(RSSTConfig) if f.default is not dataclasses.MISSING}
    return {name: value for name, value in {**known, **training}.items() if name not in LATER}


def differing_settings(recipe: dict, other: dict) -> list[str]:
    """Where two recipes (as `Recipe.to_dict` gives them) differ in what the first stage depends on: `section.key`s."""
    names = [name for name in ("task",) if recipe.get(name) != other.get(name)]
    for section in ("model", "data", "augmentation", "training"):
        mine, theirs = (content.get(section) for content in (recipe, other))
        if section == "training":
            mine, theirs = first_stage_settings(mine), first_stage_settings(theirs)
        if mine is None or theirs is None:
            names += [section] * (mine is not theirs)
            continue
        both = sorted(mine.keys() | theirs.keys())
        names += [f"{section}.{key}" for key in both if mine.get(key) != theirs.get(key)]
    return names


def read_first_stage(path: str | Path, settings: dict, model) -> RunState:
    """The state of the run in `path`, for a run of these settings (RunState.settings) to take over as its first stage.

    model: what this run starts from. Raises ValueError unless that is a finished run of method "dense" with the same
    settings, of a model of the same shapes, and with the point that this run rewinds to. That the data and the initial
    weights are the same cannot be seen here.
    """
    folder = RunFolder(path)
    if not folder.exists():
        raise ValueError(f"`first_stage`: {str(path)!r} holds no run.")
    state = folder.saved_state()
    if state.settings.get("method") != "dense" or state.done < 1:
        raise ValueError(f"`first_stage`: {str(path)!r} must hold a finished run of method='dense'.")
    if found := state.difference(settings, but=LATER):
        raise ValueError(f"`first_stage`: {str(path)!r} was trained with {found}.")
    _check_shapes(model, path)
    point, kept = ([s.get(name) for name in ("rewind", "rewind_step")] for s in (settings, state.settings))
    if point[0] == "step" and (point != kept or not (_stage_folder(path) / RunFolder.POINT).is_dir()):
        raise ValueError(
            f"`first_stage`: {str(path)!r} did not keep step {point[1]} to rewind to; train it with rewind=step."
        )
    return state


def copy_first_stage(path: str | Path, target: Path, point: bool) -> None:
    """The stage's model, and with `point` the weights that it kept to rewind to; whole or not at all."""
    source = _stage_folder(path)
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    for name in (RunFolder.MODEL, RunFolder.POINT) if point else (RunFolder.MODEL,):
        shutil.copytree(source / name, beside / name)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def _stage_folder(path: str | Path) -> Path:
    folders = [folder for folder in Path(path).glob("stages/0-*") if (folder / RunFolder.MODEL).is_dir()]
    if len(folders) != 1:
        raise ValueError(
            f"`first_stage`: {str(path)!r} lacks the model of its first stage; delete it to train it again."
        )
    return folders[0]


def _check_shapes(model, path: str | Path) -> None:
    config = type(model.config).from_pretrained(_stage_folder(path) / RunFolder.MODEL)
    with torch.device("meta"):
        trained = dict(type(model)(config).named_parameters())
    own = dict(model.named_parameters())
    for name in (*own, *trained):
        shapes = [tuple(p[name].shape) if name in p else None for p in (own, trained)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`first_stage`: {str(path)!r} trained another model: {name!r} {shapes[1]}, not {shapes[0]}."
            )
