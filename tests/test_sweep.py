import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_runs import PRUNING, E, F, assert_same_state, load_stage, write_recipe
from transformers import AutoModelForImageClassification

from mamba_rsst import speed, sweep_report, sweep_run
from mamba_rsst.cli import main
from mamba_rsst.recipe import RecipeError, build_recipe, load_recipe
from mamba_rsst.run import run_recipe
from mamba_rsst.sweep import beginning_of, choose_runs, epochs_of, load_sweep
from mamba_rsst.tasks.image_classification import ImageClassification
from mamba_rsst.training.arguments import RSSTConfig
from mamba_rsst.training.first_stage import LATER
from mamba_rsst.training.trainer import RSSTTrainer


SWEEPS = sorted((Path(__file__).parents[1] / "recipes" / "sweeps").glob("*.yaml"))
RUNS = {
    "RSST": {"training.rsst_epochs": 1},
    "Refill": {"training.method": "refill"},
    "small": {"training.method": "scratch", "training.num_train_epochs": 2},
}


@pytest.fixture
def hasty(monkeypatch):
    whole = speed.compare_throughput
    monkeypatch.setattr(speed, "compare_throughput", functools.partial(whole, rounds=2, run_seconds=0.001))


def write_sweep(folder, **content):
    """A sweep of the tiny recipe, beside it; a part of None is left out."""
    write_recipe(folder / "tiny.yaml")
    content = {"recipe": "tiny.yaml", "output_dir": str(folder / "out"), "runs": RUNS, **content}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def titles(sweep):
    return [run.title for run in sweep.runs]


# ---- the file ----
@pytest.mark.parametrize(
    "content, words",
    [
        (dict(rns={}), ["`rns`", "'runs'"]),
        (dict(recipe="tinny.yaml"), ["tinny.yaml"]),
        (dict(recipe=None), ["`recipe`"]),
        (dict(recipe=3), ["`recipe`"]),
        (dict(output_dir=""), ["`output_dir`"]),
        (dict(runs=None), ["`runs`", "`grid`"]),
        (dict(runs={}), ["`runs`"]),
        (dict(runs=["RSST"]), ["`runs`", "RSST"]),
        (dict(runs={"a": {"training.metod": "refill"}}), ["'a'", "`training.metod`", "'method'"]),
        (dict(runs={"a": {"prunning.sparsity": 0.5}}), ["`runs: a`", "`prunning`", "'pruning'"]),
        (dict(runs={"a": {"training": {"method": "refill"}}}), ["`runs: a`", "'training'", "`section.key`"]),
        (dict(runs={"a": {"pruning.sparsity": 1.5}}), ["'a'", "`sparsity`", "1.5"]),
        (dict(runs={"a": 0.5}), ["`runs: a`", "0.5"]),
        (dict(runs={"a": {3: 4}}), ["`runs: a`", "3"]),
        (dict(runs={"Refill": {}, "refill": {}}), ["'Refill' and 'refill'", "folder"]),
        (dict(runs={"figures": {}}), ["'figures'"]),
        *((dict(runs={name: {}}), [repr(name)]) for name in ("gather", "results.json", "Results.md", "sweep.yaml")),
        (dict(runs={"..": {}}), ["'..'"]),
        (dict(runs={"日本": {}}), ["'日本'", "a-z or 0-9"]),
        (dict(runs={"x" * 300: {}}), ["xxx…'", "300 letters", "at most 200"]),
        (dict(set={"training.output_dir": "x"}), ["`set`", "`output_dir`"]),
        (dict(set=["training.seed=1"]), ["`set`"]),
        (dict(set={"training.num_train_epochs": 0}, runs={"a": {}}), ["'a'", "`rsst_epochs`"]),
        (dict(grid=[]), ["`grid`", "empty"]),
        (dict(grid={}), ["`grid`"]),
        (dict(grid={"training.seed": []}), ["`grid`", "`training.seed`", "empty"]),
        (dict(grid={"training.sed": [1]}), ["'RSST, sed 1'", "`training.sed`", "'seed'"]),
        (dict(grid={"training.seed": ["one"]}), ["'RSST, seed one'", "`training.seed`", "an integer"]),
    ],
)
def test_a_wrong_sweep_is_one_sentence_that_names_the_place(tmp_path, content, words, capsys):
    path = write_sweep(tmp_path, **content)
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    path = write_sweep(tmp_path)
    path.write_text(path.read_text() + "set: {training.seed: 1}\nset: {training.seed: 2}\n")
    with pytest.raises(RecipeError, match="`set` stands twice"):
        load_sweep(path)


def test_runs_come_in_order_and_each_once(tmp_path):
    grid = [{"pruning.sparsity": [0.3, 0.5], "training.seed": 0}, {"pruning.sparsity": 0.5, "training.seed": [0, 1]}]
    runs = {"A": {}, "B": {"pruning.sparsity": 0.25}}
    sweep = load_sweep(write_sweep(tmp_path, runs=runs, grid=grid, set={"pruning.round_to": 2}))
    assert titles(sweep) == [
        *("A, sparsity 0.3, seed 0", "B, seed 0"),  # B's own sparsity wins over the grid's
        *("A, sparsity 0.5, seed 0", "A, sparsity 0.5, seed 1", "B, seed 1"),
    ]
    assert [run.recipe.pruning.sparsity for run in sweep.runs] == [0.3, 0.25, 0.5, 0.5, 0.25]
    assert {run.recipe.pruning.round_to for run in sweep.runs} == {2}
    assert sweep.runs[3].folder == tmp_path / "out" / "a_sparsity-0.5_seed-1"


def test_the_command_line_changes_what_all_runs_have(tmp_path):
    path = write_sweep(tmp_path, set={"training.num_train_epochs": 3})
    sweep = load_sweep(path, ["training.num_train_epochs=5", "training.seed=7", f"output_dir={tmp_path / 'other'}"])
    assert [run.recipe.training["num_train_epochs"] for run in sweep.runs] == [5, 5, 2]  # a run's own wins
    assert {run.seed for run in sweep.runs} == {7} and sweep.output_dir == tmp_path / "other"
    sweep = load_sweep(path, ["runs.small.training.num_train_epochs=4", "training.num_train_epochs=5"])
    assert [run.recipe.training["num_train_epochs"] for run in sweep.runs] == [5, 5, 4]
    for override, words in (
        ("seed=7", "section.key=value"),
        ("output_dir= ", "`output_dir` must name a folder"),
        ("output_dir=", "`output_dir` must name a folder"),
        ("runs.big.training.seed=7", "changes none of the runs"),
        ("runs.small.training.sed=7", "'small'.*`training.sed`.*'seed'"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_sweep(path, [override])


def test_a_change_that_reaches_no_run_is_an_error(tmp_path):
    own = {"A": {"training.seed": 1}, "B": {"training.seed": 2}}
    with pytest.raises(RecipeError, match="`training.seed` reaches no run, since every run sets it itself: runs.NAME"):
        load_sweep(write_sweep(tmp_path, runs=own), ["training.seed=7"])
    with pytest.raises(RecipeError, match="`training.seed` reaches no run, since the `grid` sets it"):
        load_sweep(write_sweep(tmp_path, grid={"training.seed": [0, 1]}), ["training.seed=7"])
    parts = [{"training.seed": [0, 1]}, {"pruning.sparsity": [0.3]}]  # the second part has the seed of the change
    sweep = load_sweep(write_sweep(tmp_path, runs=None, grid=parts), ["training.seed=7"])
    assert [run.seed for run in sweep.runs] == [0, 1, 7]


def test_the_home_folder_is_the_same_for_the_sweep_and_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for sweep in (
        load_sweep(write_sweep(tmp_path, output_dir="~/mine")),
        load_sweep(write_sweep(tmp_path), ["output_dir=~/mine"]),
    ):
        assert sweep.output_dir == tmp_path / "mine" == sweep.runs[0].folder.parent


def test_the_resolved_file_is_the_same_sweep(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, grid={"training.seed": [0, 1]}), ["pruning.floor=0.2"])
    (tmp_path / "resolved.yaml").write_text(sweep.to_yaml())
    (tmp_path / "tiny.yaml").unlink()
    assert load_sweep(tmp_path / "resolved.yaml") == sweep


def test_a_grid_alone_varies_the_recipe(tmp_path):
    sweep = load_sweep(
        write_sweep(tmp_path, runs=None, grid={"pruning.targets": [["d_inner"], ["intermediate_size"]]})
    )
    assert titles(sweep) == ["tiny, targets d_inner", "tiny, targets intermediate_size"]


def test_runs_that_begin_alike_share_their_first_stage(tmp_path):
    runs = {
        **{"RSST": {}, "lasso": {"training.penalty": "group_lasso", "training.rsst_epochs": 5}, "dense": {}},
        **{"Refill": {"training.method": "refill", "pruning.sparsity": 0.3}},
        **{"to 2": {"training.method": "refill", "training.rewind": "step", "training.rewind_step": 2}},
        **{"to 1": {"training.method": "refill", "training.rewind": "step", "training.rewind_step": 1}},
        **{"longer": {"training.num_train_epochs": 2}, "faster": {"training.learning_rate": 0.1}},
        **{"small": {"training.method": "scratch"}, "as it is": {"training.num_train_epochs": 0}},
    }
    runs["dense"] = {"training.method": "dense"}
    runs["as it is"]["training.rsst_epochs"] = 1
    sweep = load_sweep(write_sweep(tmp_path, runs=runs, grid={"training.seed": [0, 1]}))
    shared = {}
    for run in sweep.runs:
        if run.first_stage is not None:
            shared.setdefault(run.first_stage.training["output_dir"], []).append((run.name, run.seed))
    names = ("RSST", "lasso", "dense", "Refill", "to 1")  # "to 2" is alone with its point
    assert list(shared.values()) == [[(name, seed) for name in names] for seed in (0, 1)]
    first = sweep.first_stages[0]
    began = {run.name: beginning_of(run.recipe) for run in sweep.runs}
    assert {beginning_of(recipe) for recipe in sweep.first_stages} == {began["RSST"]}  # of any seed
    assert {name for name in began if began[name] == began["RSST"]} == {*names, "to 2", "small"}
    assert first.training["method"] == "dense" and first.pruning is None and epochs_of(first) == 1
    assert (first.training["rewind"], first.training["rewind_step"]) == ("step", 1)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path):
    sweep = load_sweep(path)
    assert sweep.first_stages and len(sweep.runs) > 5
    assert sweep.output_dir == Path("runs") / path.stem


def test_settings_that_come_later_exist():
    assert LATER - {"pruning"} <= set(RSSTConfig.__dataclass_fields__)


# ---- the first stage of another run ----
def tiny_run(folder, name, first_stage=None, pruning=PRUNING, **training):
    path = write_recipe(
        folder / f"{name}.yaml", folder / name, pruning=pruning, model={"drop_path_rate": 0.1}, training=training
    )
    return run_recipe(load_recipe(path), first_stage=first_stage)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_run(folder, "run", pruning=None, method="dense", rewind="step", rewind_step=2)
    return folder / "run"


@pytest.mark.parametrize(
    "training",
    [
        dict(distillation_weight=0.5),
        dict(method="refill"),
        dict(method="refill", rewind="step", rewind_step=2, num_rounds=2),
        dict(method="dense"),
        dict(method="unstructured"),
    ],
    ids=["rsst", "refill", "step", "dense", "unstructured"],
)
def test_a_shared_first_stage_changes_no_bit(tmp_path, hasty, dense_run, training):
    apart = tiny_run(tmp_path, "apart", **training)
    shared = tiny_run(tmp_path, "shared", dense_run, **training)
    models = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("apart", "shared")]
    assert_same_state(models[1].state_dict(), models[0].state_dict())
    for a, b in zip(apart["rows"], shared["rows"], strict=True):
        assert {k: a[k] for k in ("name", "accuracy", "parameters")} == {
            k: b[k] for k in ("name", "accuracy", "parameters")
        }
    logs = [(tmp_path / name / "training_log.jsonl").read_text().splitlines() for name in ("apart", "shared")]
    timed = ("steps_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    logs = [[{k: v for k, v in json.loads(line).items() if k not in timed} for line in log] for log in logs]
    assert logs[0] == logs[1]
    states = [json.loads((tmp_path / name / "rsst_state.json").read_text()) for name in ("apart", "shared")]
    for key in ("stages", "settings", "done", "dense_widths", "steps", "epochs"):
        assert states[0][key] == states[1][key], key
    taken = json.loads((dense_run / "rsst_state.json").read_text())["seconds"]
    assert states[1]["seconds"] >= taken


@pytest.mark.parametrize(
    "training, words",
    [
        (dict(learning_rate=0.1), "they differ in training.learning_rate"),
        (dict(seed=1, per_device_train_batch_size=16), "training.per_device_train_batch_size, training.seed"),
        (dict(method="refill", rewind="step", rewind_step=1), "did not keep step 1 to rewind to"),
        (dict(method="dense", rewind="step", rewind_step=1), "did not keep step 1 to rewind to"),
    ],
)
def test_another_first_stage_is_refused(tmp_path, dense_run, training, words):
    with pytest.raises(ValueError, match=words):
        tiny_run(tmp_path, "run", dense_run, **training)
    assert not (tmp_path / "run" / "rsst_state.json").exists()


def test_a_first_stage_is_that_of_a_dense_run(tmp_path, finished_run, dense_run):
    recipe = load_recipe(finished_run[0] / "recipe.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="finished run of method='dense'"):
        run_recipe(recipe, first_stage=finished_run[0])
    recipe = load_recipe(
        dense_run / "recipe.yaml", [f"training.output_dir={tmp_path / 'dense'}", "data.path=elsewhere"]
    )
    with pytest.raises(ValueError, match="differ in data.path"):
        run_recipe(recipe, first_stage=dense_run)


# ---- scratch ----
def test_scratch_trains_new_weights_at_the_pruned_size(tmp_path, hasty):
    pruning = dict(targets=["d_inner", "intermediate_size"], sparsity=0.6, round_to=2, allocation="weights")
    results = tiny_run(tmp_path, "small", pruning=pruning, method="scratch", learning_rate=0.0)
    model = load_stage(tmp_path / "small", "train")
    for target, dense in (("d_inner", E), ("intermediate_size", F)):
        kept = model.config.widths(target)
        assert len(set(kept)) == 1 and kept[0] % 2 == 0
        assert 0.4 * dense - 2 < kept[0] <= 0.4 * dense
    assert [row["name"] for row in results["rows"]] == ["dense"] and "widths" not in results
    dense = tiny_run(tmp_path, "dense", pruning=None, method="dense", learning_rate=0.0)
    for key in ("parameters", "macs"):
        assert results["full_size"][key] == dense["rows"][0][key] > results["rows"][0][key]
    # Not a part of the dense model's weights: with the step size at zero both are as they were at the start.
    weight, whole = (
        m.backbone.layers[0].mixer.out_proj.weight for m in (model, load_stage(tmp_path / "dense", "train"))
    )
    assert not any((weight[:, :1] == whole[:, i : i + 1]).all() for i in range(E))
    assert "from new weights" in (tmp_path / "small" / "README.md").read_text()


def test_scratch_needs_a_preset(tmp_path):
    path = write_recipe(tmp_path / "a.yaml", training={"method": "scratch"})
    content = yaml.safe_load(path.read_text()) | {"model": {"path": "somewhere"}}
    with pytest.raises(RecipeError, match="scratch .* needs `model.preset`"):
        build_recipe(content)


# ---- a whole sweep ----
@pytest.fixture
def loads(monkeypatch):
    """The recipes that data were loaded for."""
    whole, calls = ImageClassification.load_data, []
    monkeypatch.setattr(ImageClassification, "load_data", lambda self, r: calls.append(r) or whole(self, r))
    return calls


@pytest.fixture
def swept(tmp_path, hasty, loads, capsys):
    """(folder, exit code, stdout, stderr) of a sweep with a run that must fail."""
    runs = {**RUNS, "too much": {"pruning.floor": 0.9}}
    path = write_sweep(tmp_path, runs=runs, grid={"training.seed": [0, 1]})
    return tmp_path / "out", main(["sweep", str(path)]), *capsys.readouterr()


def test_a_sweep_from_beginning_to_end(swept, tmp_path, loads, capsys, monkeypatch):
    folder, code, out, err = swept
    assert len(loads) == 1
    assert code == 2 and err.rstrip().endswith("error: 2 of 8 runs failed: too-much_seed-0, too-much_seed-1.")
    announced = re.findall(r"^Run \d of 8: (.+?) ─", out, re.M)
    assert announced == [f"{name}, seed {seed}" for seed in (0, 1) for name in (*RUNS, "too much")]
    assert out.count("First stage of several runs, seed") == 2
    results = json.loads((folder / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == [*["finished"] * 3, "failed"] * 2
    assert "floor=0.9" in results["runs"][-1]["reason"]
    for run in (*results["runs"][:3], *results["runs"][4:7]):
        own = json.loads((folder / run["folder"] / "results.json").read_text())
        assert run["final"] == own["rows"][-1]["accuracy"] and run["seconds"] == own["seconds"]
        first = next(d for d in results["dense"] if d["seed"] == run["seed"])
        assert run["dense"] == first["final"] and first["folder"] in os.listdir(folder / "first-stages")
        assert run["parameters_share"] == run["parameters"] / first["parameters"] < 0.7
    rows = {row["name"]: row for row in results["table"]}
    assert list(rows) == ["dense", *RUNS] and all(row["seeds"] == [0, 1] for row in rows.values())
    table = (folder / "results.md").read_text()
    assert "| small | 2 |" in table and "too-much_seed-1 failed: " in table and "not finished" not in table
    assert (folder / "figures" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    # once more: what failed is tried again, nothing else
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*_seed-*/results.json")}
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--resume"]) == 2
    again = capsys.readouterr().out
    assert again.count("Run 4 of 8") == again.count("Run 8 of 8") == 1 and "Run 1 of 8" not in again
    assert made == {path: path.stat().st_mtime_ns for path in made} and len(made) == 6

    for argv, words in (([], "already holds a sweep"), (["--resume", "data.resize=true"], "from another sweep")):
        assert main(["sweep", str(tmp_path / "sweep.yaml"), *argv]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--resume"]) == 2
    assert "start the sweep again with --resume" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    path = write_sweep(tmp_path, grid={"training.seed": [0, 1]})
    before = sorted(tmp_path.rglob("*"))
    assert main(["sweep", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "6 runs" in out and "refill_seed-1" in out
    # 2 first stages of 1; RSST 1 + 1, Refill 1, scratch 2, each twice
    assert "12 epochs of training in all; without shared first stages it would be 14." in " ".join(out.split())


@pytest.mark.parametrize(
    "patterns, wanted",
    [
        ([], ["A, seed 0", "B [x], seed 0", "A, seed 1", "B [x], seed 1"]),
        (["A"], ["A, seed 0", "A, seed 1"]),
        (["B*", "A, seed 1", "*"], ["B [x], seed 0", "B [x], seed 1", "A, seed 1", "A, seed 0"]),
        (["*seed 1"], ["A, seed 1", "B [x], seed 1"]),
        (["B [x]", "A, seed 1"], ["B [x], seed 0", "B [x], seed 1", "A, seed 1"]),
        (["B [x], seed 1"], ["B [x], seed 1"]),
        (["B [[]x], seed ?"], ["B [x], seed 0", "B [x], seed 1"]),
    ],
)
def test_some_runs_are_chosen_by_name_title_or_pattern(tmp_path, patterns, wanted):
    sweep = load_sweep(write_sweep(tmp_path, runs={"A": {}, "B [x]": {}}, grid={"training.seed": [0, 1]}))
    assert [run.title for run in choose_runs(sweep, patterns)] == wanted


@pytest.mark.parametrize("pattern", ["C", "a", "A, seed", ""])
def test_a_pattern_that_matches_no_run_is_an_error(tmp_path, capsys, pattern):
    path = write_sweep(tmp_path, runs={"A": {}, "B": {}}, grid={"training.seed": [0, 1]})
    assert main(["sweep", str(path), "--only", "A", "--only", pattern]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in (f"{pattern!r} matches no run", "['A', 'B']", "'B, seed 1'"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_only_some_runs_now_and_the_others_later(tmp_path, hasty, capsys):
    runs = {"A": {"training.method": "prune"}, "B": {"training.method": "prune"}, "bad": {"pruning.floor": 0.9}}
    path = write_sweep(tmp_path, runs={**runs, "small": RUNS["small"]})
    assert main(["sweep", str(path), "--only", "small", "--only", "B"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^Run (\d) of 4: (.+?) ─", out, re.M) == [("4", "small"), ("2", "B")]
    assert out.count("First stage of several runs") == 1 and "2 of 4 runs are not finished" in " ".join(out.split())
    assert main(["sweep", str(path), "--resume", "--only", "bad"]) == 2
    assert "1 of 1 runs failed: bad." in capsys.readouterr().err
    assert main(["sweep", str(path), "--resume", "--only", "A"]) == 0, "another run's failure is not this one's"
    out = capsys.readouterr().out
    assert re.findall(r"^Run (\d) of 4", out, re.M) == ["1"] and "First stage" not in out


def test_nothing_is_written_for_a_folder_in_use(tmp_path, capsys):
    path = write_sweep(tmp_path)
    assert main(["sweep", str(path), "--resume"]) == 2
    assert "no sweep to resume" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert main(["sweep", str(path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    below = tmp_path / "out" / "mine.txt" / "sweep"
    assert main(["sweep", str(path), f"output_dir={below}"]) == 2
    assert f"'output_dir={below}' cannot be written" in capsys.readouterr().err


def test_a_failed_first_stage_fails_its_runs_and_is_tried_once(tmp_path, hasty, monkeypatch, capsys):
    calls = []

    def fails(recipe, **kwargs):
        calls.append(recipe.training["method"])
        raise ValueError("no luck")

    monkeypatch.setattr(sweep_run, "run_recipe", fails)
    assert main(["sweep", str(write_sweep(tmp_path))]) == 2
    assert calls == ["dense", "scratch"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "rsst failed: its first stage: no luck" in table and "small failed: no luck" in table


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pruning.floor": 0.9}, "with floor=0.9"),
        ({"training.rsst_epochs": 1, "training.lambda_max": 1e9}, "lower `lambda_max`"),
    ],
)
def test_a_run_that_cannot_be_made_fails_before_the_training_it_would_have_shared(
    tmp_path, hasty, capsys, changes, reason
):
    path = write_sweep(tmp_path, runs={"a": changes, "b": {**changes, "training.residual": 0.02}})
    assert main(["sweep", str(path)]) == 2
    out = capsys.readouterr().out
    assert "First stage of several runs" not in out and "sweep.png" not in out
    assert not any((tmp_path / "out" / "first-stages").glob("*/*"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["failed"] * 2
    assert all(reason in run["reason"] for run in results["runs"]), results["runs"]


def test_every_run_that_cannot_be_made_is_noted_before_the_training_they_share(tmp_path, hasty, capsys):
    runs = {"good": {"training.method": "prune"}, "bad": {"pruning.floor": 0.9}, "short": {"training.lambda_max": 1e9}}
    assert main(["sweep", str(write_sweep(tmp_path, runs=runs))]) == 2
    out = " ".join(capsys.readouterr().out.split())
    marks = ["Cannot be made: bad", "Cannot be made: short", "First stage of several runs", "Run 1 of 3: good"]
    assert [mark for mark in sorted(marks, key=out.find) if mark in out] == marks
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["finished", "failed", "failed"]


@pytest.mark.slow
def test_this_machine_need_not_follow_the_runs_that_were_not_chosen(tmp_path, hasty):
    runs = {"A": {"training.method": "dense"}, "gpu": {"training.method": "dense", "training.cuda_graphs": True}}
    path = write_sweep(tmp_path, runs={**runs, "tf32": {"training.tf32": True}})
    assert main(["sweep", str(path), "--only", "A"]) == 0


def test_data_that_are_not_there_are_an_error_before_anything_is_written(tmp_path, capsys):
    path = write_sweep(tmp_path, set={"data.path": "./nowhere"})
    assert main(["sweep", str(path)]) == 2
    assert "'./nowhere'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_data_that_are_not_there_fail_their_run_alone(tmp_path, hasty, capsys):
    scratch = {"training.method": "scratch"}
    path = write_sweep(tmp_path, runs={"there": scratch, "away": {**scratch, "data.path": "./nowhere"}, "on": scratch})
    assert main(["sweep", str(path)]) == 2
    assert "1 of 3 runs failed: away." in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["finished", "failed", "finished"]
    assert "'./nowhere'" in results["runs"][1]["reason"]


def test_a_step_that_never_comes_fails_the_run_that_rewinds_to_it_alone(tmp_path, hasty, capsys):
    late = {"training.rewind": "step", "training.rewind_step": 99999}
    assert main(["sweep", str(write_sweep(tmp_path, runs={"late": late, "on": {}}))]) == 2
    assert "1 of 2 runs failed: late." in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["failed", "finished"]
    assert "`rewind_step` is 99999, but the first stage has" in results["runs"][0]["reason"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"name": "dense", "parameters": 3}]}'])
def test_a_damaged_run_of_a_sweep_is_named(tmp_path, hasty, capsys, text):
    path = write_sweep(tmp_path, runs={"small": {"training.method": "scratch"}})
    assert main(["sweep", str(path)]) == 0
    (tmp_path / "out" / "small" / "results.json").write_text(text)
    assert main(["sweep", str(path), "--resume"]) == 2
    assert "small/results.json' is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_first_stage_that_lost_its_model_is_named(tmp_path, hasty, capsys):
    path = write_sweep(tmp_path, runs={name: {"training.method": "prune"} for name in "AB"})
    assert main(["sweep", str(path), "--only", "A"]) == 0
    (first,) = (tmp_path / "out" / "first-stages").glob("[!.]*")
    shutil.rmtree(first / "stages" / "0-train" / "model")
    assert main(["sweep", str(path), "--resume"]) == 2
    failed = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][1]
    assert f"{str(first)!r} lacks the model of its first stage" in failed["reason"]


def test_what_the_system_reports_stops_the_sweep(tmp_path, monkeypatch, capsys):
    calls = []

    def fails(recipe, **kwargs):
        calls.append(recipe)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_run, "run_recipe", fails)
    assert main(["sweep", str(write_sweep(tmp_path))]) == 2
    assert len(calls) == 1 and "No space left" in capsys.readouterr().err


# ---- several processes, and their ends ----
class Killed(BaseException):
    pass


def test_a_sweep_goes_on_in_the_middle_of_a_run(tmp_path, hasty, monkeypatch, capsys):
    path, whole, made = write_sweep(tmp_path), sweep_run.run_recipe, []

    def dies_in_refill(recipe, **kwargs):
        made.append(recipe.training["output_dir"])
        if recipe.training.get("method") == "refill":
            monkeypatch.setattr(RSSTTrainer, "_rewind", lambda *a: (_ for _ in ()).throw(Killed))
        return whole(recipe, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "run_recipe", dies_in_refill)
        with pytest.raises(Killed):
            main(["sweep", str(path)])
    monkeypatch.undo()
    assert [Path(folder).name for folder in made[1:]] == ["rsst", "refill"] and len(made) == 3
    assert "2 of 3 runs are not finished." in (tmp_path / "out" / "results.md").read_text()
    assert main(["sweep", str(path), "--resume"]) == 0
    alone = write_recipe(tmp_path / "alone.yaml", tmp_path / "alone", training={"method": "refill"})
    run_recipe(load_recipe(alone))
    models = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("alone", "out/refill")]
    assert_same_state(models[1].state_dict(), models[0].state_dict())


def test_a_run_that_another_process_holds_is_left_to_it_and_taken_when_that_dies(tmp_path, hasty, capsys, monkeypatch):
    path = write_sweep(tmp_path)
    sweep = load_sweep(path)
    sweep_run._claim(sweep, resume=False)
    held = contextlib.ExitStack()
    assert held.enter_context(sweep_run._lock(sweep_run._lock_file(sweep.runs[1].folder)))

    def holder_dies(seconds):
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [run["status"] for run in results["runs"]] == ["finished", "not finished", "finished"]
        held.close()

    monkeypatch.setattr(sweep_run.time, "sleep", holder_dies)
    assert main(["sweep", str(path), "--resume"]) == 0
    assert "Waiting for 1 run that another process makes" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["finished"] * 3


QUICK = """
import functools, sys
from mamba_rsst import speed, sweep_run
from mamba_rsst.cli import main
speed.compare_throughput = functools.partial(speed.compare_throughput, rounds=1, run_seconds=0.001)
sweep_run.WAIT_SECONDS = 0.1
sys.exit(main(sys.argv[1:]))
"""


def start(*argv, code=QUICK):
    command = [sys.executable, *(["-c", code] if code else ["-m", "mamba_rsst"]), "sweep", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_sweep_is_resumed_by_two_processes_that_share_the_work(tmp_path):
    path = write_sweep(tmp_path, grid={"training.seed": [0, 1]})
    first = start(path)
    deadline = time.time() + 120
    while not (tmp_path / "out" / "rsst_seed-0" / "results.json").exists():
        assert first.poll() is None and time.time() < deadline, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    made = (tmp_path / "out" / "rsst_seed-0" / "results.json").stat().st_mtime_ns
    done = len(list((tmp_path / "out").glob("*_seed-*/results.json")))
    both = [start(path, "--resume"), start(path, "--resume")]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    began = [run for out, _ in outputs for run in re.findall(r"^Run \d of 6: .+? ─", out, re.M)]
    assert len(began) == len(set(began)) == 6 - done
    assert (tmp_path / "out" / "rsst_seed-0" / "results.json").stat().st_mtime_ns == made
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["finished"] * 6
    assert len(results["dense"]) == 2 and len(results["table"]) == 4


@pytest.mark.slow
def test_the_command_line_as_it_is_typed(tmp_path):
    process = start(write_sweep(tmp_path), "training.seed=3", code=None)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "Saved to" in out and "Run 3 of 3: small" in out
    assert {"results.md", "results.json", "sweep.yaml", "figures", "rsst"} <= set(os.listdir(tmp_path / "out"))


# ---- the table and the figure ----
def entry(name, seed, rows, method="prune", sparsity=0.5, network="n", beginning="b", more_point=(), **results):
    point = {"pruning.sparsity": sparsity, "training.seed": seed, **dict(more_point)}
    about = {"name": name, "point": point, "folder": f"{name}-{seed}", "seed": seed, "method": method}
    results = {"task": "image-classification", "rows": rows, "seconds": 10.0, "device": "cpu", **results}
    return {**about, "network": network, "beginning": beginning, "results": results}


def row(name, quality, parameters, speed, metric="accuracy", item="images"):
    return {"name": name, metric: quality, "parameters": parameters, "macs": 10 * parameters, f"{item}_per_s": speed}


def pruned(name, seed, dense, cut, final, speed=200.0, **more):
    rows = [row("dense", dense, 1000, 100.0), row("cut", cut, 400, speed), row("recovered", final, 400, speed)]
    return entry(name, seed, rows, **more)


def test_the_table_by_hand():
    small = entry("small", 0, [row("dense", 0.78, 390, 150.0)], method="scratch")
    small["results"]["full_size"] = {"parameters": 1000, "macs": 10000, "images_per_s": 75.0}
    waiting = {**pruned("RSST", 2, 0, 0, 0)}
    del waiting["results"]
    failed = {**waiting, "name": "bad", "failed": "because"}
    runs = [
        pruned("RSST", 0, 0.90, 0.5, 0.88),
        pruned("RSST", 1, 0.92, 0.7, 0.84, speed=300.0),
        waiting,
        small,
        failed,
    ]
    results = sweep_report.collect(runs, [])
    dense, rsst, scratch = results["table"]
    assert dense["final"] == pytest.approx({"mean": 0.91, "std": 0.02 / 2**0.5, "n": 2})
    assert rsst["final"] == pytest.approx({"mean": 0.86, "std": 0.04 / 2**0.5, "n": 2})
    assert rsst["change"] == pytest.approx({"mean": -0.05, "std": 0.06 / 2**0.5, "n": 2})
    assert rsst["cut"]["mean"] == pytest.approx(0.6) and rsst["parameters_share"]["mean"] == 0.4
    assert rsst["speed_ratio"]["mean"] == 2.5 and rsst["seeds"] == [0, 1]
    assert scratch["change"] == pytest.approx({"mean": -0.12, "std": None, "n": 1}, nan_ok=True)
    assert scratch["speed_ratio"]["mean"] == 2.0 and scratch["cut"] is None
    text = sweep_report.markdown(results)
    line = "| 86.00 ± 2.83 | -5.00 ± 4.24 | 60.00 ± 14.14 | 40.0% | 40.0% | 2.50× ± 0.71 | 10 |"
    assert f"| RSST | 0.5 | 2 {line}" in text
    assert "| small | 0.5 | 1 | 78.00 | -12.00 | – | 39.0% | 39.0% | 2.00× | 10 |" in text
    assert "1 of 5 runs are not finished." in text and "RSST-2 failed: because" in text


def test_dense_networks_that_were_trained_otherwise_are_told_apart():
    """By the grid, in a column; by a run's own setting, by that run's name. None of them is the small one's."""

    def of(rate, dense, **more):
        point = {"training.learning_rate": rate, "training.rsst_epochs": 3}
        return pruned("RSST", 0, dense, 0.5, 0.8, beginning=f"b{rate}", more_point=point, **more)

    longer = {**pruned("longer", 0, 0.95, 0.5, 0.9, beginning="longer"), "point": of(0.1, 0.9)["point"]}
    small = entry("small", 0, [row("dense", 0.78, 390, 150.0)], method="scratch", beginning="small")
    small["results"]["full_size"] = {"parameters": 1000, "macs": 10000, "images_per_s": 75.0}
    results = sweep_report.collect([of(0.1, 0.9), of(0.2, 0.7), longer, small], [])
    rows = [(r["name"], r["point"].get("training.learning_rate"), r["final"]["mean"]) for r in results["table"]]
    assert rows[:3] == [("dense", 0.1, 0.9), ("dense", 0.2, 0.7), ("dense of longer", 0.1, 0.95)]
    assert all(set(r["point"]) == {"training.learning_rate"} for r in results["table"][:3])
    assert results["table"][-1]["name"] == "small" and results["table"][-1]["change"] is None


def test_perplexity_is_compared_by_its_ratio(tmp_path):
    rows = [
        row("dense", 20.0, 1000, 50.0, "perplexity", "tokens"),
        row("cut", 25.0, 500, 75.0, "perplexity", "tokens"),
    ]
    results = sweep_report.collect([entry("RSST", 0, rows, task="causal-lm")], [])
    assert (results["metric"], results["speed"]) == ("perplexity", "tokens_per_s")
    assert "| RSST | 0.5 | 25.00 | +25.00% | – | 50.0% | 50.0% | 1.50× | 10 |" in sweep_report.markdown(results)
    assert sweep_report.plot(results, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_yet_is_a_table_too():
    waiting = {**pruned("RSST", 0, 0, 0, 0)}
    del waiting["results"]
    assert "1 of 1 runs are not finished." in sweep_report.markdown(sweep_report.collect([waiting], []))
