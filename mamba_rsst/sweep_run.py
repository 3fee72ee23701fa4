"""Making a sweep's runs: one process after the other run, several processes side by side."""

import contextlib
import gc
import json
import os
import time
import warnings
from pathlib import Path

import torch

from . import report, sweep_report
from .errors import one_line
from .recipe import Recipe, RecipeError
from .report import RECIPE_FILE, RESULTS_FILE, SWEEP_FILE
from .run import impossible, run_recipe
from .saved_run import read_results
from .sweep import Run, Sweep, beginning_of, folder_of, network_of, seed_of
from .tasks import TASKS


WAIT_SECONDS = 2.0


def run_sweep(sweep: Sweep, resume: bool = False, runs: list[Run] | None = None) -> dict:
    """Make the sweep's runs that no other process makes, and wait for the others. Returns the results of the sweep.

    runs: those of `sweep.runs` to make, in this order; default all.
    resume: go on with the sweep in its folder; several processes may work on one, each started so. results.json,
    results.md and the figure are written anew after every run. A run that raises ValueError, or whose data are
    not there, is noted with its reason and tried again when the sweep is resumed.
    Raises ValueError, before anything is written, for a folder that holds another sweep or anything else; that and
    OSError where the first run's data cannot be loaded, which is a mistake in the file more often than in the run.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "Each run of a sweep takes one process; for several GPUs start the sweep again with --resume for each."
        )
    todo = sweep.runs if runs is None else runs
    _check_settings(todo)
    _check_folder(sweep, resume)
    worker = _Worker(sweep, todo)
    if not resume:
        worker.load(todo[0].recipe)  # and keeps it
    _claim(sweep, resume)
    while todo:
        outcomes = [worker.attempt(run) for run in todo]
        todo = [run for run, outcome in zip(todo, outcomes) if outcome != "done"]
        if todo and "done" not in outcomes:
            worker.say_that_it_waits(len(todo))
            time.sleep(WAIT_SECONDS)
    return gather(sweep)


def _check_settings(runs: list[Run]) -> None:
    """What this machine cannot follow is an error before the first run."""
    for run in runs:
        with warnings.catch_warnings(action="ignore"):  # the run itself will warn
            try:
                run.recipe.training_arguments()
            except ValueError as error:
                raise RecipeError(f"The run {run.title!r}: {error}") from error


def _check_folder(sweep: Sweep, resume: bool) -> None:
    folder, saved = sweep.output_dir, sweep.output_dir / SWEEP_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` {str(folder)!r} is a file.")
    if resume:
        if not saved.is_file():
            raise ValueError(f"{str(folder)!r} holds no sweep to resume.")
        if saved.read_text(encoding="utf-8") != sweep.to_yaml():
            raise ValueError(f"{str(folder)!r} was started from another sweep; its own is {str(saved)!r}.")
        return
    if saved.is_file():
        raise ValueError(f"{str(folder)!r} already holds a sweep: go on with --resume, or choose another output_dir.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty; choose another output_dir.")
    report.check_writable(folder, f"output_dir={folder}")


def _claim(sweep: Sweep, resume: bool) -> None:
    """Put the sweep's file into its folder, which makes it this sweep's."""
    if resume:
        return
    folder, saved = sweep.output_dir, sweep.output_dir / SWEEP_FILE
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{SWEEP_FILE}.{os.getpid()}"
    beside.write_text(sweep.to_yaml(), encoding="utf-8")
    try:
        os.link(beside, saved)  # whole, and by one of several processes that start at once
    except FileExistsError:
        raise ValueError(f"{str(folder)!r} has just been taken by another process; join it with --resume.") from None
    finally:
        beside.unlink()


@contextlib.contextmanager
def _lock(path: Path, wait: bool = False):
    """Yields whether this process has the file's lock, or waits for it; the system ends it with the process."""
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _failure_file(folder: Path) -> Path:
    """Beside a run's folder: why it failed."""
    return folder.with_name(f".{folder.name}.failed")


def _finished(folder: Path) -> bool:
    return (folder / RESULTS_FILE).is_file()


def _of_the_run(error: Exception) -> bool:
    """Whether only this run is at fault: data that are not there, say. What the system reports, such as a full disk,
    comes with its number and stops the sweep."""
    return not isinstance(error, OSError) or error.errno is None


def _free_memory() -> None:
    gc.collect()  # a trainer's circles of references hold models
    torch._dynamo.reset()  # the next run's blocks have other widths
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Worker:
    """One process's work on a sweep. Keeps the data that were loaded last, and the first stages that failed here."""

    def __init__(self, sweep: Sweep, runs: list[Run]):
        self.sweep, self.runs = sweep, runs
        self._data = (None, None)
        self._waits = False
        self._failed: dict[Path, str] = {}
        self._impossible: dict[Path, dict[Path, ValueError]] = {}
        """Of each first stage that was looked at: which runs could not go on from it, and why."""

    def attempt(self, run: Run) -> str:
        """ "done", now or before, well or badly; "waits" for another process, which makes it or its first stage."""
        with _lock(_lock_file(run.folder)) as mine:
            if not mine:
                return "waits"  # and take it, should that process die
            if _finished(run.folder):
                return "done"
            try:
                if not self._make_first_stage(run):
                    return "waits"
                self._say(f"Run {self.sweep.runs.index(run) + 1} of {len(self.sweep.runs)}: {run.title}")
                self._make(run.recipe, run.first_stage and folder_of(run.first_stage))
                _failure_file(run.folder).unlink(missing_ok=True)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                if not _of_the_run(error):
                    raise
                _free_memory()
                self._note_failure(run, "Failed", error)
        gather(self.sweep)
        return "done"

    def _make_first_stage(self, run: Run) -> bool:
        """Whether it is there; False while another process trains it. Raises ValueError where it has failed, and for a
        run that could not be made afterwards."""
        recipe = run.first_stage
        if recipe is None or _finished(folder := folder_of(recipe)):
            return True
        if folder in self._failed:
            raise ValueError(self._failed[folder])
        with _lock(_lock_file(folder)) as mine:
            if not mine:
                return False
            if not _finished(folder):
                if folder not in self._impossible:
                    self._impossible[folder] = self._find_impossible(recipe)
                if run.folder in self._impossible[folder]:
                    raise self._impossible[folder][run.folder]
                self._say(f"First stage of several runs, seed {seed_of(recipe)}")
                try:
                    self._make(recipe)
                except (ValueError, OSError) as error:
                    if not _of_the_run(error):
                        raise
                    self._failed[folder] = f"its first stage: {error}"
                    raise ValueError(self._failed[folder]) from error
        return True

    def _find_impossible(self, first_stage: Recipe) -> dict[Path, ValueError]:
        """The runs that cannot be made, noted before what they share with others is trained, not hours later."""
        folder = folder_of(first_stage)
        runs = [r for r in self.runs if r.first_stage is not None and folder_of(r.first_stage) == folder]
        errors = impossible([r.recipe for r in runs], self.load(first_stage))
        found = [(run, error) for run, error in zip(runs, errors) if error is not None]
        for run, error in found:
            self._note_failure(run, f"Cannot be made: {run.title}", error)
        return {run.folder: error for run, error in found}

    def _note_failure(self, run: Run, what: str, error: Exception) -> None:
        reason = one_line(error, None)
        self._say(f"{what}: {reason}")
        report.write_atomic(_failure_file(run.folder), reason)

    def _make(self, recipe: Recipe, first_stage: Path | None = None) -> None:
        resume = (folder_of(recipe) / RECIPE_FILE).is_file()
        run_recipe(recipe, resume=resume, data=self.load(recipe), first_stage=first_stage)
        _free_memory()

    def load(self, recipe: Recipe):
        """The recipe's data, kept for the next run if it has the same."""
        task, content = TASKS[recipe.task], recipe.to_dict()
        wanted = [recipe.task, content["model"], content["data"], seed_of(recipe) if task.seeds_data else None]
        if self._data[0] != wanted:
            self._data = (None, None)  # never two of them in memory
            self._data = (wanted, task.load_data(recipe))
        return self._data[1]

    def say_that_it_waits(self, runs: int) -> None:
        if not self._waits:
            self._waits = True
            self._say(f"Waiting for {runs} run{'s' * (runs > 1)} that another process makes")

    def _say(self, text: str) -> None:
        report.plain_console().rule(text, align="left")


def gather(sweep: Sweep) -> dict:
    """Read what the runs have left so far; write results.json, results.md and figures/sweep.png. Returns the
    results, see `sweep_report.collect`."""
    folder = sweep.output_dir
    with _lock(folder / ".gather.lock", wait=True):
        runs = []
        for run in sweep.runs:
            entry = {**_about(run.recipe), "name": run.name, "point": run.point}
            if "results" not in entry and _failure_file(run.folder).is_file():
                entry["failed"] = _failure_file(run.folder).read_text(encoding="utf-8")
            runs.append(entry)
        firsts = [about for recipe in sweep.first_stages if "results" in (about := _about(recipe))]
        results = sweep_report.collect(runs, firsts)
        report.write_atomic(folder / "results.json", json.dumps(results, indent=1) + "\n")
        report.write_atomic(folder / "results.md", sweep_report.markdown(results))
        if any(run["status"] == "finished" for run in results["runs"]):
            sweep_report.plot(results, folder / "figures" / "sweep.png")
    return results


def _about(recipe: Recipe) -> dict:
    folder = folder_of(recipe)
    about = {"folder": folder.name, "seed": seed_of(recipe), "network": network_of(recipe)}
    about |= {"beginning": beginning_of(recipe), "method": recipe.training.get("method", "rsst")}
    if _finished(folder):
        about["results"] = results = read_results(file := folder / RESULTS_FILE)
        needed = ("parameters", "macs", TASKS[recipe.task].speed)
        if missing := [key for row in results["rows"] for key in needed if row.get(key) is None]:
            raise ValueError(
                f"{str(file)!r} is damaged: `{missing[0]}` is missing. Delete it to finish the run again."
            )
    return about
