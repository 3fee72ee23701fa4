import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from tiny import make
from tiny_runs import digits, load_stage, write_recipe

from mamba_rsst import PruningConfig, cli, prune_
from mamba_rsst.commands.arguments import match_classes, normalisation
from mamba_rsst.commands.checkpoints import _calibration
from mamba_rsst.evaluation import count_macs_per_item
from mamba_rsst.hub import load_model


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """call(*argv) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.setenv("COLUMNS", "150")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*argv):
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(call, tmp_path):
    """refused(*argv) -> the one line on stderr of a command that must fail and leave every file as it is."""

    def run(*argv):
        before = files_below(tmp_path)
        code, out, err = call(*argv)
        assert code == 2
        assert out == ""
        assert re.fullmatch(r"mamba-rsst[ a-z]*: error: .+\n", err), err  # one line, no traceback
        assert files_below(tmp_path) == before
        return err

    return run


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "tiny.yaml", tmp_path / "run")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """images(name, labels, size) -> a folder with train.parquet and test.parquet."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")

    def write(name, labels, size=8):
        folder = tmp_path_factory.mktemp(name)
        rows = []
        for i, label in enumerate(labels):
            Image.new("RGB", (size, size), (20 * i, 0, 90)).save(png := io.BytesIO(), "PNG")
            rows.append({"image": {"bytes": png.getvalue(), "path": None}, "label": label})
        for split in ("train", "test"):
            parquet.write_table(arrow.Table.from_pylist(rows), folder / f"{split}.parquet")
        return folder

    return write


# ---- words that argparse refuses ----
@pytest.mark.parametrize(
    "argv, names",
    [
        ([], ["COMMAND"]),
        (["trian", "x.yaml"], ["'trian'", "'train'", "'prune'", "'inspect'", "'eval'", "'bench'"]),
        (["train"], ["recipe"]),
        (["train", "x.yaml", "--resmue"], ["--resmue"]),
        (["train", "x.yaml", "--resume", "seed"], ["seed"]),
        (["prune", "m", "out", "--sparsity", "0.5"], ["--target"]),
        (["prune", "m", "out", "--target", "d_inner", "--sparsity", "much"], ["--sparsity", "'much'"]),
        (["inspect", "m", "training.seed=1"], ["training.seed=1"]),
        (["eval", "m", "--batch-size", "many"], ["--batch-size", "'many'"]),
        (["bench"], ["model"]),
        (["bench", "m", "--batch-size", "4", "many"], ["--batch-size", "'many'"]),
    ],
)
def test_unknown_words(refused, argv, names):
    error = refused(*argv)
    assert all(name in error for name in names)


# ---- train ----
@pytest.mark.parametrize(
    "override, names",
    [
        ("training.lerning_rate=1e-3", ["`training.lerning_rate`", "'learning_rate'"]),
        ("prunning.sparsity=0.5", ["`prunning`", "'pruning'"]),
        ("model.preset=mamba_tinny", ["'mamba_tinny'", "'mamba_tiny'", "'mamba_small'", "'mamba_base'"]),
        ("task=detection", ["'detection'", "'image-classification'"]),
        ("pruning.targets=[d_iner]", ["'d_iner'", "'d_inner'", "'intermediate_size'"]),
        ("pruning.targets=[]", ["`targets`"]),
        ("pruning.sparsity=1.0", ["`sparsity`", "[0, 1)", "1.0"]),
        ("pruning.sparsity=-0.1", ["`sparsity`", "[0, 1)", "-0.1"]),
        ("pruning.round_to=64", ["`round_to`", "64", "32 channels"]),
        ("pruning.round_to=0", ["`round_to`", "0"]),
        ("pruning.importance=tailor", ["'tailor'", "'taylor'"]),
        ("pruning.floor=0.9", ["floor=0.9", "50.0%", "d_inner"]),
        ("model.intermediate_size=0", ["'intermediate_size'", "d_inner"]),
        ("model.image_size=9", ["`patch_size` 4", "9"]),
        ("model.image_size=12", ["8x8", "12x12", "digits"]),
        ("data.path=/nowhere/to/be/found", ["/nowhere/to/be/found"]),
        ("data.eval_split=tset", ["'tset'", "'test'"]),
        ("training.method=rst", ["'rst'", "'rsst'", "'refill'", "'dense'"]),
        ("training.schedule=exponential", ["'exponential'", "'exp_power'"]),
        ("training.lr_scheduler_type=cosin", ["`training.lr_scheduler_type`", "'cosin'", "'cosine'"]),
        ("training.num_train_epochs=0", ["`rsst_epochs`"]),
        ("training.max_steps=5", ["`max_steps`"]),
        ("training.per_device_train_batch_size=0", ["`per_device_train_batch_size`"]),
        ("training.dataloader_num_workers=2", ["dataloader_num_workers"]),
        ("training.data_seed=-1", ["`data_seed`", "-1"]),
        ("training.enable_jit_checkpoint=true", ["`enable_jit_checkpoint`", "`save_steps`"]),
        ("training.train_sampling_strategy=group_by_length", ["train_sampling_strategy", "'sequential'"]),
        ("augmentation.crop_padding=9", ["`augmentation.crop_padding`", "8", "9"]),
        ("training.report_to=wandb", ["wandb"]),
        ("training.seed", ["section.key=value", "'training.seed'"]),
    ],
)
def test_a_recipe_that_cannot_be_run(refused, recipe, override, names, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    error = refused("train", recipe, override)
    assert all(name in error for name in names), error


def test_a_missing_recipe(refused):
    assert "'absent.yaml'" in refused("train", "absent.yaml")


def test_a_file_that_is_no_yaml(refused, tmp_path):
    (tmp_path / "odd.yaml").write_text("task: [image")
    assert "odd.yaml" in refused("train", tmp_path / "odd.yaml")


def test_data_that_cannot_be_used(refused, recipe, tmp_path, images):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("train", recipe, f"data.path={tmp_path / 'empty'}")
    folder = images("one_class", [0] * 6)
    error = refused("train", recipe, f"data.path={folder}")
    assert str(folder) in error and "only one class" in error
    folder = images("no_rows", [])
    assert str(folder) in refused("train", recipe, f"data.path={folder}")
    folder = images("large", [0, 1, 0, 1], size=10)
    error = refused("train", recipe, f"data.path={folder}")
    assert "10x10" in error and "8x8" in error and "data.resize" in error
    error = refused("train", recipe, f"data.path={folder}", "data.resize=true", "training.dataloader_drop_last=true")
    assert "4 samples in batches of 32" in error


@pytest.fixture
def ill_fitting(finished_run, tmp_path):
    """The finished model with a config of another shape."""
    folder = tmp_path / "ill_fitting"
    shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("stages"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 20}))
    return folder


def test_a_checkpoint_of_another_shape(refused, ill_fitting, tmp_path):
    recipe = write_recipe(tmp_path / "from.yaml", tmp_path / "out")
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "model": {"path": str(ill_fitting)}}))
    prune = ("prune", ill_fitting, "out", "--target", "d_inner", "--sparsity", 0.5)
    for argv in (("inspect", ill_fitting), ("eval", ill_fitting), prune, ("train", recipe)):
        error = refused(*argv)
        assert str(ill_fitting) in error and "another shape" in error and "cls_token" in error


def test_a_checkpoint_of_other_classes(refused, finished_run, tmp_path, images):
    recipe = write_recipe(tmp_path / "from.yaml", tmp_path / "out", data={"path": str(images("two", [0, 1] * 40))})
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "model": {"path": str(finished_run[0])}}))
    error = refused("train", recipe)
    assert str(finished_run[0]) in error and "10 classes" in error and "has 2" in error


# ---- folders that hold something already ----
def test_a_folder_that_holds_another_run(refused, recipe, finished_run):
    folder = finished_run[0]
    before = files_below(folder)
    error = refused("train", recipe, f"training.output_dir={folder}")
    assert str(folder) in error and "already holds a run" in error and "--resume" in error
    error = refused("train", recipe, f"training.output_dir={folder}", "--resume")
    assert str(folder) in error and "another recipe" in error and str(folder / "recipe.yaml") in error
    error = refused("train", folder / "recipe.yaml", "--resume")
    assert str(folder) in error and "finished" in error
    assert files_below(folder) == before


def test_a_folder_that_holds_anything_else(refused, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert "is not empty" in refused("train", recipe)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    assert "is a file" in refused("train", recipe)
    error = refused("train", recipe, f"training.output_dir={tmp_path / 'run' / 'below'}")
    assert "training.output_dir=" in error and f"{str(tmp_path / 'run')!r} is a file" in error


def test_resume_without_a_run(refused, recipe, tmp_path):
    for make_folder in (lambda: None, (tmp_path / "run").mkdir):
        make_folder()
        error = refused("train", recipe, "--resume")
        assert str(tmp_path / "run") in error and "no run to resume" in error


def test_resume_may_stand_before_the_overrides(refused, recipe):
    assert "'elsewhere'" in refused("train", recipe, "--resume", "training.output_dir=elsewhere")


# ---- prune, inspect, eval ----
def prune(model, out, *more, target="d_inner", sparsity=0.5):
    return ("prune", model, out, "--target", target, "--sparsity", sparsity, *more)


@pytest.mark.parametrize(
    "argv, names",
    [
        (prune("MODEL", "out", target="d_iner"), ["'d_iner'", "'d_inner'"]),
        (prune("MODEL", "out", sparsity=1.0), ["`sparsity`", "1.0"]),
        (prune("MODEL", "out", sparsity=-0.1), ["`sparsity`", "-0.1"]),
        (prune("MODEL", "out", "--round-to", 40), ["`round_to`", "40"]),
        (prune("MODEL", "out", "--importance", "tailor"), ["'tailor'", "'taylor'"]),
        (prune("MODEL", "out", "--importance", "taylor"), ["taylor", "--data"]),
        (prune("MODEL", "out", "--importance", "taylor", "--data", "./absent"), ["absent"]),
        (prune("MODEL", "out", "--scope", "galaxy"), ["`scope`", "'galaxy'", "'global'"]),
        (prune("MODEL", "out", "--budget", "money"), ["`budget`", "'money'", "'parameters'"]),
        (prune("MODEL", "out", "--floor", 0.9, "--round-to", 1), ["floor=0.9"]),
        (prune("./absent", "out"), ["'./absent'"]),
        (prune("MODEL", "MODEL"), ["MODEL", "exists"]),
        (("inspect", "./absent"), ["'./absent'"]),
        (("eval", "./absent"), ["'./absent'"]),
        (("eval", "MODEL", "--split", "tset"), ["'tset'", "'test'"]),
        (("eval", "MODEL", "--data", "./absent"), ["absent"]),
        (("eval", "MODEL", "--tasks", "lambada_local", "--resize"), ["--resize", "images"]),
        (("eval", "MODEL", "--max-samples", 0), ["max_eval_samples", "0"]),
        (("eval", "MODEL", "--batch-size", 0), ["--batch-size", "0"]),
        (("eval", "MODEL", "--device", "abacus"), ["--device", "'abacus'"]),
        (("eval", "BARE"), ["BARE", "--data"]),
        (("bench", "./absent"), ["'./absent'"]),
        (("bench", "MODEL", "--against", "./absent"), ["'./absent'"]),
        (("bench", "MODEL", "--against", "MODEL"), ["nothing to compare", "MODEL"]),
        (("bench", "MODEL", "--against", "SAME"), ["nothing to compare", "MODEL"]),
        (("bench", "MODEL", "--against", "WORDS"), ["different kinds", "images of 3x8x8", "vocabulary of 53"]),
        (("bench", "MODEL", "--batch-size", 4, 0), ["batch size", "0"]),
        (("bench", "WORDS", "--seq-len", 0), ["sequence length", "0"]),
        (("bench", "MODEL", "--seq-len", 9), ["--seq-len", "language models"]),
        (("bench", "MODEL", "--rounds", 0), ["rounds", "0"]),
        (("bench", "MODEL", "--device", "abacus"), ["--device", "'abacus'", "'cuda'"]),
        (("bench", "MODEL", "--dtype", "int4"), ["--dtype", "'int4'", "'bfloat16'"]),
        (("bench", "MODEL", "--device", "both"), ["--device both", "no CUDA device"]),
        (("bench", "MODEL", "--graph", "--device", "cpu"), ["--graph", "CUDA"]),
        (("bench", "MODEL", "--json", "."), ["--json", "'.'", "folder"]),
    ],
)
def test_prune_inspect_eval_and_bench_refuse(refused, finished_run, tmp_path, argv, names, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished_run[0] / name, bare)
    places = {"MODEL": str(finished_run[0]), "BARE": str(bare), "WORDS": str(tmp_path / "words")}
    places["SAME"] = f"{finished_run[0]}/../{finished_run[0].name}/"
    if "WORDS" in argv:
        make("mamba").save_pretrained(places["WORDS"])
    before = files_below(finished_run[0])
    error = refused(*(places.get(word, word) for word in argv))
    assert all(places.get(name, name) in error for name in names), error
    assert files_below(finished_run[0]) == before


def rows_of(table):
    """The cells of every printed row that has any."""
    lines = [re.split(r"[│┃]", line) for line in table.splitlines()]
    return [[cell.strip() for cell in line[1:-1]] for line in lines if len(line) > 2]


def test_inspect_prints_the_widths_the_parameters_and_the_arithmetic(call, finished_run):
    code, out, _ = call("inspect", finished_run[0])
    assert code == 0
    model = load_model(finished_run[0])
    config = model.config
    names = ["d_inner", "d_state", "dt_rank", "intermediate_size"]
    head, *rows = rows_of(out)
    assert head[0] == "Layer" and sorted(head[1:]) == sorted(names)
    assert rows == [[str(i), *(str(config.widths(name)[i]) for name in head[1:])] for i in range(2)]
    assert f"parameters  {sum(p.numel() for p in model.parameters()):,}  (torch.float32)" in out
    macs = count_macs_per_item(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert f"MACs        {macs:,} an image" in out


@pytest.mark.parametrize("importance", ["magnitude_l2", "taylor"])
def test_prune_prints_and_saves_the_smaller_model(call, finished_run, tmp_path, importance):
    model = load_stage(finished_run[0], "train")
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    shutil.copy(finished_run[0] / "preprocessor_config.json", dense)
    more = ("--round-to", 2, "--importance", importance, *(("--data", "digits") if importance == "taylor" else ()))
    argv = (*prune(dense, "out", *more), "--target", "intermediate_size")
    before = files_below(tmp_path)
    code, dry, _ = call(*argv, "--dry-run")
    assert code == 0 and files_below(tmp_path) == before
    code, out, _ = call(*argv)
    assert code == 0 and out.startswith(dry) and "Saved to out. It has not been trained since the cut." in out

    smaller = load_model("out")
    rows = rows_of(out)
    totals = {"d_inner": [0, 0], "intermediate_size": [0, 0]}
    for layer, target, was, now, sparsity in rows[1:5]:
        widths = [m.config.widths(target)[int(layer)] for m in (model, smaller)]
        assert [int(was), int(now)] == widths and sparsity == f"{1 - widths[1] / widths[0]:.1%}"
        assert widths[1] % 2 == 0
        totals[target] = [a + b for a, b in zip(totals[target], widths)]
    assert rows[5:] == [["total", t, str(was), str(now), f"{1 - now / was:.1%}"] for t, (was, now) in totals.items()]
    assert all(now <= 0.5 * was for was, now in totals.values())
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    assert f"parameters {counts[0]:,} -> {counts[1]:,} ({1 - counts[1] / counts[0]:.1%} fewer)" in out
    files = {path.name for path in tmp_path.joinpath("work", "out").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= files
    if importance == "magnitude_l2":
        targets = ["d_inner", "intermediate_size"]
        prune_(model, PruningConfig(targets=targets, sparsity=0.5, round_to=2))
        for (name, a), b in zip(model.state_dict().items(), smaller.state_dict().values()):
            assert torch.equal(a, b), name
    assert not list(tmp_path.rglob(".*tmp"))
    code, _, err = call(*argv)
    assert code == 2 and "'out' exists" in err


def test_eval_prints_what_the_run_reported(call, finished_run):
    folder = finished_run[0]
    row = json.loads((folder / "results.json").read_text())["rows"][-1]
    code, out, _ = call("eval", folder, "--batch-size", 7)
    assert code == 0
    cells = dict(rows_of(out))
    assert cells["accuracy"] == f"{row['accuracy']:.2%} of 60 images"
    assert cells["parameters"] == f"{row['parameters']:,}" and cells["MACs an image"] == f"{row['macs']:,}"
    ends = [m for m in map(json.loads, (folder / "training_log.jsonl").read_text().splitlines()) if "eval_loss" in m]
    assert float(cells["loss"]) == pytest.approx(ends[-1]["eval_loss"], abs=6e-5)
    assert cells["images/s"].endswith("batch 7")
    assert "".join(f"{folder} on digits (test)".split()) in "".join(out.split())  # a long path takes several lines


def test_classes_are_numbered_as_the_model_does_by_their_names():
    def data(*names):
        parts = (SimpleNamespace(labels=torch.tensor(labels)) for labels in ([0, 1, 2, 0], [2, 2, 1]))
        train, evaluated = parts
        return SimpleNamespace(id2label=dict(enumerate(names)), train=train, eval=evaluated)

    model = SimpleNamespace(config=SimpleNamespace(num_labels=3, id2label={0: "ant", 1: "bee", 2: "cat"}))
    match_classes(model, "there", same := data("ant", "bee", "cat"))
    match_classes(model, "there", turned := data("cat", "ant", "bee"))
    assert same.train.labels.tolist() == [0, 1, 2, 0] and same.eval.labels.tolist() == [2, 2, 1]
    assert turned.train.labels.tolist() == [2, 0, 1, 2] and turned.eval.labels.tolist() == [1, 1, 0]
    with pytest.warns(UserWarning, match="'dog'.*the model's .*'cat'"):
        match_classes(model, "there", other := data("dog", "ant", "bee"))
    assert other.train.labels.tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="'there' has 2 classes, the model 3"):
        match_classes(model, "there", data("ant", "bee"))


def test_scores_that_look_at_images_see_them_as_the_model_does(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("stages"))
    file = tmp_path / "run" / "preprocessor_config.json"
    content = json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    file.write_text(json.dumps(content))
    args = SimpleNamespace(model=str(tmp_path / "run"), data="digits", samples=64, resize=False)
    (batch,) = _calibration(
        args, load_model(args.model), PruningConfig(targets=["d_inner"], sparsity=0.5, importance="taylor")
    )
    images = digits().train.images[:64].float() / 255
    mean, std = (torch.tensor(content[name])[:, None, None] for name in ("image_mean", "image_std"))
    torch.testing.assert_close(batch["pixel_values"], (images - mean) / std)
    for damage in (
        [],
        {**content, "image_std": [0, 0, 0]},
        {**content, "image_std": 3},
        {**content, "image_mean": [1.0]},
    ):
        file.write_text(json.dumps(damage))
        with pytest.raises(ValueError, match="preprocessor_config.json' is damaged"):
            normalisation(args.model, digits())


@pytest.mark.parametrize("name", ["m[/x]", "m[red]", "m:smile:"])
def test_names_are_printed_as_they_are(call, finished_run, tmp_path, name):
    """Rich takes brackets for markup and raised an error after the work."""
    folder = tmp_path / "work" / name
    shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("stages"))
    for argv in (
        ("inspect", name),
        ("eval", name),
        ("prune", name, f"{name}-out", "--target", "d_inner", "--sparsity", 0.5, "--round-to", 1),
    ):
        code, out, err = call(*argv)
        assert code == 0 and name in out, err


def test_eval_takes_other_data_and_fewer_images(call, finished_run, images):
    code, out, _ = call("eval", finished_run[0], "--data", images("few", list(range(10))), "--split", "train")
    assert code == 0 and "of 10 images" in out
    larger = images("larger", list(range(10)), size=10)
    code, out, _ = call("eval", finished_run[0], "--data", larger, "--resize")
    assert code == 0 and "of 10 images" in out
    code, out, _ = call("eval", finished_run[0], "--max-samples", 11, "--split", "train")
    assert code == 0 and "of 11 images" in out and "(train)" in out
    model, data = load_model(finished_run[0]), digits()  # normalised as the model was trained, on its training images
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    with torch.no_grad():
        logits = model((data.train.images[:11] / 255 - mean) / std).logits
    right = (logits.argmax(-1) == data.train.labels[:11]).float().mean().item()
    assert f"{right:.2%} of 11" in out


# ---- train, to its end ----
def test_train_leaves_a_whole_folder(finished_run):
    folder, out = finished_run
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    top = {"config.json", "model.safetensors", "README.md", "results.json", "recipe.yaml", "preprocessor_config.json"}
    code = {
        "configuration_mamba_rsst_vision.py",
        "modeling_mamba_rsst_vision.py",
        "mamba_mixer.py",
        "selective_scan.py",
    }
    assert top | code | {"figures/widths.png", "figures/training.png", "training_log.jsonl"} <= files
    for name in ("widths", "training"):
        assert Image.open(folder / "figures" / f"{name}.png").size[0] > 300
    assert not any(name.endswith((".bin", ".tmp", ".pt", ".pth")) or "checkpoint" in name for name in files)
    assert not (folder / "start").exists()


def test_train_prints_its_table(finished_run):
    folder, out = finished_run
    table = out[out.index("mamba_tiny digits rsst") :]
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "cut", "recovered"]
    for row in rows:
        line = next(line for line in table.splitlines() if line.strip().startswith(row["name"]))
        assert f"{row['accuracy']:.2%}" in line and f"{row['parameters'] / 1000:.3g}k" in line
    assert f"Saved to {folder}: the model, its card (README.md), the figures and results.json." in " ".join(
        out.split()
    )


# ---- in a process of its own ----
def shell(*argv, cwd):
    command = [sys.executable, "-m", "mamba_rsst", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_bad_input_in_a_process_of_its_own(tmp_path, ill_fitting):
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path / "run")
    before = files_below(tmp_path)
    for argv, name in (
        (("train", recipe, "pruning.sparsty=0.5"), "`pruning.sparsty` (did you mean 'sparsity'?)"),
        (("inspect", ill_fitting), "cls_token"),
    ):
        done = shell(*argv, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"mamba-rsst {argv[0]}: error: "), done.stderr
        assert name in done.stderr
    assert files_below(tmp_path) == before


def test_the_debug_variable_shows_where_it_happened(monkeypatch):
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        cli.main(["train", "absent.yaml"])


def test_ctrl_c_names_the_way_on(call, recipe, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mamba_rsst.run.run_recipe", interrupted)
    code, _, err = call("train", recipe)
    assert code == 130 and err == "\nmamba-rsst train: interrupted; go on with --resume.\n"


# ---- language models ----
@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A language model's folder with a tokenizer, and a text file."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    make("lm", num_hidden_layers=3).save_pretrained(folder / "model")
    vocabulary = {letter: i for i, letter in enumerate("_ abcdefghijklmnopqrstuvwxyz")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="_"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="_", unk_token="_").save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    with (folder / "text.jsonl").open("w") as lines:
        for i in range(40):
            lines.write(json.dumps({"text": f"a line number {i} with some words"}) + "\n")
    return folder


@pytest.mark.parametrize(
    "options, changed",
    [
        (("--target", "num_hidden_layers", "--sparsity", 0.3), {"num_hidden_layers": 2}),
        (("--target", "d_state", "--importance", "state_energy", "--sparsity", 0.4, "--round-to", 1), {}),
        (("--target", "hidden_size", "--importance", "wanda", "--sparsity", 0.5), {"hidden_size": 8}),
        (("--target", "dt_rank", "--dt-rank-method", "svd", "--sparsity", 0.4, "--round-to", 1), {}),
        (("--target", "d_inner", "--budget", "macs", "--sparsity", 0.2), {}),
        (("--target", "d_inner", "--target", "d_state", "--sparsity", "d_inner=0.5", "--sparsity", "d_state=0.2"), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("text", ["text.txt", "text.jsonl"])
def test_prune_a_language_model(call, words, options, changed, text):
    more = ("--round-to", 4) if "--round-to" not in options else ()
    looks = "--importance" in options or "num_hidden_layers" in options
    data = ("--data", words / text, "--seq-len", 16, "--samples", 8) if looks else ()
    code, out, err = call("prune", words / "model", "out", *options, *more, *data)
    assert code == 0, err
    before, after = load_model(words / "model"), load_model("out")
    assert after.num_parameters() < before.num_parameters()
    assert f"parameters {before.num_parameters():,} -> {after.num_parameters():,}" in out and "MACs" in out
    assert {name: getattr(after.config, name) for name in changed} == changed
    ids = torch.randint(50, (1, 12))
    assert torch.isfinite(after(ids).logits).all()


def test_prune_to_a_latency(call, words):
    argv = ("--target", "num_hidden_layers", "--importance", "random", "--budget", "latency", "--speedup", 1.1)
    code, out, err = call("prune", words / "model", "out", *argv, "--seq-len", 16)
    assert code == 0, err
    said = r"latency [\d.]+ ms -> [\d.]+ ms, [\d.]+ times faster, asked for 1.10 \(batch 1 of 16, float32"
    assert re.search(said, out)
    assert load_model("out").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "options, names",
    [
        (("--speedup", 1.5), ["--speedup", "--budget latency"]),
        (("--speedup", 0.5, "--budget", "latency"), ["--speedup", "0.5"]),
        (("--sparsity", "d_inner=0.5", "--sparsity", 0.3), ["TARGET=FRACTION"]),
        (("--sparsity", "d_stat=0.5"), ["d_stat", "d_inner"]),
        (("--sparsity", 0.5, "--dt-rank-method", "svd"), ["dt_rank"]),
        (("--sparsity", 0.5, "--importance", "wanda"), ["--data"]),
        (("--sparsity", 0.5, "--importance", "wanda", "--data", "./absent.txt"), ["absent.txt"]),
        (("--sparsity", 0.5, "--importance", "wanda", "--data", "TEXT", "--seq-len", 9999), ["too few", "9999"]),
        (("--sparsity", 0.5, "--importance", "wanda", "--data", "MODEL/config.json"), [".jsonl"]),
        (("--sparsity", 0.5, "--device", "abacus"), ["--device", "'abacus'"]),
        (("--speedup", 50, "--budget", "latency", "--seq-len", 16), ["98.0% of the latency", "at most"]),
    ],
    ids=str,
)
def test_prune_refuses(refused, words, options, names):
    places = {"TEXT": words / "text.txt", "MODEL/config.json": words / "model" / "config.json"}
    argv = ("--target", "d_inner", "--round-to", 2, *(places.get(word, word) for word in options))
    error = refused("prune", words / "model", "out", *argv)
    assert all(name in error for name in names), error


@pytest.mark.parametrize("command", ["convert", "export", "prune"])
def test_where_output_cannot_go_is_said_before_any_work(tmp_path, capsys, command):
    make("mamba").save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    more = ["--target", "d_inner", "--sparsity", "0.5"] if command == "prune" else []
    for out, words in (("file/x", "is a file"), ("model/x", "lies inside"), ("", "has no name")):
        before = sorted(tmp_path.rglob("*"))
        given = str(tmp_path / out) if out else out
        assert cli.main([command, str(tmp_path / "model"), given, *more]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == "" and sorted(tmp_path.rglob("*")) == before


def test_a_json_file_that_cannot_be_written_is_said_before_any_work(tmp_path, capsys):
    make("mamba").save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    assert cli.main(["inspect", str(tmp_path / "model"), "--json", str(tmp_path / "file" / "x")]) == 2
    captured = capsys.readouterr()
    assert "is a file" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "options, words",
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--samples", "8"], "for scores that look at data"),
        (["--data", "nowhere"], "for scores that look at data"),
        (["--importance", "state_energy", "--data", "x"], "'state_energy' scores d_state, not 'd_inner'"),
        (["--seed", "-1"], "`seed` must be an integer in"),
        (["--budget", "latency", "--speedup", "inf"], "--speedup must be at least 1 and finite"),
    ],
)
def test_options_of_prune_that_do_not_fit(tmp_path, capsys, options, words):
    make("mamba").save_pretrained(tmp_path / "model")
    sparsity = [] if "--speedup" in options else ["--sparsity", "0.5"]
    argv = ["prune", str(tmp_path / "model"), str(tmp_path / "out"), "--target", "d_inner", *sparsity, *options]
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [{"dtype": "float99"}, {"hidden_act": "bogus"}, {"auto_map": "x", "num_hidden_layers": "two"}],
    ids=lambda d: next(iter(d)),
)
def test_a_config_that_makes_no_sense_is_one_sentence(tmp_path, capsys, damage):
    make("mamba").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    assert cli.main(["inspect", str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mamba-rsst inspect: error: ") and captured.err.count("\n") == 1
