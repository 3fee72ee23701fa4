"""One recipe from beginning to end: data, model, stages, then the table, the figures and the model card."""

import json
import platform
import shutil
from pathlib import Path

import torch
import transformers
from transformers import ViTImageProcessorPil, set_seed

from . import evaluation, report, speed
from .hub import load_model
from .models import MambaForImageClassification, MambaRsstVisionConfig
from .pruning import find_groups
from .recipe import Recipe
from .training.augmentation import BatchAugmentation
from .training.data import ImageCollator, ImageData, ImageTensors, load_image_data
from .training.trainer import RSSTTrainer


RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"


def run_recipe(recipe: Recipe, resume: bool = False) -> dict:
    """Train and prune as the recipe says; everything ends up in its `training.output_dir`. Returns the results.

    Raises ValueError, before anything is written, if that folder holds another run or anything else.
    """
    args = recipe.training_arguments()
    folder = Path(args.output_dir)
    _check_folder(folder, recipe, resume)
    set_seed(args.seed)
    config = _model_config(recipe)
    data = load_image_data(recipe.data, image_size=config.image_size, num_channels=config.num_channels)
    model = _start_model(recipe, config, data)
    trainer = _trainer(recipe, args, model, data)
    trainer.accelerator.wait_for_everyone()  # every process has found the folder free before one writes to it
    if trainer.is_world_process_zero():
        _claim(folder, recipe, resume)
    trainer.train(resume_from_checkpoint=resume and trainer.run_folder.exists())
    results = None
    if trainer.is_world_process_zero():
        results = _finish(trainer, recipe, data, folder)
        report.print_results(results)
        print(f"\nSaved to {folder}: the model, its card (README.md), the figures and {RESULTS_FILE}.")
    trainer.accelerator.wait_for_everyone()
    return results


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    saved = folder / RECIPE_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`training.output_dir` {str(folder)!r} is a file.")
    if resume:
        if not saved.is_file():
            raise ValueError(f"{str(folder)!r} holds no run to resume.")
        if saved.read_text() != recipe.to_yaml():
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


def _model_config(recipe: Recipe) -> MambaRsstVisionConfig:
    if recipe.model.path is None:
        return MambaRsstVisionConfig.preset(recipe.model.preset, **recipe.model.overrides)
    config = load_model(recipe.model.path).config
    if not isinstance(config, MambaRsstVisionConfig):
        raise ValueError(f"{recipe.model.path!r} is a {config.model_type!r} model, not an image classifier.")
    return config


def _start_model(recipe: Recipe, config, data: ImageData) -> MambaForImageClassification:
    if recipe.model.path is not None:
        model = load_model(recipe.model.path)
        if model.config.num_labels != len(data.id2label):
            raise ValueError(
                f"{recipe.model.path!r} knows {model.config.num_labels} classes, the data has {len(data.id2label)}."
            )
        return model
    config.id2label = data.id2label
    config.label2id = {name: i for i, name in data.id2label.items()}
    return MambaForImageClassification(config)


def _trainer(recipe: Recipe, args, model, data: ImageData) -> RSSTTrainer:
    if args.label_smoothing_factor:
        raise ValueError(
            "`training.label_smoothing_factor` does not go with images; set augmentation.label_smoothing."
        )
    if args.dataloader_num_workers:
        raise ValueError("`training.dataloader_num_workers` must be 0: the images live in memory, on the device.")
    args.dataloader_pin_memory = False
    train = data.train.to(args.device)
    common = {"mean": data.mean, "std": data.std, "num_classes": len(data.id2label)}
    augmentation = BatchAugmentation(recipe.augmentation) if recipe.augmentation else None
    plain = ImageTensors(train.images, train.labels)
    calibration = None
    if recipe.pruning is not None:
        size, collate = args.train_batch_size * args.world_size, ImageCollator(plain, **common)
        starts = range(0, min(len(plain), size * args.calibration_batches), size)
        calibration = [collate(list(range(s, min(len(plain), s + size)))) for s in starts]
    try:
        return RSSTTrainer(
            model=model,
            args=args,
            pruning=recipe.pruning,
            train_dataset=train,
            eval_dataset=data.eval.to(args.device),
            data_collator=ImageCollator(train, augmentation=augmentation, seed=args.seed, **common),
            eval_data_collator=ImageCollator(data.eval, **common),
            calibration=calibration,
            processing_class=_image_processor(model.config, data),
            compute_metrics=_accuracy,
        )
    except (ImportError, RuntimeError) as error:  # training.report_to names a tracker that is not installed
        raise ValueError(f"training: {error}") from error


def _accuracy(prediction) -> dict:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _image_processor(config, data: ImageData):
    size = {"height": config.image_size, "width": config.image_size}
    return ViTImageProcessorPil(size=size, image_mean=data.mean, image_std=data.std)


def _finish(trainer: RSSTTrainer, recipe: Recipe, data: ImageData, folder: Path) -> dict:
    """Save the model, measure the stages' models side by side, draw, and write the card."""
    state, stages, place = trainer.run_state, trainer.stages, trainer.run_folder
    model = trainer.model
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe says the same, readably
    rows = {"dense": (place.model(1, stages), state.metrics["train"]["end"])}
    cuts = [i for i, stage in enumerate(stages) if stage.cut]
    if cuts:
        last = cuts[-1]
        recovers = last + 1 < len(stages)  # else the last stage's model, rewound or not, is the result
        metrics = state.metrics[stages[last].name]["after_cut" if recovers else "end"]
        rows["cut"] = (place.model(last + 1, stages), metrics)
        if recovers:
            rows["recovered"] = (place.model(len(stages), stages), state.metrics[stages[-1].name]["end"])
    models = {name: type(model).from_pretrained(path).to(model.device) for name, (path, _) in rows.items()}
    size = (model.config.num_channels, model.config.image_size, model.config.image_size)
    batch = speed.default_batch_size(model)
    inputs = {"pixel_values": torch.randn(batch, *size, device=model.device)}
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
    timings = speed.compare_throughput(models, inputs, autocast_dtype=dtype)
    table = [
        {
            "name": name,
            "accuracy": metrics.get("eval_accuracy"),
            "parameters": evaluation.count_parameters(models[name]),
            "macs": evaluation.count_macs_per_item(models[name], inputs),
            "images_per_s": timings[name].items_per_s,
            "images_per_s_low": timings[name].low,
            "images_per_s_high": timings[name].high,
            "peak_memory": speed.measure_peak_memory(models[name], inputs, autocast_dtype=dtype),
        }
        for name, (_, metrics) in rows.items()
    ]
    results = {
        "task": recipe.task,
        "method": trainer.args.method,
        "model": recipe.model.preset or Path(recipe.model.path).name,
        "dataset": recipe.data.path,
        "seed": trainer.args.seed,
        "rows": table,
        "batch_size": batch,
        "device": speed.device_name(model.device) + (f", {str(dtype).removeprefix('torch.')}" if dtype else ""),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "seconds": state.seconds,
        "before_cut": {s.name: state.metrics[s.name]["before_cut"] for s in stages if s.cut},
    }
    if cuts:
        dense, kept = (
            {g.name: g for g in find_groups(models[n], recipe.pruning.targets)} for n in ("dense", list(rows)[-1])
        )
        results["widths"] = {
            target: {
                "dense": [g.size for g in dense.values() if g.target == target],
                "kept": [g.size for g in kept.values() if g.target == target],
            }
            for target in recipe.pruning.targets
        }
        results["channel_sparsity"] = {t: 1 - sum(w["kept"]) / sum(w["dense"]) for t, w in results["widths"].items()}
        results["param_reduction"] = 1 - table[-1]["parameters"] / table[0]["parameters"]
        report.plot_widths(results["widths"], folder / "figures" / "widths.png")
    results["trained"] = any(key in entry for entry in state.history for key in ("loss", "eval_accuracy"))
    if results["trained"]:
        report.plot_training(state.history, folder / "figures" / "training.png")
    lines = "".join(json.dumps(entry) + "\n" for entry in state.history)
    report.write_atomic(folder / "training_log.jsonl", lines)
    card = report.model_card(results, recipe.to_yaml(), base_model=recipe.model.path)
    report.write_atomic(folder / "README.md", card)
    report.write_atomic(folder / RESULTS_FILE, json.dumps(results, indent=1))  # last: it says that the run is finished
    shutil.rmtree(folder / "start", ignore_errors=True)
    return results
