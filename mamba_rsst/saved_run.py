"""SavedRun: what a run's folder tells, whether the run is finished or not. Reads, and writes nothing."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .report import COLUMNS, LOG_FILE, RECIPE_FILE, RESULTS_FILE, SWEEP_FILE, columns_of
from .training.rounds import RunFolder, surviving_blocks


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as its files have it; what they lack is empty."""

    path: Path
    label: str
    """How the run is called where several are shown."""
    results: dict
    """results.json. Of an unfinished run: task, method, model, dataset, seed from its recipe, and of the dense model a
    row with the quality alone, once it is trained."""
    finished: bool
    recipe: str = ""
    """The resolved recipe, YAML; of a run that was not started from a recipe its settings."""
    pruning: dict = field(default_factory=dict)
    """The section `pruning`."""
    state: dict = field(default_factory=dict)
    """rsst_state.json."""
    history: list[dict] = field(default_factory=list)
    """The log, that of the stage under way up to its last checkpoint."""
    under_way: dict = field(default_factory=dict)
    """Of the stage under way: its `stage`, and the `steps` and `epochs` of its last checkpoint, if there is one."""
    widths: dict = field(default_factory=dict)
    """As `figures.draw_widths` takes them. Of an unfinished run: those that its last choice leaves."""
    scores: dict = field(default_factory=dict)
    """Stage -> scores as `figures.draw_scores` takes them, normalised as they were compared."""

    @property
    def quality(self) -> tuple:
        """The first column of the run's table: title, key, the value as text, the change as text."""
        return columns_of(self.results)[0]

    @property
    def dense(self) -> dict:
        """The dense model's row, {} where there is none."""
        return next((row for row in self.results["rows"] if row["name"] == "dense"), {})

    @property
    def base(self) -> dict:
        """What the result is compared with: the dense model; the full size of one that was built small; else {}."""
        if self.final is self.dense:
            return self.results.get("full_size") or {}
        return self.dense

    @property
    def final(self) -> dict:
        """The row of the run's result, {} while there is none."""
        return self.results["rows"][-1] if self.finished else {}


def read_run(folder: str | Path, label: str | None = None) -> SavedRun:
    """The run in `folder`. Raises FileNotFoundError for what is no run's folder, ValueError for damaged files."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path)!r}.")
    files = [path / name for name in (RECIPE_FILE, RunFolder.STATE)]
    if not any(file.is_file() for file in files):
        if (path / SWEEP_FILE).is_file():
            raise FileNotFoundError(f"{str(path)!r} holds a sweep; give the folders of its runs, which lie inside it.")
        raise FileNotFoundError(f"{str(path)!r} holds no run: neither {RECIPE_FILE} nor {RunFolder.STATE} is there.")
    text, recipe = _read_recipe(files[0])
    state = _read_state(files[1])
    results, finished = read_results(path / RESULTS_FILE), (path / RESULTS_FILE).is_file()
    settings = state.get("settings", {})
    if not text:
        text = json.dumps(settings, indent=1)
    if not finished:
        results = _results_so_far(recipe, settings, state)
    pruning = recipe.get("pruning") or settings.get("pruning") or {}
    history, under_way = state.get("history", []), {}
    if (path / LOG_FILE).is_file():
        history = _read_log(path / LOG_FILE)
    elif state and not finished:
        more, under_way = _read_checkpoint(path, state)
        history = history + more
    masks = {stage: _tensors(file) for stage, file in _stage_files(path, RunFolder.MASKS)}
    return SavedRun(
        path=path,
        label=label or path.resolve().name,
        results=results,
        finished=finished,
        recipe=text,
        pruning=pruning,
        state=state,
        history=history,
        under_way=under_way,
        widths=results.get("widths") or {} if finished else _widths_so_far(state, masks),
        scores={
            stage: _scores(file, masks[stage], pruning.get("normalization", "mean"))
            for stage, file in _stage_files(path, "scores.safetensors")
            if stage in masks  # they are written first: a run may have been stopped between the two
        },
    )


# ---- the files, each checked for what is read from it ----
def _read_json(text: str, name) -> dict:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{str(name)!r} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(name)!r} is damaged: it holds no object but {type(content).__name__}.")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _read_recipe(path: Path) -> tuple[str, dict]:
    import yaml

    if not path.is_file():
        return "", {}
    text = _text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    sections = ("model", "data", "training", "pruning")
    if not isinstance(content, dict) or any(not isinstance(content.get(name) or {}, dict) for name in sections):
        raise ValueError(f"{str(path)!r} is damaged: it holds no recipe.")
    return text, content


def _read_state(path: Path) -> dict:
    if not path.is_file():
        return {}
    state = _read_json(_text(path), path)
    kinds = {"stages": list, "done": int, "history": list, "metrics": dict, "settings": dict, "dense_widths": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key, kind()), kind) or (key in ("stages", "done") and key not in state):
            raise ValueError(f"{str(path)!r} is damaged: `{key}` is {state.get(key)!r}.")
    _check_log(state.get("history", []), path)
    return state


def read_results(path: Path) -> dict:
    """results.json of a run, {} where there is none. Raises ValueError for a damaged one."""
    if not path.is_file():
        return {}
    results = _read_json(_text(path), path)
    if results.get("task", "image-classification") not in COLUMNS:
        raise ValueError(f"{str(path)!r} is damaged: its task is {results['task']!r}, not one of {list(COLUMNS)}.")
    for key in ("method", "model", "dataset"):
        if not isinstance(results.get(key, ""), str):
            raise ValueError(f"{str(path)!r} is damaged: `{key}` is {results[key]!r}.")
    rows = results.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError(f"{str(path)!r} is damaged: it holds no `rows` of measured models.")
    for row in rows:
        for key, value in row.items():
            if key != "name" and value is not None and not _is_number(value):
                raise ValueError(f"{str(path)!r} is damaged: `{key}` of {row['name']!r} is {value!r}.")
    for key in ("seconds", "weight_sparsity"):
        if not _is_number(results.get(key, 0)):
            raise ValueError(f"{str(path)!r} is damaged: `{key}` is {results[key]!r}.")
    removed = results.get("channel_sparsity") or {}
    if not isinstance(removed, dict) or not all(map(_is_number, removed.values())):
        raise ValueError(f"{str(path)!r} is damaged: `channel_sparsity` is {removed!r}.")
    return results


def _read_log(path: Path) -> list[dict]:
    lines = enumerate(_text(path).splitlines(), 1)
    log = [_read_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return _check_log(log, path)


def _check_log(log: list, path: Path) -> list[dict]:
    keys = ("epoch", "step", "loss", "eval_accuracy", "eval_perplexity", "lambda", "leaving_share")
    for entry in log:
        if not isinstance(entry, dict):
            raise ValueError(f"{str(path)!r} is damaged: an entry of its log is {entry!r}.")
        for key in keys:
            if entry.get(key) is not None and not _is_number(entry[key]):
                raise ValueError(f"{str(path)!r} is damaged: `{key}` in its log is {entry[key]!r}.")
    return log


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stage_files(path: Path, name: str) -> list[tuple[str, Path]]:
    """(stage, file) of the stages that have such a file, in the order of the run."""
    found = [file for file in path.glob(f"stages/*-*/{name}") if file.parent.name.partition("-")[0].isdigit()]
    found.sort(key=lambda file: int(file.parent.name.partition("-")[0]))
    return [(file.parent.name.partition("-")[2], file) for file in found]


def _tensors(path: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:  # a folder: it has no such device
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _scores(path: Path, masks: dict, normalization: str) -> dict:
    """{target: {"before": (kept, leaving), "after": ...}} over all layers, each divided by its mean or its maximum."""
    import numpy as np

    found = {}
    for key, values in _tensors(path).items():
        moment, _, group = key.partition(":")
        keep = masks.get(group)
        if moment not in ("before", "after") or keep is None or keep.shape != values.shape or values.ndim != 1:
            raise ValueError(f"{str(path)!r} is damaged: {key!r} does not go with the masks beside it.")
        if not np.isfinite(values).all():
            raise ValueError(f"{str(path)!r} is damaged: {key!r} is not finite.")
        values = values.astype(np.float64)
        scale = {"mean": values.mean(), "max": values.max(), "none": 1.0}.get(normalization, 1.0)
        values = values / scale if scale > 0 else values  # as the selection does
        parts = found.setdefault(_target(group), {}).setdefault(moment, ([], []))
        for part, chosen in zip(parts, (keep, ~keep)):
            part.append(values[chosen])
    return {
        target: {moment: tuple(np.concatenate(part) for part in parts) for moment, parts in both.items()}
        for target, both in sorted(found.items())
    }


def _target(group: str) -> str:
    return group.rpartition(":")[2]


# ---- runs that are not finished ----
def _results_so_far(recipe: dict, settings: dict, state: dict) -> dict:
    model, training = recipe.get("model") or {}, recipe.get("training") or settings
    known = {
        "task": recipe.get("task"),
        "method": training.get("method", "rsst"),
        "model": model.get("preset") or (Path(str(model["path"])).name if model.get("path") else None),
        "dataset": (recipe.get("data") or {}).get("path"),
        "seed": training.get("seed"),
        "allocation": (recipe.get("pruning") or settings.get("pruning") or {}).get("allocation"),
    }
    end = state.get("metrics", {}).get("train", {}).get("end", {})
    row = {key: end[f"eval_{key}"] for key in ("accuracy", "perplexity") if _is_number(end.get(f"eval_{key}"))}
    if known["task"] not in COLUMNS:
        known["task"] = "causal-lm" if "perplexity" in row else "image-classification"
    rows = [{"name": "dense", **row}] if row else []
    return {key: value for key, value in known.items() if value is not None} | {"rows": rows}


def _read_checkpoint(path: Path, state: dict) -> tuple[list[dict], dict]:
    """The log of the stage under way and how far it came, as its newest readable checkpoint says."""
    if state["done"] >= len(state["stages"]):
        return [], {}
    name = state["stages"][state["done"]]
    best = {}
    for file in path.glob(f"stages/{state['done']}-*/checkpoint-*/trainer_state.json"):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["global_step"] >= best.get("global_step", 0) and isinstance(found["log_history"], list):
                best = found
        except (OSError, ValueError, KeyError, TypeError):
            continue  # interrupted while it was written
    if not best:
        return [], {"stage": name}
    epochs, steps = state.get("epochs", 0.0), state.get("steps", 0)
    entries = [entry for entry in best["log_history"] if isinstance(entry, dict) and "train_runtime" not in entry]
    log = [
        {**e, "stage": name, "step": e.get("step", 0) + steps, "epoch": e.get("epoch", 0.0) + epochs} for e in entries
    ]
    return _check_log(log, path), {"stage": name, "steps": best["global_step"], "epochs": best.get("epoch")}


def _widths_so_far(state: dict, masks: dict) -> dict:
    """What the last choice leaves of each group, where it chose whole channels."""
    cuts = [part for part in masks.values() if all(mask.ndim == 1 for mask in part.values())]
    chosen, dense = cuts[-1] if cuts else {}, state.get("dense_widths", {})
    before, after = surviving_blocks(cuts[:-1]), surviving_blocks(cuts)
    widths = {}
    for target in dict.fromkeys(map(_target, dense)):
        groups = [group for group in dense if _target(group) == target]
        if after is None or len(groups) == 1:  # all blocks are there still, or the target is none of each block
            kept = {group: chosen[group] for group in groups if group in chosen}
        else:  # the choice is called by what number a block had then
            names = dict(zip(range(len(groups)) if before is None else before, groups))
            kept = {group: chosen[names[i]] if i in after else [] for i, group in enumerate(groups)}
        if kept:
            sizes = [int(sum(mask)) for mask in kept.values()]
            widths[target] = {"dense": [dense[group] for group in kept], "kept": sizes}
    return widths
