"""Runs for tests: the tiniest image classifier on 96 of scikit-learn's digits, by trainer or by recipe."""

import atexit
import contextlib
import functools
import gc
import io
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tiny import perturb_

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig, PruningConfig, RSSTConfig, RSSTTrainer
from mamba_rsst.training.data import ImageCollator, ImageDataConfig, load_image_data


D, E, F, N, R = 16, 32, 24, 2, 1
"""hidden_size, d_inner, intermediate_size, d_state, dt_rank before any cut."""
SHAPE = dict(hidden_size=D, num_hidden_layers=2, intermediate_size=F, d_state=N, image_size=8, patch_size=4)
STEPS = 3
"""Optimizer steps an epoch: 96 images in batches of 32."""
PRUNING = dict(targets=["d_inner", "intermediate_size"], sparsity=0.5, round_to=1)


COMMON = dict(learning_rate=1e-2, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0)
"""Training arguments of every tiny run, of images or of text."""


@functools.cache
def digits():
    config = ImageDataConfig(max_train_samples=96, max_eval_samples=60)
    return load_image_data(config, image_size=8, num_channels=3)


def make_model(seed=0, **overrides):
    """Perturbed, so that channels differ before training already."""
    torch.manual_seed(seed)
    labels = {"id2label": digits().id2label, "label2id": {name: i for i, name in digits().id2label.items()}}
    return perturb_(MambaForImageClassification(MambaRsstVisionConfig(**{**SHAPE, **labels, **overrides})), seed)


def make_trainer(folder, model=None, cls=RSSTTrainer, pruning=PRUNING, callbacks=(), augmentation=None, **arguments):
    """A trainer on the digits with one epoch a stage, without augmentation, drop path and weight decay."""
    data = digits()
    common = dict(mean=data.mean, std=data.std, num_classes=len(data.id2label))
    defaults = dict(
        num_train_epochs=1,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=60,
        report_to="none",
        **COMMON,
    )
    return cls(
        model=make_model() if model is None else model,
        args=RSSTConfig(output_dir=str(folder), **{**defaults, **arguments}),
        pruning=pruning and PruningConfig(**pruning),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=ImageCollator(data.train, augmentation=augmentation, **common),
        eval_data_collator=ImageCollator(data.eval, **common),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=list(callbacks),
    )


def load_stage(folder, name):
    """The model that a stage ended with, or "start"."""
    path = Path(folder) / "start" if name == "start" else next(Path(folder).glob(f"stages/*-{name}/model"))
    return MambaForImageClassification.from_pretrained(path)


def load_masks_of(folder, stage):
    """{(layer, "d_inner" or "intermediate_size"): mask} of a stage."""
    masks = load_file(next(Path(folder).glob(f"stages/*-{stage}/masks.safetensors")))
    return {(int(name.split(".")[2]), name.split(":")[1]): mask for name, mask in masks.items()}


# Which axis of which parameter holds the channels, written down once more and apart from the package's own table.
DIRECTION = {"conv1d.weight": 0, "conv1d.bias": 0, "x_proj.weight": 1}
SCORED = {"in_proj.weight": 0, "out_proj.weight": 1, **DIRECTION}
SCORED |= {name.replace(".", "_b.", 1): axis for name, axis in DIRECTION.items()}
CARRIED = dict.fromkeys(("A_log", "A_b_log", "D", "D_b"), 0)
CARRIED |= {f"dt_proj{b}.{part}": 0 for b in ("", "_b") for part in ("weight", "bias")}
MLP = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}


def channels(masks, carried=False):
    """(name of the parameter, axis, mask along that axis) of every slice that belongs to a masked channel."""
    for (layer, target), mask in masks.items():
        if target == "intermediate_size":
            table = {f"mlp.{name}": axis for name, axis in MLP.items()}
        else:
            table = {f"mixer.{name}": axis for name, axis in {**SCORED, **(CARRIED if carried else {})}.items()}
        for name, axis in table.items():
            twice = name == "mixer.in_proj.weight"  # x and z
            yield f"backbone.layers.{layer}.{name}", axis, torch.cat([mask, mask]) if twice else mask


def scale_leaving(state, masks, factor):
    """A state dict whose leaving channels are multiplied by `factor`."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, axis, keep in channels(masks):
        shape = [-1 if a == axis else 1 for a in range(state[name].dim())]
        state[name] *= torch.where(keep, 1.0, factor).view(shape)
    return state


def cut(state, masks):
    """A state dict without the leaving channels."""
    state = dict(state)
    for name, axis, keep in channels(masks, carried=True):
        state[name] = state[name].index_select(axis, keep.nonzero()[:, 0])
    return state


def assert_same_state(actual, expected, **tolerance):
    """Equal names and shapes; equal values, to the bit unless a tolerance is given."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        torch.testing.assert_close(
            actual[name], tensor, **(tolerance or dict(rtol=0, atol=0)), msg=lambda text, name=name: f"{name}: {text}"
        )


# accelerate collects garbage at every turn: without this each time through all that torch has imported
gc.freeze()
atexit.register(gc.unfreeze)


# ---- by recipe ----
RECIPE = {
    "task": "image-classification",
    "model": {"preset": "mamba_tiny", **SHAPE},
    "data": {"path": "digits", "max_train_samples": 96, "max_eval_samples": 60},
    "pruning": PRUNING,
    "training": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 60,
        **COMMON,
    },
}


def write_recipe(path, output_dir=None, recipe=RECIPE, **sections):
    """The tiny recipe as a file, its sections updated; a section of None is left out."""
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items()}
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    if output_dir is not None:
        content["training"]["output_dir"] = str(output_dir)
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def run_to_the_end(folder):
    """(output_dir, stdout) of the tiny recipe, trained long enough that accuracies mean something."""
    from mamba_rsst.cli import main

    training = dict(num_train_epochs=12, rsst_epochs=4, recovery_epochs=4, eval_strategy="epoch")
    recipe = write_recipe(folder / "tiny.yaml", folder / "run", training=training)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["train", str(recipe)]) == 0
    return folder / "run", out.getvalue()
