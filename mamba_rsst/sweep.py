"""Sweeps: one strict YAML file is many runs, made in order, resumable, gathered into one table and one figure.

This module reads the file; sweep_run makes the runs, sweep_report the table and the figure.
"""

import copy
import fnmatch
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from .recipe import Recipe, RecipeError, build_recipe, check_keys, parse_override, read_yaml, set_key
from .report import SWEEP_FILE, plain_console
from .training.arguments import RSSTConfig
from .training.first_stage import LATER, first_stage_settings
from .training.rounds import plan_stages


FIRST_STAGES = "first-stages"
TAKEN = (FIRST_STAGES, "figures", "gather", "results.json", "results.md", SWEEP_FILE)
"""What stands in a sweep's folder beside its runs, the lock of `sweep_run.gather` too."""
LONGEST = 200
"""Bytes in the name of a run's folder: file systems allow 255, and its lock and temporary files have longer names."""
KEYS = ("recipe", "output_dir", "set", "runs", "grid")


@dataclass(frozen=True)
class Run:
    """One run of a sweep: a named variant at one point of the grid."""

    name: str
    point: dict
    """`section.key` -> the value that the grid gave."""
    recipe: Recipe
    first_stage: Recipe | None = None
    """The dense run that trains the first stage for this run and others; None: it trains its own."""

    @property
    def folder(self) -> Path:
        return folder_of(self.recipe)

    @property
    def seed(self) -> int:
        return seed_of(self.recipe)

    @property
    def title(self) -> str:
        return _title(self.name, self.point)


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: its runs in order, and the file that says the same."""

    output_dir: Path
    runs: list[Run]
    content: dict

    def to_yaml(self) -> str:
        """The resolved sweep with its recipe inside: loads to an equal Sweep."""
        return yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True, width=100)

    @property
    def first_stages(self) -> list[Recipe]:
        """The dense runs that several runs begin with, in order."""
        return first_stages_of(self.runs)


def first_stages_of(runs: list[Run]) -> list[Recipe]:
    return list({folder_of(run.first_stage): run.first_stage for run in runs if run.first_stage}.values())


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe.training["output_dir"])


def seed_of(recipe: Recipe) -> int:
    return recipe.training.get("seed", 42)


def short(key: str) -> str:
    """training.seed -> seed."""
    return key.rpartition(".")[2]


def spell(value) -> str:
    """A value of the grid in a title or a folder's name."""
    if isinstance(value, dict):
        return "+".join(f"{k}={v}" for k, v in value.items())
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _title(name: str, point: dict) -> str:
    return ", ".join([name, *(f"{short(key)} {spell(value)}" for key, value in point.items())])


def network_of(recipe: Recipe) -> str:
    """The same for runs that are compared with the same dense network: its shape and its data."""
    return _digest({name: recipe.to_dict().get(name) for name in ("task", "model", "data", "augmentation")})


def beginning_of(recipe: Recipe) -> str:
    """The same for runs whose first stages differ in nothing but the seed, as far as `training` goes."""
    return _digest({k: v for k, v in first_stage_settings(recipe.training).items() if k != "seed"})


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def stages_of(recipe: Recipe) -> list:
    """The stages of a recipe's run."""
    return plan_stages(RSSTConfig.check(**recipe.training))


def epochs_of(recipe: Recipe) -> float:
    return sum(stage.epochs for stage in stages_of(recipe))


# ---- the file ----
def load_sweep(path: str | Path, overrides: list[str] = ()) -> Sweep:
    """Read a sweep, apply `section.key=value` overrides to all of its runs and build every recipe.

    `output_dir=FOLDER` changes the sweep's own folder, `runs.NAME.section.key=value` one run.
    Raises RecipeError, which names the run, or FileNotFoundError.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{str(path)!r} must hold the keys {list(KEYS)}, got {type(content).__name__}.")
    check_keys(content, KEYS, "")
    base, stem = content.get("recipe"), path.stem
    if isinstance(base, str):
        base, stem = read_yaml(path.parent / base), Path(base).stem
    if not isinstance(base, dict):
        raise RecipeError("A sweep needs a `recipe` to start from: a path relative to its file, or the sections.")
    output_dir, common = content.get("output_dir", f"runs/{path.stem}"), _changes(content.get("set"), "set")
    variants = content.get("runs")
    if "runs" in content and (not isinstance(variants, dict) or not variants):
        raise RecipeError(f"`runs` must hold the runs' names and, below each, its changes; got {variants!r}.")
    if variants is None and "grid" not in content:
        raise RecipeError("A sweep needs `runs`, changes with a name, or a `grid` of lists, or both.")
    variants = {str(name): _changes(own, f"runs: {name}") for name, own in (variants or {stem: None}).items()}
    for override in overrides:
        output_dir = _override(override, output_dir, common, variants)
    if not isinstance(output_dir, str) or not output_dir.strip():
        raise RecipeError(f"`output_dir` must name a folder, got {output_dir!r}.")
    output_dir = os.path.expanduser(output_dir)  # as transformers does with every run's own
    grid = _grid(content["grid"]) if "grid" in content else None
    _check_followed(overrides, variants, grid)
    runs = {}
    for point in _points(grid):  # all names at one point first: they are to be compared
        for name, own in variants.items():
            rest = {k: v for k, v in point.items() if k not in own}
            key = json.dumps([name, rest], sort_keys=True, default=str)
            if key not in runs:
                runs[key] = _build(base, {**common, **rest, **own}, name, rest, output_dir)
    runs = list(runs.values())
    _check_folders(runs)
    resolved = {"recipe": base, "output_dir": output_dir, "set": common, "runs": variants, "grid": grid}
    resolved = {k: v for k, v in resolved.items() if v is not None}
    resolved = json.loads(json.dumps(resolved, default=str))  # as its file will hold it
    return Sweep(Path(output_dir), _share_first_stages(runs, output_dir), resolved)


def _override(text: str, output_dir: str, common: dict, variants: dict[str, dict]) -> str:
    """Put a change of the command line in its place. Returns the sweep's folder, which may be what it changes."""
    key, equals, value = text.partition("=")
    if key == "output_dir" and equals:
        return value
    if not key.startswith("runs."):
        common |= _changes(dict([parse_override(text)]), "set")
        return output_dir
    name = max((name for name in variants if key.startswith(f"runs.{name}.")), key=len, default=None)
    if name is None:
        raise RecipeError(f"{text!r} changes none of the runs {list(variants)}: runs.NAME.section.key=value.")
    change = parse_override(text.removeprefix(f"runs.{name}."))
    variants[name] |= _changes(dict([change]), f"runs: {name}")
    return output_dir


def _check_followed(overrides: list[str], variants: dict[str, dict], grid: list[dict] | None) -> None:
    """What a run or the grid sets itself wins; a change of the command line that none of the runs sees is an error."""
    for key in (text.partition("=")[0] for text in overrides):
        own = all(key in changes for changes in variants.values())
        if own or (grid and all(key in part for part in grid)):
            where = "every run sets it itself: runs.NAME." + key if own else "the `grid` sets it: change the file"
            raise RecipeError(f"The change to `{key}` reaches no run, since {where}.")


def _changes(content, where: str) -> dict:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"`{where}` must hold `section.key: value`, got {content!r}.")
    for key in content:
        if not isinstance(key, str):
            raise RecipeError(f"`{where}`: a key must be `section.key`, got {key!r}.")
        if key == "training.output_dir":
            raise RecipeError(f"`{where}`: every run's folder lies in the sweep's own: set `output_dir`, not `{key}`.")
        try:
            set_key({}, key, None)
        except RecipeError as error:
            raise RecipeError(f"`{where}`: {error}") from error
    return dict(content)


def _grid(content) -> list[dict[str, list]]:
    """Parts {key: values}, whose products are joined."""
    parts = content if isinstance(content, list) else [content]
    if not parts:
        raise RecipeError("`grid` is an empty list.")
    grid = []
    for part in parts:
        if not isinstance(part, dict) or not part:
            raise RecipeError(f"`grid` must hold `section.key: [values]`, or be a list of such parts; got {part!r}.")
        grid.append({k: v if isinstance(v, list) else [v] for k, v in _changes(part, "grid").items()})
        for key, values in grid[-1].items():
            if not values:
                raise RecipeError(f"`grid`: the list of `{key}` is empty.")
    return grid


def _points(grid: list[dict[str, list]] | None) -> list[dict]:
    return [dict(zip(part, values)) for part in grid or [{}] for values in itertools.product(*part.values())]


def _build(base: dict, changes: dict, name: str, point: dict, output_dir: str) -> Run:
    content = copy.deepcopy(base)
    words = [name.replace("+", " "), *(f"{short(key)}-{spell(value)}" for key, value in point.items())]
    folder = "_".join(re.sub(r"[^a-z0-9.+=]+", "-", word.lower()).strip("-.") for word in words)
    if not re.search("[a-z0-9]", folder):
        raise RecipeError(f"The run {name!r} needs a name with one of a-z or 0-9, for its folder.")
    try:
        for key, value in changes.items():
            set_key(content, key, copy.deepcopy(value))
        if isinstance(content.get("training"), dict):
            content["training"]["output_dir"] = str(Path(output_dir) / folder)
        run = Run(name, point, build_recipe(content))
        stages_of(run.recipe)
    except ValueError as error:
        raise RecipeError(f"The run {_title(name, point)!r}: {error}") from error
    return run


def _check_folders(runs: list[Run]) -> None:
    taken = Counter(run.folder.name for run in runs)
    for run in runs:
        if taken[run.folder.name] > 1:
            twins = " and ".join(repr(other.title) for other in runs if other.folder == run.folder)
            raise RecipeError(f"The runs {twins} would share the folder {str(run.folder)!r}: give them other names.")
        if run.folder.name in TAKEN:
            raise RecipeError(
                f"The run {run.title!r} cannot have the folder {str(run.folder)!r}: give it another name."
            )
        if len(run.folder.name) > LONGEST:
            raise RecipeError(
                f"The run {run.title[:60] + '…'!r} needs a shorter name: its folder's would have "
                f"{len(run.folder.name)} letters, at most {LONGEST} will do."
            )


# ---- shared first stages ----
def _share_first_stages(runs: list[Run], output_dir: str) -> list[Run]:
    """Give all runs that begin with the same training one dense run for it, where they are two or more."""
    alike: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if run.recipe.training.get("method") != "scratch" and stages_of(run.recipe)[0].epochs > 0:
            content = {**run.recipe.to_dict(), "pruning": None, "training": first_stage_settings(run.recipe.training)}
            alike.setdefault(json.dumps(content, sort_keys=True, default=str), []).append(i)
    shared = list(runs)
    for same, indices in alike.items():
        wanted = {i: _rewind_step(runs[i].recipe) for i in indices}
        points = sorted({step for step in wanted.values() if step is not None}) or [None]
        for point in points:  # a run keeps one point to rewind to; those that need none go with the first
            group = [i for i in indices if wanted[i] == point or (wanted[i] is None and point == points[0])]
            if len(group) > 1:
                digest = hashlib.sha256(f"{same} {point}".encode()).hexdigest()[:8]
                dense = _dense(runs[group[0]].recipe, point, Path(output_dir) / FIRST_STAGES / digest)
                for i in group:
                    shared[i] = replace(runs[i], first_stage=dense)
    return shared


def _rewind_step(recipe: Recipe) -> int | None:
    training = recipe.training
    return training["rewind_step"] if training.get("rewind") == "step" else None  # a dense run keeps it for others


def _dense(recipe: Recipe, point: int | None, folder: Path) -> Recipe:
    """The run of method dense that ends where the recipe's first stage does, and keeps the weights of step `point`."""
    training = {k: v for k, v in recipe.training.items() if k not in LATER}
    training |= {"method": "dense", "output_dir": str(folder)}
    training |= {} if point is None else {"rewind": "step", "rewind_step": point}
    return replace(recipe, pruning=None, training=training)


# ---- which runs, and what they would do ----
def choose_runs(sweep: Sweep, patterns: list[str] = ()) -> list[Run]:
    """The runs whose name or title a pattern of the shell matches, in the patterns' order; all where there is none.

    Raises RecipeError for a pattern that matches no run.
    """
    chosen = {}
    for pattern in patterns:
        found = [run for run in sweep.runs if _matches(run, pattern)]
        if not found:
            names = list(dict.fromkeys(run.name for run in sweep.runs))
            raise RecipeError(
                f"{pattern!r} matches no run: give a name of {names}, a title such as {sweep.runs[-1].title!r}, "
                "or a pattern with * and ?."
            )
        chosen |= {run.folder: run for run in found}
    return list(chosen.values()) if patterns else sweep.runs


def _matches(run: Run, pattern: str) -> bool:
    return any(text == pattern or fnmatch.fnmatchcase(text, pattern) for text in (run.name, run.title))


def print_plan(sweep: Sweep, runs: list[Run] | None = None) -> None:
    """What a sweep would do: its runs in order, or some of them, their folders, their epochs."""
    from rich import box
    from rich.table import Table

    runs = sweep.runs if runs is None else runs
    some = f"{len(runs)} of {len(sweep.runs)}" if len(runs) < len(sweep.runs) else len(runs)
    table = Table(title=f"{some} runs in {sweep.output_dir}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Run")
    table.add_column("Folder", overflow="fold")
    table.add_column("Epochs", justify="right")
    table.add_column("First stage")
    total, shared = 0.0, first_stages_of(runs)
    for index, recipe in enumerate(shared, 1):
        table.add_row(
            f"first stage {index}", f"{FIRST_STAGES}/{folder_of(recipe).name}", f"{epochs_of(recipe):g}", "for others"
        )
        total += epochs_of(recipe)
    for run in runs:
        epochs, first = epochs_of(run.recipe), "its own"
        if run.first_stage is not None:
            epochs -= epochs_of(run.first_stage)
            first = f"first stage {shared.index(run.first_stage) + 1}"
        table.add_row(run.title, run.folder.name, f"{epochs:g}", first)
        total += epochs
    apart = sum(epochs_of(run.recipe) for run in runs)
    table.caption = f"{total:g} epochs of training in all; without shared first stages it would be {apart:g}."
    plain_console().print(table)
