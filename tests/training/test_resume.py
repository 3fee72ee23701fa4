"""A run that is interrupted anywhere and resumed ends in the same weights, to the bit, as one that is not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_state, make_model, make_trainer, write_recipe
from transformers import TrainerCallback, TrainerState

from mamba_rsst.training import rounds, staged
from mamba_rsst.training.augmentation import AugmentationConfig, BatchAugmentation


fcntl = pytest.importorskip("fcntl")
AUGMENTATION = dict(crop_padding=1, flip=0.5, randaugment_ops=1, erasing=0.2, mixup=0.8, cutmix=0.5)


# ---- kill -9 ----
LINES = 42
"""Steps of each stage, one line on stdout each."""
KILLED_AT = 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Random at every step: crops, Mixup, drop path. Checkpoints fall on and between the ends of epochs."""
    training = dict(
        num_train_epochs=14, save_strategy="steps", save_steps=4, save_total_limit=2, eval_strategy="epoch"
    )
    training |= dict(distillation_weight=0.3, learning_rate=2e-3, weight_decay=0.05, lr_scheduler_type="cosine")
    sections = dict(training=training, augmentation=AUGMENTATION, model=dict(drop_path_rate=0.1))
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", **sections)


def command(recipe, folder, *more):
    return [sys.executable, "-u", "-m", "mamba_rsst", "train", str(recipe), f"training.output_dir={folder}", *more]


def train_until_killed(argv, stage, errors):
    """Start a run and kill it in the middle of a stage.

    The pipe holds no more than 4096 bytes, so the run waits for its lines to be read: it cannot get further than some
    25 steps beyond the line at which it is killed.
    """
    with open(errors, "w") as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True)
    fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    seen = 0
    for line in process.stdout:
        seen += f"'stage': '{stage}'" in line
        if seen == KILLED_AT:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL, errors.read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="sizing a pipe is Linux's")
def test_kill_9_in_every_stage_and_resume_gives_the_same_bits(recipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uninterrupted = subprocess.Popen(command(recipe, whole), **quiet)
    more = []
    for index, stage in enumerate(("train", "rsst-1", "recover-1")):
        train_until_killed(command(recipe, broken, *more), stage, tmp_path / "stderr")
        state = json.loads((broken / "rsst_state.json").read_text())
        folder = broken / "stages" / f"{index}-{stage}"
        assert state["done"] == index and not (folder / "model").exists()  # really in the middle of it
        checkpoint = rounds.last_complete_checkpoint(folder)
        assert 4 <= int(checkpoint.rpartition("-")[2]) < LINES
        more = ["--resume"]
    subprocess.run(command(recipe, broken, *more), check=True, **quiet)
    assert uninterrupted.wait(300) == 0
    assert_same_state(load_file(broken / "model.safetensors"), load_file(whole / "model.safetensors"))
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, broken)]
    for key in ("accuracy", "parameters", "macs"):
        assert [row[key] for row in results[0]["rows"]] == [row[key] for row in results[1]["rows"]]
    assert results[0]["widths"] == results[1]["widths"]
    logs = [
        [json.loads(line) for line in (f / "training_log.jsonl").read_text().splitlines()] for f in (whole, broken)
    ]
    losses = [[(e["stage"], e["step"], e["loss"]) for e in log if "loss" in e] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 3 * LINES


# ---- at chosen points, in this process ----
class Killed(BaseException):
    """As a SIGKILL: no `except Exception` holds it up."""


METHODS = {
    "rsst": dict(
        distillation_weight=0.3, distillation_hidden_weight=3.0, distillation_hidden_fade=True, weight_decay=0.05
    ),
    "refill": dict(method="refill", num_rounds=2, rewind="step", rewind_step=2),
    "average": dict(ema_decay=0.8, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True),
    "lasso": dict(penalty="group_lasso", schedule="linear", gradient_accumulation_steps=2),
    "unstructured": dict(method="unstructured", rewind="step", rewind_step=2, num_rounds=2),
    "spread": dict(method="prune", spread_epochs=2),
}
PRUNING = dict(targets=["d_inner", "intermediate_size"], sparsity=0.6, round_to=1, importance="taylor")


def trainer_of(folder, method="rsst", seed=0, **arguments):
    arguments = {"num_train_epochs": 2, "eval_strategy": "epoch", **METHODS[method], **arguments}
    augmentation = BatchAugmentation(AugmentationConfig(**AUGMENTATION))
    model = make_model(seed, drop_path_rate=0.1)
    arguments = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **arguments}
    pruning = {**PRUNING, "importance": "magnitude_l1"} if method == "unstructured" else PRUNING
    return make_trainer(folder, model=model, augmentation=augmentation, pruning=pruning, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{method: the trainer of an uninterrupted run}"""
    trainers = {}
    for method in METHODS:
        trainers[method] = trainer_of(tmp_path_factory.mktemp(method), method)
        trainers[method].train()
    return trainers


def resume(folder, expected, **arguments):
    """Go on, with other weights in memory than on disk, and compare all there is with the uninterrupted run."""
    trainer = trainer_of(folder, seed=99 if (folder / rounds.RunFolder.STATE).exists() else 0, **arguments)
    steps = Steps(trainer)
    torch.manual_seed(12345)
    trainer.train(resume_from_checkpoint=trainer.run_folder.exists())
    assert_same_state(trainer.model.state_dict(), expected.model.state_dict())
    for i, stage in enumerate(trainer.stages):
        files = [t.run_folder.stage(i, stage) / "model" / "model.safetensors" for t in (trainer, expected)]
        assert_same_state(load_file(files[0]), load_file(files[1]))
        assert not list(files[0].parent.parent.glob("checkpoint-*"))
    for state in (trainer.run_state, expected.run_state):
        for entry in (*state.history, *(m for metrics in state.metrics.values() for m in metrics.values())):
            for key in [key for key in entry if "runtime" in key or "second" in key or "time" in key]:
                del entry[key]
    losses = [[e for e in t.run_state.history if "loss" in e] for t in (trainer, expected)]
    assert losses[0] == losses[1]
    assert trainer.run_state.metrics == expected.run_state.metrics
    assert (trainer.run_state.steps, trainer.run_state.epochs) == (expected.run_state.steps, expected.run_state.epochs)
    return steps


class Steps(TrainerCallback, Counter):
    """Stage -> the optimizer steps taken in it."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self[self.trainer._stage.name] += 1


class KillAt:
    """Makes a function die at its n-th call, before or after it has done its work."""

    def __init__(self, monkeypatch, owner, name, n, after=False):
        self.monkeypatch, self.left, self.after, self.whole = monkeypatch, n, after, getattr(owner, name)
        monkeypatch.setattr(owner, name, self if not isinstance(owner, type) else lambda *a, **k: self(*a, **k))

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        out = self.whole(*args, **kwargs)
        if self.left == 0:
            raise Killed
        return out


def killed(trainer, monkeypatch):
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()


# 2 epochs of 3 steps a stage; rsst: 3 stages; refill: train, prune-1, recover-1, prune-2, recover-2
POINTS = {
    "the start is saved, the state is not": (rounds.RunFolder, "write", 1, False),
    "nothing is trained yet": (rounds.RunFolder, "write", 1, True),
    "the model of a stage is saved, the state does not say so": (rounds.RunFolder, "write", 2, False),
    "between two stages, checkpoints are left over": (staged, "remove_checkpoints", 1, False),
    "between two stages": (staged, "remove_checkpoints", 1, True),
    "channels are chosen, but not written down": (staged, "save_masks", 1, False),
    "channels are chosen and written down": (staged, "save_masks", 1, True),
    "before the cut": (staged, "shrink_", 1, False),
    "after the cut": (staged, "shrink_", 1, True),
    "before the cut model is saved": (staged, "replace_folder", 3, False),
    "between the last two stages": (staged, "remove_checkpoints", 2, True),
}


@pytest.mark.parametrize(
    "method, point",
    [("rsst", point) for point in POINTS]
    + [pytest.param("refill", point, marks=pytest.mark.slow) for point in list(POINTS)[2::2]],
)
def test_around_the_stages(tmp_path, monkeypatch, whole, method, point):
    owner, name, count, after = POINTS[point]
    trainer = trainer_of(tmp_path, method)
    KillAt(monkeypatch, owner, name, count, after)
    killed(trainer, monkeypatch)
    resume(tmp_path, whole[method], method=method)


@pytest.mark.parametrize("method, choice", [("refill", 2), ("spread", 1)])
def test_before_a_choice_that_comes_after_a_later_stage(tmp_path, monkeypatch, whole, method, choice):
    """The score looks at augmented batches: those of its own stage, not of the stage that this process ran before."""
    trainer = trainer_of(tmp_path, method)
    KillAt(monkeypatch, staged, "save_masks", choice)
    killed(trainer, monkeypatch)
    assert trainer.run_state.done >= 2
    resume(tmp_path, whole[method], method=method)


@pytest.mark.parametrize(
    "method, stage, step, save_steps",
    [
        ("rsst", 0, 2, 2),  # no checkpoint yet
        ("rsst", 0, 3, 2),  # the last checkpoint lies within an epoch
        ("rsst", 0, 4, 3),  # or at its end, written before the evaluation there
        ("rsst", 1, 2, 2),
        ("rsst", 1, 3, 2),
        ("rsst", 1, 4, 3),
        ("rsst", 1, 6, 2),
        ("rsst", 2, 4, 3),
        ("rsst", 2, 6, 2),
        ("refill", 0, 3, 2),
        ("refill", 2, 4, 3),
        ("refill", 4, 6, 2),
        ("average", 0, 3, 2),  # averages begin again
        ("average", 0, 4, 2),  # averages are read back
        ("average", 1, 4, 2),  # nothing is averaged while channels are decayed
        ("average", 2, 6, 2),
        ("lasso", 1, 2, 1),
        ("lasso", 1, 4, 2),
        ("unstructured", 2, 3, 2),
        ("unstructured", 4, 4, 3),
        ("spread", 1, 3, 2),
    ],
)
def test_within_a_stage(tmp_path, monkeypatch, whole, method, stage, step, save_steps):
    trainer = trainer_of(tmp_path, method, save_steps=save_steps)
    compute_loss = trainer.compute_loss

    def dies(model, inputs, *args, **kwargs):
        here = trainer._stage is trainer.stages[stage] and model.training
        if here and trainer.state.global_step + 1 == step:
            raise Killed
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = dies
    killed(trainer, monkeypatch)
    folder = trainer.run_folder.stage(stage, trainer.stages[stage])
    assert trainer.run_state.done == stage and not (folder / "model").exists()
    last = (step - 1) // save_steps * save_steps
    assert rounds.last_complete_checkpoint(folder) == (str(folder / f"checkpoint-{last}") if last else None)
    taken = resume(tmp_path, whole[method], method=method, save_steps=save_steps)
    assert taken[trainer.stages[stage].name] == (4 if method == "lasso" else 6) - last
    assert not any(taken[earlier.name] for earlier in trainer.stages[:stage])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_checkpoint_that_is_half_written_is_ignored(tmp_path, monkeypatch, whole, stage):
    trainer = trainer_of(tmp_path)
    KillAt(monkeypatch, TrainerState, "save_to_json", 3 * stage + 2)  # three checkpoints a stage; the second
    killed(trainer, monkeypatch)
    half = trainer.run_folder.stage(stage, trainer.stages[stage]) / "checkpoint-4"
    assert (half / "optimizer.pt").is_file() and not (half / "trainer_state.json").exists()
    (half / "optimizer.pt").write_bytes(b"half")
    resume(tmp_path, whole["rsst"])


def test_without_any_checkpoint_a_stage_begins_again(tmp_path, monkeypatch, whole):
    trainer = trainer_of(tmp_path, save_strategy="no")
    KillAt(monkeypatch, staged, "shrink_", 1)
    killed(trainer, monkeypatch)
    resume(tmp_path, whole["rsst"], save_strategy="no")


def test_a_model_that_is_half_written_is_not_taken_for_one(tmp_path, monkeypatch, whole):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(type(trainer.model), "save_pretrained", half_saved(trainer.model.save_pretrained, 3))
    killed(trainer, monkeypatch)
    assert (tmp_path / "stages" / "1-rsst-1" / "model.tmp" / "model.safetensors").stat().st_size == 100
    resume(tmp_path, whole["rsst"])
    assert not list(tmp_path.rglob("*.tmp"))


def half_saved(save_pretrained, count):
    """Dies at the count-th folder of a stage's model, the weights half written."""

    def save(self, path, **kwargs):
        nonlocal count
        save_pretrained.__func__(self, path, **kwargs)
        if str(path).endswith("model.tmp") or str(path).endswith("start.tmp"):
            count -= 1
            if count == 0:
                os.truncate(path / "model.safetensors", 100)
                raise Killed

    return save


def test_what_was_frozen_stays_frozen(tmp_path, monkeypatch):
    """A file holds no `requires_grad`: the model that is given does."""

    def frozen(folder):
        trainer = trainer_of(folder)
        trainer.model.backbone.embeddings.requires_grad_(False)
        return trainer

    finished, broken = frozen(tmp_path / "whole"), frozen(tmp_path / "broken")
    before = finished.model.backbone.embeddings.cls_token.clone()
    finished.train()
    KillAt(monkeypatch, staged, "shrink_", 1)
    killed(broken, monkeypatch)
    resumed = frozen(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(finished.model.backbone.embeddings.cls_token, before)
    assert_same_state(resumed.model.state_dict(), finished.model.state_dict())


def test_resuming_twice_or_a_finished_run_changes_nothing(tmp_path, whole):
    shutil.copytree(whole["rsst"].run_folder.path, tmp_path / "copy")
    assert not resume(tmp_path / "copy", whole["rsst"])
