import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import RECIPE, assert_same_state, digits, load_stage, write_recipe
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mamba_rsst import card, figures, report, speed
from mamba_rsst.evaluation import count_macs_per_item
from mamba_rsst.recipe import load_recipe
from mamba_rsst.run import run_recipe
from mamba_rsst.saved_run import read_run


@pytest.fixture(autouse=True)
def hasty(finished_run, monkeypatch):
    """Runs after the finished one take no time to measure theirs."""
    whole = speed.compare_throughput
    monkeypatch.setattr(speed, "compare_throughput", functools.partial(whole, rounds=2, run_seconds=0.001))


def evaluate(model, processor):
    """(accuracy, logits) on the test digits as pictures, through the processor saved with the model."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in digits().eval.images]
    with torch.no_grad():
        logits = model.eval()(**processor(pictures, return_tensors="pt")).logits
    return (logits.argmax(-1) == digits().eval.labels).float().mean().item(), logits


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def short_run(tmp_path, *, resume=False, model=None, **training):
    pruning = None if training.get("method") == "dense" else RECIPE["pruning"]
    path = write_recipe(tmp_path / "tiny.yaml", tmp_path / "run", training=training, pruning=pruning)
    if model is not None:
        content = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**content, "model": {"path": str(model)}}))
    return run_recipe(load_recipe(path), resume=resume), tmp_path / "run"


# ---- the numbers of a run, each measured once more ----
def test_the_rows_are_the_models_of_the_stages(finished_run):
    folder, _ = finished_run
    results = results_of(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    stages = {"dense": "train", "cut": "rsst-1", "recovered": "recover-1"}
    assert [row["name"] for row in results["rows"]] == list(stages)
    for row in results["rows"]:
        model = load_stage(folder, stages[row["name"]])
        (own,) = folder.glob(f"stages/*-{stages[row['name']]}/model")
        assert AutoImageProcessor.from_pretrained(own).to_dict() == processor.to_dict()  # each is a whole model
        assert row["accuracy"] == pytest.approx(evaluate(model, processor)[0])
        assert row["parameters"] == count(model)
        assert row["macs"] == count_macs_per_item(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})
        assert row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["peak_memory"] > 4 * row["parameters"]
    assert len({row["accuracy"] for row in results["rows"]}) == 3  # so that no row can pass for another
    assert results["rows"][0]["macs"] > results["rows"][1]["macs"] == results["rows"][2]["macs"]


def test_the_saved_folder_is_the_recovered_model(finished_run):
    folder, _ = finished_run
    results = results_of(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert_same_state(model.state_dict(), load_stage(folder, "recover-1").state_dict())
    assert results["rows"][-1]["accuracy"] == pytest.approx(
        evaluate(model, AutoImageProcessor.from_pretrained(folder))[0]
    )
    assert results["rows"][-1]["parameters"] == count(model)
    for target, dense in (("d_inner", 32), ("intermediate_size", 24)):
        assert results["widths"][target] == {"dense": [dense] * 2, "kept": model.config.widths(target)}
        removed = 1 - sum(model.config.widths(target)) / (2 * dense)
        assert results["channel_sparsity"][target] == pytest.approx(removed) and removed >= 0.5
    dense = load_stage(folder, "train")
    assert results["param_reduction"] == pytest.approx(1 - count(model) / count(dense))
    assert (results["task"], results["method"], results["dataset"]) == ("image-classification", "rsst", "digits")
    assert results["batch_size"] == 64 and results["seed"] == 0 and results["seconds"] > 0
    assert model.config.id2label == {i: str(i) for i in range(10)}


def test_the_processor_normalises_as_training_did(finished_run):
    processor = AutoImageProcessor.from_pretrained(finished_run[0])
    data = digits()
    assert processor.image_mean == pytest.approx(data.mean) and processor.image_std == pytest.approx(data.std)
    picture = Image.fromarray(data.eval.images[0].permute(1, 2, 0).numpy())
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    expected = (data.eval.images[0] / 255 - mean) / std
    torch.testing.assert_close(processor(picture, return_tensors="pt")["pixel_values"][0], expected)


def test_the_papers_of_the_run_agree_with_it(finished_run):
    folder, _ = finished_run
    results = results_of(folder)
    card = (folder / "README.md").read_text()
    for row in results["rows"]:
        assert f"{row['accuracy']:.2%}" in card
    assert f"{results['param_reduction']:.1%} fewer" in card
    assert (folder / "recipe.yaml").read_text().strip() in card
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.training["output_dir"] == str(folder) and recipe.pruning.sparsity == 0.5
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log if "loss" in entry] == ["train"] * 36 + ["rsst-1"] * 12 + [
        "recover-1"
    ] * 12
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 61))
    last = {e["stage"]: e["eval_accuracy"] for e in log if "eval_accuracy" in e}
    assert results["rows"][0]["accuracy"] == last["train"] and results["rows"][2]["accuracy"] == last["recover-1"]
    assert results["before_cut"]["rsst-1"]["eval_accuracy"] == last["rsst-1"]
    shares = [entry["leaving_share"] for entry in log if "leaving_share" in entry]
    assert shares[-1] < 0.01 < 0.3 < shares[0]


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["mamba_rsst"] = None  # importing it fails, as where it is not installed
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

folder, pixels, logits = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model.eval()(torch.load(pixels)).logits, logits)
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
print(len(classify(Image.new("RGB", (8, 8)))))
"""


def test_the_folder_loads_without_the_package(finished_run, tmp_path):
    folder, _ = finished_run
    pixels = torch.randn(5, 3, 8, 8)
    torch.save(pixels, tmp_path / "pixels.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, folder, tmp_path / "pixels.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "5\n"
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(folder).eval()(pixels).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


# ---- other kinds of runs ----
def test_dense_training(tmp_path):
    results, folder = short_run(tmp_path, method="dense")
    assert [row["name"] for row in results["rows"]] == ["dense"]
    assert "widths" not in results and not (folder / "figures" / "widths.png").exists()
    assert (folder / "figures" / "training.png").exists()
    assert AutoModelForImageClassification.from_pretrained(folder).config.d_inner == 32


@pytest.mark.parametrize("rewind", ["initial", "none"])
def test_the_accuracy_without_recovery_is_that_of_the_saved_model(tmp_path, rewind):
    """After a rewind that is not the accuracy right after the cut."""
    results, folder = short_run(tmp_path, method="refill", rewind=rewind, recovery_epochs=0, num_train_epochs=6)
    assert [row["name"] for row in results["rows"]] == ["dense", "cut"]
    model = AutoModelForImageClassification.from_pretrained(folder)
    accuracy, _ = evaluate(model, AutoImageProcessor.from_pretrained(folder))
    assert results["rows"][-1]["accuracy"] == pytest.approx(accuracy)
    assert_same_state(model.state_dict(), load_stage(folder, "prune-1").state_dict())


@pytest.mark.parametrize("more", [{}, {"prediction_loss_only": True, "eval_strategy": "epoch"}])
def test_a_run_that_logged_nothing_still_ends(tmp_path, more):
    """Its 9 steps are fewer than Trainer's default of 500 between two log entries; a lone `eval_loss` is not drawn."""
    results, folder = short_run(tmp_path, logging_steps=500, **more)
    log = (folder / "training_log.jsonl").read_text()
    assert results["trained"] is False and ("eval_loss" in log if more else log == "")
    assert not (folder / "figures" / "training.png").exists()
    assert "training.png" not in (folder / "README.md").read_text()
    assert (folder / "figures" / "widths.png").exists()


def test_a_run_may_start_from_a_checkpoint(tmp_path, finished_run):
    """Without a first stage it is pruned as it is: here once more, from the recovered model's widths."""
    source = AutoModelForImageClassification.from_pretrained(finished_run[0])
    arguments = dict(method="refill", num_train_epochs=0, rewind="none", recovery_epochs=1)
    results, folder = short_run(tmp_path, model=finished_run[0], **arguments)
    assert_same_state(load_stage(folder, "train").state_dict(), source.state_dict())
    assert results["rows"][0]["accuracy"] == results_of(finished_run[0])["rows"][-1]["accuracy"]
    assert results["rows"][0]["parameters"] == count(source)
    model = AutoModelForImageClassification.from_pretrained(folder)
    for target in ("d_inner", "intermediate_size"):
        assert sum(model.config.widths(target)) <= 0.5 * sum(source.config.widths(target))
    assert results["model"] == finished_run[0].name


def test_the_same_recipe_gives_the_same_weights(tmp_path, finished_run):
    (tmp_path / "again").mkdir()
    runs = [short_run(folder)[1] for folder in (tmp_path, tmp_path / "again")]
    models = [AutoModelForImageClassification.from_pretrained(folder) for folder in runs]
    assert_same_state(models[0].state_dict(), models[1].state_dict())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["plot_widths", "model_card", "write_atomic"])
def test_a_run_killed_while_it_is_written_up_can_be_resumed(tmp_path, monkeypatch, name):
    owner = {"model_card": card, "plot_widths": figures}.get(name, report)
    whole = getattr(owner, name)

    def dies(path, *args, **kwargs):
        if name != "write_atomic" or path.name == "results.json":
            raise Killed
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(Killed):
        short_run(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "results.json").exists()
    results, folder = short_run(tmp_path, resume=True)
    assert results == results_of(folder) and not (folder / "start").exists()
    assert {"README.md", "results.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="finished; there is nothing to resume"):
        short_run(tmp_path, resume=True)


def test_a_run_killed_before_its_first_stage_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_rsst.run.RSSTTrainer.train", lambda *a, **k: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        short_run(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    with pytest.raises(ValueError, match="already holds a run: go on with --resume"):
        short_run(tmp_path)
    results, _ = short_run(tmp_path, resume=True)
    assert len(results["rows"]) == 3


@pytest.mark.parametrize("rounds", [1, 2])
def test_removed_blocks_keep_nothing_in_the_widths(tmp_path, rounds):
    targets = ["num_hidden_layers", "d_inner"]
    path = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        model={"num_hidden_layers": 5},
        pruning=dict(targets=targets, sparsity=0.6, importance="random", round_to=1, seed=3),
        training=dict(method="prune", num_rounds=rounds, learning_rate=0.0),
    )
    widths = run_recipe(load_recipe(path))["widths"]
    kept = widths["d_inner"]["kept"]
    assert widths["num_hidden_layers"] == {"dense": [5], "kept": [2]} and len(kept) == 5
    places = [place for place, width in enumerate(kept) if width]
    dense, model = (
        load_stage(tmp_path / "run", "train"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "run"),
    )
    assert len(places) == 2 and places != [0, 1]  # numbered anew by the cut, but not here
    for place, layer in zip(places, model.backbone.layers):
        assert layer.mixer.d_inner == kept[place]
        rows = dense.backbone.layers[place].mixer.in_proj.weight
        assert (rows == layer.mixer.in_proj.weight[0]).all(1).any()
    (tmp_path / "run" / "results.json").unlink()
    assert read_run(tmp_path / "run").widths == widths  # of a run that was stopped before it was measured
