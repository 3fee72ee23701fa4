"""Two processes on the CPU give what one process gives with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import STEPS, assert_same_state, load_masks_of, make_trainer, write_recipe

from mamba_rsst.cli import main
from mamba_rsst.training.augmentation import AugmentationConfig, BatchAugmentation


# The mean over 32 images is taken as the mean of two means over 16: another order of summation, whose rounding errors
# Adam passes on in proportion to the weights' steps. 4e-6 was seen after 27 steps of 1e-2; unequal data give 1e-2.
CLOSE = dict(rtol=0, atol=5e-5)


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def test_accelerate_launch_gives_the_result_of_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = write_recipe(
        tmp_path / "tiny.yaml",
        training=dict(num_train_epochs=3, distillation_weight=0.3, weight_decay=0.05, save_strategy="epoch"),
        augmentation=dict(crop_padding=1, mixup=0.5, cutmix=0.5, randaugment_ops=1),
        pruning=dict(importance="taylor"),
    )
    launch = list(LAUNCH)
    launch += ["-m", "mamba_rsst", "train", str(recipe), f"training.output_dir={two}"]
    launch += ["training.per_device_train_batch_size=16"]
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert main(["train", str(recipe), f"training.output_dir={one}"]) == 0
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]

    # With batches of 16 a single process would have taken twice as many steps.
    log = [json.loads(line) for line in (two / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 3 * 3 * STEPS + 1))
    masks = [load_masks_of(folder, "rsst-1") for folder in (one, two)]
    assert masks[0].keys() == masks[1].keys() and all(torch.equal(masks[0][key], masks[1][key]) for key in masks[0])
    for name in ("stages/0-train/model", "stages/1-rsst-1/model", "stages/2-recover-1/model", "."):
        weights = [load_file(folder / name / "model.safetensors") for folder in (one, two)]
        assert_same_state(weights[1], weights[0], **CLOSE)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for key in ("accuracy", "parameters", "macs"):
        assert [row[key] for row in results[0]["rows"]] == [row[key] for row in results[1]["rows"]]
    assert output.count("Saved to") == 1  # one process speaks


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_language_model_in_two_processes(tmp_path, streaming):
    """Its loss is divided by the tokens of both, of which each has its own."""
    import tiny_text

    folder, one, two = tiny_text.write_parquet(tmp_path / "text"), tmp_path / "one", tmp_path / "two"
    training = dict(distillation_weight=0.3, weight_decay=0.05, learning_rate=2e-3, gradient_accumulation_steps=2)
    training |= dict(distillation_hidden_weight=3.0, distillation_hidden_fade=True)
    recipe = tiny_text.write_recipe(
        tmp_path / "tiny.yaml", folder, training=training, data=dict(streaming=streaming, shuffle_buffer=20)
    )
    launch = [*LAUNCH, "-m", "mamba_rsst", "train", str(recipe), f"training.output_dir={two}"]
    launch += ["training.per_device_train_batch_size=8"]
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert main(["train", str(recipe), f"training.output_dir={one}"]) == 0
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    logs = [[json.loads(line) for line in (f / "training_log.jsonl").read_text().splitlines()] for f in (one, two)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_same_state(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"), **CLOSE)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    perplexities = [[row["perplexity"] for row in r["rows"]] for r in results]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4)


class Killed(BaseException):
    pass


def train(folder, batch, kill=False, method="refill", **more):
    """All stages of a run; with `kill`, interrupted in the first stage and in the last, and resumed."""

    def trainer_of():
        arguments = dict(per_device_train_batch_size=batch, num_train_epochs=2, save_strategy="steps", save_steps=2)
        arguments |= more
        arguments |= dict(method=method) if method == "rsst" else dict(method=method, rewind="step", rewind_step=2)
        arguments |= dict(ema_decay=0.8, eval_strategy="epoch") if method == "unstructured" else {}
        augmentation = BatchAugmentation(AugmentationConfig(crop_padding=1, mixup=0.5, cutmix=0.0))
        return make_trainer(folder, augmentation=augmentation, num_rounds=2, **arguments)

    for stage in (0, -1) if kill else ():
        trainer = trainer_of()
        compute_loss = trainer.compute_loss

        def dies(model, inputs, *args, trainer=trainer, compute_loss=compute_loss, stage=stage, **kwargs):
            if trainer._stage is trainer.stages[stage] and model.training and trainer.state.global_step == 3:
                raise Killed
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = dies
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=trainer.run_folder.exists())
    trainer = trainer_of()
    trainer.train(resume_from_checkpoint=kill)
    rank = trainer.args.process_index
    torch.save(trainer.model.state_dict(), f"{folder}-{trainer.args.world_size}-{rank}.pt")


def train_in_two_processes(folder, kill, method):
    """`train` under a launcher of its own: processes forked from this one would hang once it has used its threads."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [__file__, str(folder), "16", kill, method]
    process = subprocess.run(LAUNCH + arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize(
    "method", ["rsst", *(pytest.param(name, marks=pytest.mark.slow) for name in ("refill", "unstructured"))]
)
def test_rounds_and_resuming_in_two_processes(tmp_path, method):
    """Every process ends with the same weights: one that trained on by itself after a cut would not."""
    train(tmp_path / "one", 32, method=method)
    train_in_two_processes(tmp_path / "two", "", method)
    train_in_two_processes(tmp_path / "killed", "kill", method)
    one = torch.load(tmp_path / "one-1-0.pt")
    both = [torch.load(tmp_path / f"two-2-{rank}.pt") for rank in (0, 1)]
    killed = [torch.load(tmp_path / f"killed-2-{rank}.pt") for rank in (0, 1)]
    assert_same_state(both[0], one, **CLOSE)
    for other in (both[1], *killed):
        assert_same_state(other, both[0])


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), kill=bool(sys.argv[3]), method=sys.argv[4])
