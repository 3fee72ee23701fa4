import ast
import io
import math
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from mamba_rsst import evaluation, figures, report, speed
from mamba_rsst.card import model_card
from mamba_rsst.figures import plot_training, plot_widths
from mamba_rsst.report import (
    human,
    print_results,
    results_markdown,
    results_table,
    widths_table,
    write_atomic,
)


DENSE = {
    "name": "dense",
    "accuracy": 0.9,
    "parameters": 2_000_000,
    "macs": 400_000_000,
    "images_per_s": 1000.0,
    "images_per_s_low": 950.0,
    "images_per_s_high": 1100.0,
    "peak_memory": 100 * 2**20,
}
CUT = {
    "name": "cut",
    "accuracy": 0.8125,
    "parameters": 500_000,
    "macs": 120_000_000,
    "images_per_s": 2500.0,
    "images_per_s_low": 2400.0,
    "images_per_s_high": 2600.0,
    "peak_memory": None,
}
RECOVERED = {"name": "recovered", "accuracy": 0.8876, "parameters": 500_000}


def results(*rows, **changes):
    base = {
        "task": "image-classification",
        "method": "rsst",
        "model": "tiny",
        "dataset": "some-org/some-images",
        "seed": 3,
        "rows": list(rows),
        "widths": {"d_inner": {"dense": [46, 46, 46], "kept": [46, 10, 3]}},
        "channel_sparsity": {"d_inner": 0.573},
        "param_reduction": 0.75,
        "batch_size": 64,
        "device": "cpu",
        "versions": {"torch": "1.2.3", "cuda": None},
        "seconds": 90.0,
    }
    return base | changes


def rendered(table, width=140):
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


# ---- tables ----
@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.7, "1k"), (1234, "1.23k"), (1_234_567, "1.23M"), (4e9, "4G"), (4.56e12, "4.56T")],
)
def test_human(number, text):
    assert human(number) == text


def test_results_in_markdown():
    lines = results_markdown(results(DENSE, CUT, RECOVERED)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert {len(line) for line in cells} == {6}
    assert cells[2] == ["dense", "90.00%", "2M", "400M", "1,000 (950–1,100)", "100.0 MiB"]
    assert cells[3] == ["cut", "81.25% (-8.75)", "500k (25.0%)", "120M (30.0%)", "2,500 (2.50×, 2,400–2,600)", "n/a"]
    assert cells[4] == ["recovered", "88.76% (-1.24)", "500k (25.0%)", "–", "–", "–"]
    assert "batch 64, on cpu" in lines[-1]


@pytest.mark.parametrize("width", [80, 140])
def test_results_of_a_language_model(width):
    dense = {"name": "dense", "perplexity": 20.0, "parameters": 2_000_000, "macs": 4_000_000}
    dense |= {"tokens_per_s": 123456.0, "tokens_per_s_low": 101234.0, "tokens_per_s_high": 134567.0}
    cut = {**dense, "name": "cut", "perplexity": 25.5, "tokens_per_s": 246912.0, "peak_memory": 3 * 2**20}
    record = results(dense, cut, task="causal-lm", seq_len=256)
    lines = results_markdown(record).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == ["Model", "Perplexity", "Params", "MACs / token", "Tokens / s", "Peak memory"]
    assert cells[2] == ["dense", "20.00", "2M", "4M", "123k (101k–135k)", "–"]
    assert cells[3][1] == "25.50 (+27.5%)" and cells[3][4] == "247k (2.00×, 101k–135k)"
    assert "batch 64 of 256 tokens" in lines[-1] and "held out" in lines[-1] and "points" not in lines[-1]
    text = rendered(results_table(record), width)
    assert "Perplexity" in text and "247k (2.00×, 101k–135k)" in text and "…" not in text
    answers = results({**dense, "accuracy": 0.975}, task="causal-lm")
    assert "97.50%" in results_markdown(answers) and "Perplexity" not in results_markdown(answers)


def test_results_without_a_dense_row_are_not_compared():
    assert "| cut | 81.25% | 500k | 120M | 2,500 (2,400–2,600) | n/a |" in results_markdown(results(CUT))


@pytest.mark.parametrize("width", [80, 140])
def test_printed_results_keep_every_number_whole(width):
    stream = io.StringIO()
    print_results(results(DENSE, CUT, RECOVERED), Console(file=stream, width=width))
    text = stream.getvalue()
    for whole in (
        "recovered",
        "Accuracy",
        "81.25%",
        "(-8.75)",
        "(25.0%)",
        "(30.0%)",
        "2,500 (2.50×, 2,400–2,600)",
        "n/a",
    ):
        assert whole in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert results_table(results(DENSE)).row_count == 1


def test_widths_table_totals_each_target():
    rows = [
        {"layer": 0, "target": "d_inner", "before": 46, "after": 46},
        {"layer": 1, "target": "d_inner", "before": 46, "after": 23},
        {"layer": 0, "target": "intermediate_size", "before": 2000, "after": 500},
        {"layer": 1, "target": "intermediate_size", "before": 0, "after": 0},
    ]
    table = widths_table(rows)
    lines = [line.replace("│", " ").split() for line in rendered(table).splitlines()]
    assert table.row_count == 6
    assert ["1", "d_inner", "46", "23", "50.0%"] in lines
    assert ["1", "intermediate_size", "0", "0", "–"] in lines
    assert ["total", "d_inner", "92", "69", "25.0%"] in lines
    assert ["total", "intermediate_size", "2,000", "500", "75.0%"] in lines
    with pytest.raises(ValueError, match="nothing would be pruned"):
        widths_table([])


# ---- figures ----
def history(stages, *, epochs=2, steps=5, penalty=True, accuracy=True):
    entries = []
    for number, stage in enumerate(stages):
        for step in range(epochs * steps):
            epoch = number * epochs + (step + 1) / steps
            entry = {"stage": stage, "epoch": epoch, "step": int(steps * epoch), "loss": 2 / epoch}
            if penalty and stage.startswith("rsst"):
                entry |= {"lambda": 1e-3 * step**2, "leaving_share": 0.5 * math.exp(-step)}
            entries.append(entry)
            if accuracy and (step + 1) % steps == 0:
                entries.append({"stage": stage, "epoch": epoch, "eval_accuracy": 1 - 1 / (1 + epoch)})
    return [*entries, {"train_runtime": 1.0}]


def decoded(path, size):
    """The picture is whole, of this size in inches at 150 dpi, and shows something."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == tuple(round(150 * side) for side in size)
        colours = image.convert("RGB").getcolors(2**24)
    assert len(colours) > 20
    return {colour for _, colour in colours}


@pytest.mark.parametrize("layers", [1, 2, 17, 24, 64])
def test_plot_widths(layers, tmp_path):
    kept = [(7 * layer) % 46 for layer in range(layers)]  # the first layer keeps none
    both = {"dense": [46] * layers, "kept": kept}
    path = plot_widths(
        {"d_inner": both, "intermediate_size": {"dense": [100] * layers, "kept": [100] * layers}}, tmp_path / "w.png"
    )
    assert (0, 0x72, 0xB2) in decoded(path, (min(max(3 + 0.42 * layers, 6), 11), 5.7))


def test_plot_widths_leaves_out_what_the_model_has_not(tmp_path):
    widths = {"d_inner": {"dense": [46], "kept": [23]}, "intermediate_size": {"dense": [0], "kept": [0]}}
    decoded(plot_widths(widths, tmp_path / "w.png"), (6, 3.1))
    with pytest.raises(ValueError, match="no widths to plot"):
        plot_widths({"intermediate_size": widths["intermediate_size"]}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="d_inner: 2 dense widths but 1 kept"):
        plot_widths({"d_inner": {"dense": [46, 46], "kept": [23]}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


ROUNDS = ["train", *(f"{kind}-{number}" for number in range(1, 25) for kind in ("rsst", "recover"))]


@pytest.mark.parametrize(
    ("entries", "height"),
    [
        (history(["train", "rsst-1", "recover-1"]), 6.6),
        (history(["train", "rsst-1"], accuracy=False), 6.6),
        (history(["train"]), 4.2),
        (history(["train"], accuracy=False, epochs=1, steps=1), 4.2),
        (history(ROUNDS), 6.6),
        (history(["search-1"], steps=1), 4.2),
        ([{"epoch": 1, "eval_accuracy": 0.5}], 4.2),
        ([{"epoch": 1, "lambda": 0.0, "stage": "rsst-1"}, {"epoch": 2, "lambda": 0.0, "stage": "rsst-1"}], 4.2),
    ],
    ids=["rsst", "no-eval", "baseline", "one-point", "49-stages", "other-stage", "no-stage", "lambda-zero"],
)
def test_plot_training(entries, height, tmp_path):
    decoded(plot_training(entries, tmp_path / "training.png"), (10, height))


def test_plot_training_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training([{"epoch": 1, "learning_rate": 1e-3}], tmp_path / "training.png")


@pytest.mark.parametrize("module", [evaluation, figures, report, speed])
def test_drawing_and_printing_libraries_are_imported_late(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    text = " ".join(ast.unparse(node) for node in imports)
    assert imports and not {"matplotlib", "rich", "huggingface_hub"} & set(text.replace(".", " ").split())


# ---- files ----
def test_write_atomic(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "new" / "file.txt", "först\n")
    assert path.read_bytes() == "först\n".encode()
    assert write_atomic(str(path), b"\x00\xff").read_bytes() == b"\x00\xff"

    def fail(*names):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "half")
    assert path.read_bytes() == b"\x00\xff"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


# ---- model card ----
RECIPE = "model: tiny\npruning:\n  sparsity: 0.7\n"


def test_card_of_a_pruned_model():
    record = results(DENSE, CUT, RECOVERED)
    card = ModelCard(model_card(record, RECIPE, base_model="org/base", repo_hint="me/small"))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert set(card.data.tags) == {"mamba", "vision", "pruning", "mamba_rsst"}
    assert (card.data.datasets, card.data.base_model) == ("some-org/some-images", "org/base")
    (measured,) = card.data.eval_results
    assert (measured.metric_type, measured.metric_value) == ("accuracy", 0.8876)
    assert (measured.dataset_name, measured.task_type) == ("some-images", "image-classification")
    assert card.data.model_name == "small"
    for part in (
        results_markdown(record),
        RECIPE.strip(),
        "figures/widths.png",
        "figures/training.png",
        'model="me/small", trust_remote_code=True',
        "import mamba_rsst",
        "(`d_inner`): 57.3% removed",
        "parameters: 75.0% fewer",
        "Seed 3, 1.5 minutes, with torch 1.2.3",
        "2312.00752",
        "2401.09417",
        "2202.04736",
    ):
        assert part in card.text


def test_card_of_masked_weights_claims_nothing_smaller():
    text = model_card(results(DENSE, DENSE | {"name": "masked"}, widths={}, method="unstructured"), RECIPE)
    assert "Single weights of it are zero" in text and "as large as" in text
    assert "smaller" not in text.split("## How to use it")[0] and "whole channels" not in text


def test_card_of_a_baseline_claims_no_pruning():
    card = ModelCard(model_card(results(DENSE, widths={}, method="dense"), RECIPE))
    assert "pruning" not in card.data.tags
    assert "no channel was removed" in card.text
    assert "widths.png" not in card.text
    assert "smaller" not in card.text
    assert "training.png" in card.text
    assert "figures/" not in model_card(results(DENSE, widths={}, trained=False), RECIPE)


@pytest.mark.parametrize(
    ("dataset", "hub_id"),
    [
        ("cifar10", "cifar10"),
        ("org/name", "org/name"),
        ("/data/private/pets", None),
        ("./pets", None),
        ("a/b/pets", None),
        ("digits", None),
    ],
)
def test_card_names_hub_datasets_and_hides_folders(dataset, hub_id):
    text = model_card(results(CUT, dataset=dataset), RECIPE, base_model="/home/someone/model")
    card = ModelCard(text)
    assert (card.data.datasets, card.data.base_model) == (hub_id, None)
    assert card.data.eval_results[0].dataset_name == dataset.split("/")[-1]
    assert "/home/someone" not in text and "/data/private" not in text


def test_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ModelCard(model_card(results(CUT, dataset="pets"), RECIPE)).data.datasets is None


def test_card_without_accuracy_claims_none():
    card = ModelCard(model_card(results({"name": "cut", "parameters": 5}), RECIPE))
    assert card.data.eval_results is None
    assert "| cut | – | 5 | – | – | – |" in card.text
