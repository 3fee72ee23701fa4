import json
import os
import subprocess
import sys
import time

import pytest
import torch
from tiny import Keyword, batch_of, make
from torch import nn

from mamba_rsst import PruningConfig, prune_, speed
from mamba_rsst.commands.arguments import short_names
from mamba_rsst.evaluation import weight_bytes
from mamba_rsst.report import speed_table
from mamba_rsst.speed import (
    benchmark,
    compare_latency,
    compare_throughput,
    measure_peak_memory,
    measure_throughput,
)


class Sleeper(nn.Module):
    """Takes `seconds` a forward and writes its name down."""

    def __init__(self, seconds, name="", diary=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds, self.name, self.diary = seconds, name, diary

    def forward(self, x):
        if self.diary is not None:
            self.diary.append(self.name)
        time.sleep(self.seconds)
        return x


# ---- time ----
def test_throughput_of_a_known_duration():
    timing = measure_throughput(Sleeper(0.004), {"x": torch.zeros(8, 1)}, min_seconds=0.1, min_runs=3)
    assert (timing.batch_size, timing.device) == (8, "cpu")
    assert timing.low <= timing.items_per_s <= timing.high
    assert 200 < timing.items_per_s <= 8 / 0.004  # sleeping takes at least as long as asked, on a busy box far longer


def test_comparison_takes_turns_and_orders_by_size():
    diary, inputs = [], {"x": torch.zeros(2, 1)}
    models = {name: Sleeper(0.002, name, diary) for name in "abc"}
    compare_throughput(models, inputs, rounds=3, run_seconds=1e-9, warmup=0)
    assert diary == list("abc") + list("abc") * 3  # one each to size the runs, then the rounds

    sizes = {"small": 16, "big": 1024}
    models = {name: Keyword(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)) for name, width in sizes.items()}
    timings = compare_throughput(models, {"x": torch.randn(64, 64)}, rounds=5, run_seconds=0.01)
    assert list(timings) == ["small", "big"]
    assert timings["small"].items_per_s > 1.5 * timings["big"].items_per_s


def test_nothing_to_time_is_an_error():
    inputs = {"x": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="0 models"):
        compare_throughput({}, inputs)
    with pytest.raises(ValueError, match="`rounds` = 0"):
        compare_throughput({"a": Sleeper(0)}, inputs, rounds=0)
    with pytest.raises(ValueError, match="`min_runs`"):
        measure_throughput(Sleeper(0), inputs, min_runs=0)


def test_modes_come_back_and_autocast_is_used():
    seen = []
    model = Keyword(nn.Linear(4, 4), nn.Dropout())
    model.train()
    model.layers[1].eval()
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append((module.training, output.dtype)))
    inputs = {"x": torch.randn(2, 4)}
    measure_throughput(model, inputs, min_seconds=0, min_runs=1, warmup=0, autocast_dtype=torch.bfloat16)
    compare_throughput({"a": model, "b": model}, inputs, rounds=1, run_seconds=1e-9, warmup=0)
    measure_peak_memory(model, inputs)
    assert {training for training, _ in seen} == {False}
    assert {dtype for _, dtype in seen} == {torch.bfloat16, torch.float32}
    assert [module.training for module in model.modules()] == [True, True, True, False]


# ---- memory ----
def test_peak_memory_grows_with_the_batch():
    model = Keyword(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 256))
    peaks = [measure_peak_memory(model, {"x": torch.randn(batch, 256)}) for batch in (512, 2048)]
    if None in peaks:
        pytest.skip("this system does not tell a process's peak memory")
    for peak, batch in zip(peaks, (512, 2048), strict=True):
        activations = 2 * 4 * batch * 4096  # the hidden layer before and after the ReLU live at once
        assert peak == pytest.approx(weight_bytes(model) + activations, rel=0.3)


def test_peak_memory_is_not_known_without_the_kernels_help(monkeypatch):
    monkeypatch.setattr("mamba_rsst.speed.ctypes.CDLL", lambda name: object())  # a C library without malloc_trim
    assert measure_peak_memory(Keyword(nn.Linear(2, 2)), {"x": torch.zeros(1, 2)}) is None


# ---- latency ----
def test_latency_times_single_forwards_in_turns():
    diary, inputs = [], {"x": torch.zeros(1, 1)}
    models = {name: Sleeper(0.004, name, diary) for name in "ab"}
    latencies = compare_latency(models, inputs, rounds=3, run_seconds=1e-9, warmup=0)
    assert diary == list("ab") * 4
    for latency in latencies.values():
        assert 4 <= latency.low <= latency.ms <= latency.high < 400
    assert latencies["a"].device == "cpu"


def test_items_of_an_entry_are_counted():
    model, inputs = Sleeper(0.002), {"x": torch.zeros(3, 1)}
    options = dict(rounds=1, run_seconds=1e-9, warmup=0)
    one, seven = (compare_throughput({"a": model}, inputs, items_each=n, **options)["a"] for n in (1, 7))
    assert one.batch_size == seven.batch_size == 3
    assert seven.items_per_s <= 3 * 7 / 0.002 and seven.items_per_s > one.items_per_s


# ---- all of them ----
def pair(kind):
    """(dense, cut) of one kind; the cut one is narrower in d_inner."""
    dense, cut = make(kind), make(kind)
    prune_(cut, PruningConfig(targets=["d_inner"], sparsity=0.5, round_to=1, scope="layer"))
    return {"dense": dense, "cut": cut}


@pytest.fixture
def hasty(monkeypatch):
    """Runs of one forward each."""
    for name in ("compare_throughput", "compare_latency"):
        function = getattr(speed, name)
        monkeypatch.setattr(speed, name, lambda *a, function=function, **k: function(*a, run_seconds=1e-4, **k))


IMAGES = ["images/s", "peak memory, bytes", "latency, ms"]
TEXT = ["prefill, tokens/s", "decode, tokens/s", "peak memory, bytes", "prefill, ms", "decode, ms a token"]


@pytest.mark.parametrize(("kind", "measures"), [("v2", IMAGES), ("mamba", TEXT), ("falcon_mamba", TEXT)])
def test_every_measure_of_every_model(kind, measures, hasty):
    models = pair(kind)
    rows = benchmark(models, batch_sizes=[3, 5], seq_len=7, rounds=2)
    last = -len(IMAGES[2:]) if kind == "v2" else -len(TEXT[3:])
    expected = [(measure, batch) for batch in (3, 5) for measure in measures[:last]]
    expected = [(*place, name) for place in expected + [(m, 1) for m in measures[last:]] for name in models]
    assert [(row["measure"], row["batch_size"], row["model"]) for row in rows] == expected
    for dense, cut in zip(rows[::2], rows[1::2], strict=True):
        if dense["value"] is None:
            continue  # peak memory, on a system that does not tell
        assert dense["times_better"] == 1
        less_is_better = not dense["measure"].endswith("/s")
        ratio = dense["value"] / cut["value"]
        assert cut["times_better"] == pytest.approx(ratio if less_is_better else 1 / ratio)
        for row in (dense, cut):
            if row["low"] is not None:
                assert 0 < row["low"] <= row["value"] <= row["high"]
    models["cut"](**batch_of(models["cut"])).loss.backward()  # nothing of inference mode is left in it


def test_prefill_counts_tokens_and_decoding_keeps_its_state(hasty):
    model = make("mamba")
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    benchmark({"a": model}, batch_sizes=[3], seq_len=7, rounds=1)
    name = speed.cache_name(model)
    prompts = [kwargs for kwargs in seen if name not in kwargs]
    steps = [kwargs for kwargs in seen if name in kwargs]
    assert {tuple(kwargs["input_ids"].shape) for kwargs in prompts} == {(3, 7), (1, 7)}
    assert {tuple(kwargs["input_ids"].shape) for kwargs in steps} == {(3, 1), (1, 1)}
    assert all(kwargs["use_cache"] for kwargs in seen)
    assert all(kwargs["logits_to_keep"] == 1 for kwargs in prompts)


class Odd(nn.Module):
    """A language model without a cache, or one whose memory or compilation fails."""

    main_input_name = "input_ids"

    def __init__(self, error=None):
        super().__init__()
        self.config = make("mamba").config
        self.embedding, self.error = nn.Embedding(53, 4), error

    def forward(self, input_ids):
        if self.error is not None:
            raise self.error
        return self.embedding(input_ids)


def test_a_model_without_a_cache_is_not_decoded(hasty):
    rows = benchmark({"a": Odd()}, batch_sizes=[2], seq_len=5, rounds=1)
    assert [row["measure"] for row in rows] == ["prefill, tokens/s", "peak memory, bytes", "prefill, ms"]


def test_default_batch_sizes():
    assert speed.default_batch_size(make("v2")) == 64
    assert speed.default_batch_size(make("mamba")) == 4


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "no models"),
        ({"a": "v2", "b": "mamba"}, {}, "different kinds.*'a' takes images of 3x12x12, 'b' takes tokens of"),
        ({"a": "v2"}, {"batch_sizes": [4, 0]}, "batch size must be at least 1, got 0"),
        ({"a": "v2"}, {"seq_len": 0}, "sequence length must be at least 1, got 0"),
        ({"a": "v2"}, {"rounds": 0}, "rounds must be at least 1"),
        ({"a": "v2"}, {"graph": True}, "needs a CUDA device"),
        ({"a": "v2"}, {"batch_sizes": [10**12]}, "batch of 1000000000000 does not fit"),
    ],
)
def test_what_cannot_be_measured(models, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark({name: make(kind) for name, kind in models.items()}, **options)


def test_images_of_other_sizes_are_another_kind():
    with pytest.raises(ValueError, match="'b' takes images of 3x16x16"):
        benchmark({"a": make("v2"), "b": make("v2", image_size=16)})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory")])
def test_the_batch_that_does_not_fit_is_named(error):
    with pytest.raises(speed.OutOfMemory, match="batch of 6 does not fit"):
        benchmark({"a": Odd(error)}, batch_sizes=[6])


def test_other_failures_are_not_dressed_up():
    with pytest.raises(RuntimeError, match="a bug of ours"):
        benchmark({"a": Odd(RuntimeError("a bug of ours"))}, batch_sizes=[6])


def test_what_cannot_be_compiled_is_said(monkeypatch):
    monkeypatch.setattr(speed, "compile_blocks_", lambda model: None)
    with pytest.raises(ValueError, match="cannot be compiled: graph break"):
        benchmark({"a": Odd(RuntimeError("graph break"))}, batch_sizes=[6], compiled=True)


# ---- the table ----
def test_the_table_names_the_run_and_compares():
    rows = [
        {"measure": m, "batch_size": b, "model": name, "value": v, "low": low, "high": h, "times_better": t}
        for m, b, name, v, low, h, t in [
            ("images/s", 64, "d", 1000.0, 990.0, 1010.0, 1.0),
            ("images/s", 64, "c", 2500.0, 2400.0, 2600.0, 2.5),
            ("peak memory, bytes", 64, "d", 3 * 2**20, None, None, 1.0),
            ("peak memory, bytes", 64, "c", None, None, None, None),
            ("latency, ms", 1, "d", 12.5, 12.25, 13.0, 1.0),
            ("latency, ms", 1, "c", 10.0, 9.5, 10.5, 1.25),
        ]
    ]
    results = {
        "models": [{"name": "d", "path": "a/d", "parameters": 3000}, {"name": "c", "path": "c", "parameters": 1000}],
        "dtype": "bfloat16 autocast",
        "compiled": True,
        "seq_len": None,
        "rounds": 3,
        "versions": {"torch": "1.2.3"},
    }
    table = speed_table(results, {"name": "some GPU", "graph": True, "rows": rows})
    assert table.title == "c against d on some GPU\nbfloat16 autocast, compiled blocks, CUDA graph; torch 1.2.3"
    assert [column.header for column in table.columns] == ["", "Batch", "d", "c", "Speed-up"]
    assert list(zip(*(column.cells for column in table.columns))) == [
        ("parameters", "", "3,000", "1,000", "3.00× fewer"),
        ("images/s", "64", "1,000 (990–1,010)", "2,500 (2,400–2,600)", "2.50×"),
        ("peak memory", "64", "3.0 MiB", "n/a", "–"),
        ("latency, ms", "1", "12.50 (12.25–13.00)", "10.00 (9.50–10.50)", "1.25×"),
    ]
    alone = results | {"models": results["models"][:1], "seq_len": 7, "compiled": False}
    table = speed_table(alone, {"name": "cpu", "graph": False, "rows": rows[::2]})
    assert table.title == "d on cpu\nbfloat16 autocast, prompt of 7 tokens; torch 1.2.3"
    assert len(table.columns) == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/stages/0-train/model", "runs/a"], ["0-train", "a"]),
        (["x/a", "y/a"], ["x/a", "y/a"]),
        (["org/name"], ["name"]),
    ],
)
def test_names_in_the_table_are_short_but_differ(paths, names):
    assert short_names(paths) == dict(zip(names, paths))


# ---- the command, in a process of its own ----
def bench(*argv, cwd):
    command = [sys.executable, "-m", "mamba_rsst", "bench", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with image classifiers `dense` and `cut`, and a language model `words`."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in {**pair("v2"), "words": make("mamba")}.items():
        model.save_pretrained(folder / name)
    return folder


def test_the_command_compares_two_saved_models(saved, tmp_path):
    argv = ("cut", "--against", "dense", "--batch-size", 3, 7, "--rounds", 2, "--device", "cpu")
    done = bench(*argv, "--json", tmp_path / "new" / "figures.json", cwd=saved)
    assert done.returncode == 0, done.stderr
    assert "cut against dense on cpu, 1 threads" in done.stdout and f"torch {torch.__version__}" in done.stdout
    results = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figures.json"]
    assert [(model["name"], model["path"]) for model in results["models"]] == [("dense", "dense"), ("cut", "cut")]
    (device,) = results["devices"]
    assert [row["batch_size"] for row in device["rows"][::2]] == [3, 3, 7, 7, 1]
    for row in device["rows"][1::2]:
        if row["times_better"]:
            assert f"{row['times_better']:.2f}×" in done.stdout
    for row in device["rows"][:2]:
        digits = 0 if row["value"] >= 1000 else 1 if row["value"] >= 100 else 2  # a busy machine is slow
        assert f"{row['value']:,.{digits}f} " in done.stdout


def test_the_command_measures_a_language_model(saved):
    done = bench("words", "--seq-len", 5, "--batch-size", 2, "--rounds", 1, "--dtype", "bfloat16", cwd=saved)
    assert done.returncode == 0, done.stderr
    assert "bfloat16, prompt of 5 tokens" in done.stdout and "decode, tokens/s" in done.stdout
    assert "Speed-up" not in done.stdout


def test_the_command_says_what_does_not_fit(saved, tmp_path):
    done = bench("dense", "--batch-size", 10**12, "--json", tmp_path / "figures.json", "--device", "cpu", cwd=saved)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    expected = "A batch of 1000000000000 does not fit into memory; choose a smaller one."
    assert done.stderr == f"mamba-rsst bench: error: {expected}\n"
