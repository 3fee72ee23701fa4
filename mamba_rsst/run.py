"""One recipe from beginning to end: data, model, stages, then the table, the figures and the model card."""

import dataclasses
import json
import platform
import shutil
import warnings
from pathlib import Path

import torch
import transformers
from transformers import set_seed

from . import card, evaluation, figures, report, speed
from .pruning import find_groups, prune_, weight_sparsity
from .recipe import Recipe, load_recipe
from .report import LOG_FILE, RECIPE_FILE, RESULTS_FILE
from .tasks import TASKS
from .training.first_stage import differing_settings
from .training.prunable import check_run
from .training.rounds import surviving_blocks
from .training.trainer import RSSTTrainer


FULL_SIZE = "full_size"
"""Results of method "scratch": what the model would cost at its full size, measured beside it."""


def run_recipe(recipe: Recipe, resume: bool = False, data=None, first_stage=None) -> dict:
    """Train and prune as the recipe says; everything ends up in its `training.output_dir`. Returns the results.

    data: what `TASKS[recipe.task].load_data` gave for a recipe with the same `data`, to load it once for several runs.
    first_stage: folder of a finished run of method "dense" whose training a new run takes over as its first stage; it
    must agree in everything that this stage depends on. The run ends in the same weights as without it.
    Raises ValueError, before anything is written, if that folder holds another run or anything else.
    """
    task = TASKS[recipe.task]
    args = recipe.training_arguments()
    folder = Path(args.output_dir)
    _check_folder(folder, recipe, resume)
    if first_stage is not None:
        _check_first_stage(recipe, Path(first_stage))
    set_seed(args.seed)
    data = task.load_data(recipe) if data is None else data
    set_seed(args.seed)  # the same start whether the data were loaded here or given
    trainer = _trainer(recipe, args, _start_model(task, recipe, data, args.seed), data)
    trainer.accelerator.wait_for_everyone()  # every process has found the folder free before one writes to it
    if trainer.is_world_process_zero():
        _claim(folder, recipe, resume)
    trainer.train(resume_from_checkpoint=resume and trainer.run_folder.exists(), first_stage=first_stage)
    results = None
    if trainer.is_world_process_zero():
        results = _finish(trainer, recipe, folder, data)
        report.print_results(results)
        print(f"\nSaved to {folder}: the model, its card (README.md), the figures and {RESULTS_FILE}.")
    trainer.accelerator.wait_for_everyone()
    return results


def impossible(recipes: list[Recipe], data) -> list[ValueError | None]:
    """Of each of the recipes, all of which start from the same model: why `run_recipe` on these data could not come to
    its end, a budget out of reach or a stage too short; else None. For who would train something for them first."""
    first, reasons = recipes[0], []
    seed = first.training_arguments().seed
    set_seed(seed)
    model = _start_model(TASKS[first.task], first, data, seed)
    for recipe in recipes:
        try:
            with warnings.catch_warnings(action="ignore"):  # the run itself will warn
                check_run(model, recipe.training_arguments(), recipe.pruning, data.train)
            reasons.append(None)
        except ValueError as error:
            reasons.append(error.with_traceback(None))  # whose frames would keep the model
    return reasons


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    saved = folder / RECIPE_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`training.output_dir` {str(folder)!r} is a file.")
    if resume:
        if not saved.is_file():
            raise ValueError(f"{str(folder)!r} holds no run to resume.")
        if saved.read_text(encoding="utf-8") != recipe.to_yaml():
            raise ValueError(f"{str(folder)!r} was started from another recipe; its own is {str(saved)!r}.")
        if (folder / RESULTS_FILE).is_file():
            raise ValueError(f"The run in {str(folder)!r} is finished; there is nothing to resume.")
        return
    if saved.is_file():
        raise ValueError(
            f"{str(folder)!r} already holds a run: go on with --resume, or choose another training.output_dir."
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty; choose another training.output_dir.")
    report.check_writable(folder, f"training.output_dir={folder}")


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Put the recipe into the folder, which makes it this run's; of two runs that start at once, one gets it."""
    if resume:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / RECIPE_FILE, "x", encoding="utf-8") as file:
            file.write(recipe.to_yaml())
    except FileExistsError:
        raise ValueError(f"{str(folder)!r} has just been taken by another run.") from None


def _check_first_stage(recipe: Recipe, source: Path) -> None:
    other = load_recipe(source / RECIPE_FILE)
    if names := differing_settings(recipe.to_dict(), other.to_dict()):
        raise ValueError(f"{str(source)!r} cannot give this run its first stage: they differ in {', '.join(names)}.")


def _start_model(task, recipe: Recipe, data, seed: int):
    """The model that the run starts from. Of method "scratch": as small as every layer losing the same fraction makes
    it, with new weights."""
    model = task.start_model(recipe, data)
    if recipe.training.get("method") != "scratch":
        return model
    even = {"scope": "layer", "importance": "random", "allocation": "scores", "dt_rank_method": "select"}
    prune_(model, dataclasses.replace(recipe.pruning, **even))
    set_seed(seed)
    return type(model)(model.config)


def _trainer(recipe: Recipe, args, model, data) -> RSSTTrainer:
    if args.dataloader_num_workers:
        raise ValueError("`training.dataloader_num_workers` must be 0: the data live in memory, on the device.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            "`training.train_sampling_strategy` must be 'random' or 'sequential', since all samples of a recipe have "
            f"one length; got {args.train_sampling_strategy!r}."
        )
    args.dataloader_pin_memory = False
    arguments = TASKS[recipe.task].prepare(recipe, args, model, data)
    pruning = None if args.method == "scratch" else recipe.pruning  # its model is small from the beginning
    try:
        return RSSTTrainer(model=model, args=args, pruning=pruning, **arguments)
    except (ImportError, RuntimeError) as error:  # training.report_to names a tracker that is not installed
        raise ValueError(f"training: {error}") from error


def _measured_on(device: torch.device, dtype: torch.dtype | None) -> str:
    """What the table's speeds were measured on, and how: of a GPU launch by launch, which `mamba-rsst bench
    --graph` does without."""
    how = [str(dtype).removeprefix("torch.")] * (dtype is not None) + ["eager"] * (device.type == "cuda")
    return ", ".join([speed.device_name(device), *how])


def _finish(trainer: RSSTTrainer, recipe: Recipe, folder: Path, data) -> dict:
    """Save the model, measure the stages' models side by side, draw, and write the card."""
    task, model = TASKS[recipe.task], trainer.model
    state, stages, place = trainer.run_state, trainer.stages, trainer.run_folder
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe says the same, readably
    rows = {"dense": (place.model(1, stages), state.metrics["train"]["end"])}
    cuts = [i for i, stage in enumerate(stages) if stage.cut]
    channels = trainer.args.method != "unstructured"
    if cuts:
        last = cuts[-1]
        recovers = last + 1 < len(stages)  # else the last stage's model, rewound or not, is the result
        metrics = state.metrics[stages[last].name]["after_cut" if recovers else "end"]
        rows["cut" if channels else "masked"] = (place.model(last + 1, stages), metrics)
        if recovers:
            rows["recovered"] = (place.model(len(stages), stages), state.metrics[stages[-1].name]["end"])
    models = {name: type(model).from_pretrained(path).to(model.device) for name, (path, _) in rows.items()}
    if trainer.args.method == "scratch":  # for its size and speed alone, which are to be compared with
        models[FULL_SIZE] = task.start_model(recipe, data).to(model.device)
    work = task.workload(model, recipe)
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
    timings = speed.compare_throughput(models, work.speed_inputs, items_each=work.items_each, autocast_dtype=dtype)
    costs = {
        name: {
            "parameters": evaluation.count_parameters(models[name]),
            "macs": evaluation.count_macs(models[name], work.macs_inputs) // work.macs_items,
            task.speed: timings[name].items_per_s,
            f"{task.speed}_low": timings[name].low,
            f"{task.speed}_high": timings[name].high,
            "peak_memory": speed.measure_peak_memory(models[name], work.speed_inputs, autocast_dtype=dtype),
        }
        for name in models
    }
    table = [
        {
            "name": name,
            **{key: metrics[f"eval_{key}"] for key in task.metrics if f"eval_{key}" in metrics},
            **costs[name],
        }
        for name, (_, metrics) in rows.items()
    ]
    results = {
        "task": recipe.task,
        "method": trainer.args.method,
        "model": recipe.model.preset or Path(recipe.model.path).name,
        "dataset": recipe.data.path,
        "seed": trainer.args.seed,
        **({"allocation": recipe.pruning.allocation} if recipe.pruning else {}),
        "rows": table,
        **({FULL_SIZE: costs[FULL_SIZE]} if FULL_SIZE in costs else {}),
        **work.notes,
        "device": _measured_on(model.device, dtype),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "seconds": state.seconds,
        "before_cut": {s.name: state.metrics[s.name]["before_cut"] for s in stages if s.cut},
    }
    if cuts and not channels:
        results["weight_sparsity"] = weight_sparsity(models[list(rows)[-1]], recipe.pruning.targets)
    elif cuts:
        dense, kept = (
            {g.name: g for g in find_groups(models[n], recipe.pruning.targets)} for n in ("dense", list(rows)[-1])
        )
        blocks = surviving_blocks(place.cuts(stages))
        results["widths"] = {t: _widths(t, dense.values(), kept.values(), blocks) for t in recipe.pruning.targets}
        results["channel_sparsity"] = {t: 1 - sum(w["kept"]) / sum(w["dense"]) for t, w in results["widths"].items()}
        results["param_reduction"] = 1 - table[-1]["parameters"] / table[0]["parameters"]
        figures.plot_widths(results["widths"], folder / "figures" / "widths.png")
    results["trained"] = figures.has_curves(state.history)
    if results["trained"]:
        figures.plot_training(state.history, folder / "figures" / "training.png")
    lines = "".join(json.dumps(entry) + "\n" for entry in state.history)
    report.write_atomic(folder / LOG_FILE, lines)
    text = card.model_card(results, recipe.to_yaml(), base_model=recipe.model.path)
    report.write_atomic(folder / "README.md", text)
    report.write_atomic(folder / RESULTS_FILE, json.dumps(results, indent=1))  # last: it says that the run is finished
    shutil.rmtree(folder / "start", ignore_errors=True)
    return results


def _widths(target: str, dense, kept, blocks: list[int] | None) -> dict[str, list[int]]:
    """As `figures.draw_widths` takes them. A block that was removed keeps 0; `blocks`: those that were not."""
    sizes = [[group.size for group in groups if group.target == target] for groups in (dense, kept)]
    if blocks is not None and len(sizes[0]) > len(sizes[1]) == len(blocks):
        left = dict(zip(blocks, sizes[1]))
        sizes[1] = [left.get(place, 0) for place in range(len(sizes[0]))]
    return {"dense": sizes[0], "kept": sizes[1]}
