"""`mamba-rsst report`: what stands on the page, that it stands in the files, and that the page needs nothing else."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import make_trainer

from mamba_rsst import figures
from mamba_rsst.cli import main
from mamba_rsst.html_report import read_runs, report_page, write_report
from mamba_rsst.recipe import load_recipe
from mamba_rsst.report import cells_of
from mamba_rsst.saved_run import read_run


# ---- runs by hand: every number on their pages is one that stands here ----
ROWS = [
    {"name": "dense", "accuracy": 0.8125, "parameters": 26100, "macs": 457_000, "peak_memory": 17 * 2**20},
    {"name": "cut", "accuracy": 0.5625, "parameters": 7830, "macs": 137_100, "peak_memory": 11 * 2**20},
    {"name": "recovered", "accuracy": 0.78125, "parameters": 7830, "macs": 137_100, "peak_memory": None},
]
SPEEDS = [(1588.0, 1307.0, 1602.0), (2931.0, 2104.0, 2978.0), (3176.0, 2620.0, 3335.0)]
KEYS = ("images_per_s", "images_per_s_low", "images_per_s_high")
RESULTS = {
    "task": "image-classification",
    "method": "rsst",
    "model": "mamba_tiny",
    "dataset": "some/where/pets",
    "seed": 43,
    "allocation": "scores",
    "rows": [row | dict(zip(KEYS, speeds)) for row, speeds in zip(ROWS, SPEEDS)],
    "batch_size": 72,
    "device": "a machine",
    "versions": {"python": "3.77", "torch": "9.9"},
    "seconds": 79.5,
    "widths": {"d_inner": {"dense": [6, 6], "kept": [2, 4]}, "intermediate_size": {"dense": [10], "kept": [3]}},
    "channel_sparsity": {"d_inner": 0.5, "intermediate_size": 0.7},
}
HISTORY = [
    {"stage": "train", "step": 5, "epoch": 1.0, "loss": 2.5, "eval_accuracy": 0.8125},
    {"stage": "rsst-1", "step": 8, "epoch": 1.6, "loss": 1.5, "lambda": 0.01, "leaving_share": 0.9},
    {"stage": "rsst-1", "step": 10, "epoch": 2.0, "loss": 1.375, "lambda": 40.0, "leaving_share": 0.00123},
    {"stage": "recover-1", "step": 15, "epoch": 3.0, "loss": 0.875},
    {"stage": "recover-1", "step": 15, "epoch": 3.0, "eval_accuracy": 0.78125},
]
STATE = {
    "stages": ["train", "rsst-1", "recover-1"],
    "settings": {"method": "rsst", "seed": 43},
    "done": 3,
    "history": HISTORY,
    "metrics": {
        "train": {"end": {"eval_accuracy": 0.8125}},
        "rsst-1": {
            "before_cut": {"eval_accuracy": 0.59375},
            "after_cut": {"eval_accuracy": 0.5625},
            "end": {"eval_accuracy": 0.5625},
        },
        "recover-1": {"end": {"eval_accuracy": 0.78125}},
    },
    "dense_widths": {"layers.0.mixer:d_inner": 6, "layers.1.mixer:d_inner": 6, "layers.0.mlp:intermediate_size": 10},
    "steps": 15,
    "epochs": 3.0,
    "seconds": 79.5,
    "spent": {
        "train": {"epochs": 1.0, "steps": 5, "seconds": 31.5},
        "rsst-1": {"epochs": 1.0, "steps": 5, "seconds": 28.25},
    },
}
RECIPE = {
    "task": "image-classification",
    "model": {"preset": "mamba_tiny"},
    "data": {"path": "some/where/pets"},
    "pruning": {"targets": ["d_inner", "intermediate_size"], "importance": "taylor", "normalization": "mean"},
    "training": {"method": "rsst", "seed": 43},
}
MASKS = {
    "layers.0.mixer:d_inner": [1, 0, 0, 0, 1, 0],
    "layers.1.mixer:d_inner": [1, 1, 0, 1, 1, 0],
    "layers.0.mlp:intermediate_size": [1, 0, 0, 0, 1, 0, 0, 0, 1, 0],
}


def write_scores(folder, moments=("before", "after"), masks=MASKS):
    stage = folder / "stages" / "1-rsst-1"
    stage.mkdir(parents=True, exist_ok=True)
    masks = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()}
    save_file(masks, stage / "masks.safetensors")
    scores = {f"before:{name}": 1.0 + torch.arange(len(mask)) for name, mask in masks.items()}
    scores |= {f"after:{name}": torch.where(mask, 2.0, 1e-6) for name, mask in masks.items()}
    save_file({k: v for k, v in scores.items() if k.partition(":")[0] in moments}, stage / "scores.safetensors")


def write_run(folder, results=RESULTS, state=STATE, recipe=RECIPE, history=HISTORY):
    folder.mkdir(parents=True)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if state is not None:
        (folder / "rsst_state.json").write_text(json.dumps(state))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    return folder


def language(folder, **changes):
    rows = [
        {"name": "dense", "perplexity": 20.0, "parameters": 3000, "macs": 4000, "tokens_per_s": 5000.0},
        {"name": "recovered", "perplexity": 25.5, "parameters": 1500, "macs": 2000, "tokens_per_s": 10_000.0},
    ]
    results = {"task": "causal-lm", "method": "refill", "allocation": "scores", "model": "nano", "dataset": "films"}
    history = [{"stage": "train", "step": 1, "epoch": 1.0, "loss": 3.0, "eval_perplexity": 20.0}]
    state = {"stages": ["train"], "done": 1, "metrics": {"train": {"end": {"eval_perplexity": 20.0}}}}
    recipe = {"task": "causal-lm", "training": {"method": "refill"}}
    return write_run(folder, {**results, "rows": rows, **changes}, state, recipe, history)


def read_page(*folders):
    return Page(report_page(read_runs(folders)))


class Page(HTMLParser):
    """The page taken apart; fails on elements that are not closed in order."""

    VOID = {"meta", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__()
        self.source, self.elements, self.texts, self._open = text, [], [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> in {self._open}"
        self._open.pop()

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append((tuple(self._open), data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, without=("details",)):
        return " ".join("".join(t for path, t in self.texts if not set(without) & set(path)).split())

    def check(self):
        """What every page keeps to: nothing from outside, nothing that runs, names for all that is not text."""
        assert self.source.startswith("<!DOCTYPE html>\n<html lang=")
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in self.elements}
        ids = [a["id"] for _, a in self.elements if "id" in a]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.elements:
            assert not any(name.startswith("on") or name in ("srcset", "style", "poster") for name in attributes)
            if "src" in attributes:
                assert attributes["src"].startswith("data:image/svg+xml;base64,")
                assert len(attributes["alt"]) > 20
            if "href" in attributes:
                assert attributes["href"].startswith("#") and attributes["href"][1:] in ids
            if tag == "th":
                assert attributes["scope"] in ("row", "col")
        assert len(self.all("caption")) == len(self.all("table"))
        assert "url(" not in self.source and "@import" not in self.source
        headings = [int(tag[1]) for tag, _ in self.elements if re.fullmatch(r"h\d", tag)]
        assert headings[0] == 1 and headings.count(1) == 1
        assert all(b - a <= 1 for a, b in zip(headings, headings[1:]))
        return self


# ---- one run ----
def test_every_number_on_the_page_comes_from_the_files(tmp_path):
    write_scores(write_run(tmp_path / "one"))
    page = read_page(tmp_path / "one").check()
    text = page.text(without=("details", "footer", "pre"))
    assert (
        "RSST removed 50.0% of the channels of the state-space layers (d_inner) and 70.0% of the neurons of the MLPs "
        "(intermediate_size) from mamba_tiny on pets: accuracy went from 81.25% to 78.12% (-3.12 points), with 70.0% "
        "fewer parameters, 70.0% fewer multiply-accumulates and 2.00 times the images a second."
    ) in text
    for row in RESULTS["rows"]:
        for cell in cells_of(row, RESULTS):
            assert cell in text
    for stage in (
        "train 1 5 31.5 – – 81.25%",
        "rsst-1 1 5 28.2 59.38% 56.25% 56.25%",
        "recover-1 – – – – – 78.12%",
    ):
        assert stage in re.sub(r"\s+", " ", text)
    assert "Score: taylor, divided by the mean of its layer" in text
    assert "Channels by score in stage rsst-1: d_inner, 6 kept and 6 leaving; intermediate_size, 3 kept and 7" in text
    assert "Last logged: loss 0.875, accuracy 78.12%, share of the leaving channels 0.00123." in text
    # And no others: nothing is counted or made up on the way.
    known = "50.0 70.0 2.00 3.12 81.25 78.12 56.25 59.38 25.00 26.1 7.83 30.0 457 137 1,588 2,931 3,176 1,307 1,602 "
    known += "2,104 2,978 2,620 3,335 1.85 64.7 17.0 11.0 72 43 3.77 9.9 79.5 1 5 31.5 28.2 6 12 3 10 7 0.875 0.00123"
    known += " 1 8"  # of 1e-8
    assert set(re.findall(r"\d[\d,.]*\d|\d", text)) <= set(known.split())
    alt = next(a["alt"] for a in page.all("img"))
    assert "d_inner 6 of 12, intermediate_size 3 of 10" in alt and "d_inner: 2, 4; intermediate_size: 3" in alt


def test_a_run_of_the_command_line(finished_run):
    folder, _ = finished_run
    page, run = read_page(folder).check(), read_run(folder)
    results, state = (json.loads((folder / name).read_text()) for name in ("results.json", "rsst_state.json"))
    text, everything = page.text(), page.text(without=())
    for row in results["rows"]:
        assert all(cell in text for cell in cells_of(row, results))
    assert [(s["epochs"], s["steps"]) for s in state["spent"].values()] == [(12, 36), (4, 12), (4, 12)]
    assert sum(s["seconds"] for s in state["spent"].values()) == pytest.approx(state["seconds"])
    for stage, spent in state["spent"].items():
        assert f"{stage} {spent['epochs']:.4g} {spent['steps']} {spent['seconds']:,.1f} " in text
    assert " ".join((folder / "recipe.yaml").read_text().split()) in everything
    assert f"mamba-rsst train {folder}/recipe.yaml training.output_dir={folder}-again" in text
    again = load_recipe(folder / "recipe.yaml", [f"training.output_dir={folder}-again"])
    assert again.training == load_recipe(folder / "recipe.yaml").training | {"output_dir": f"{folder}-again"}
    assert len(run.history) == len((folder / "training_log.jsonl").read_text().splitlines())
    assert page.source == report_page(read_runs([folder]))  # the same run, the same page
    assert "not finished" not in text


def test_a_dense_run_claims_no_pruning(tmp_path):
    results = RESULTS | {"method": "dense", "rows": RESULTS["rows"][:1]}
    for key in ("widths", "channel_sparsity", "allocation"):
        results.pop(key)
    state = STATE | {"stages": ["train"], "done": 1, "dense_widths": {}}
    folder = write_run(tmp_path / "dense", results, state, RECIPE | {"pruning": None}, HISTORY[:1])
    text = read_page(folder).check().text()
    assert "mamba_tiny on pets was trained without pruning: accuracy 81.25%." in text
    assert "A run that prunes nothing scores no channels." in text
    assert "Channels kept" not in text and "removed" not in text and "against dense ×" not in text


def test_methods_that_cut_no_channels(tmp_path):
    results = {key: value for key, value in RESULTS.items() if key not in ("widths", "channel_sparsity")}
    masked = RESULTS["rows"][0] | {"name": "masked", "accuracy": 0.75, "images_per_s": 1588.0 * 1.25}
    masked = results | {"method": "unstructured", "weight_sparsity": 0.625, "rows": [RESULTS["rows"][0], masked]}
    text = read_page(write_run(tmp_path / "masked", masked)).check().text()
    assert "Unstructured masks removed 62.5% of the weights that may be masked from mamba_tiny on pets" in text
    assert "(-6.25 points), with 1.25 times the images a second. The network was trained, and the smallest" in text
    full = {"parameters": 52200, "macs": 914_000, "images_per_s": 794.0}
    small = results | {"method": "scratch", "rows": RESULTS["rows"][:1], "full_size": full}
    text = read_page(write_run(tmp_path / "small", small)).check().text()
    assert "was trained from new weights at a smaller size: accuracy 81.25%, with 50.0% fewer parameters, " in text
    assert "50.0% fewer multiply-accumulates and 2.00 times the images a second." in text
    assert "Params 26.1k 50.0% of full size" in text and "against full size" not in text


def test_a_language_model(tmp_path):
    text = read_page(language(tmp_path / "lm")).check().text()
    assert "Pruning by scores of nano on films: perplexity went from 20.00 to 25.50 (+27.5%)" in text
    assert "2.00 times the tokens a second" in text and "Perplexity at the end" in text and "points" not in text
    assert "No scores were kept." in text


def test_a_finished_run_without_its_state(tmp_path):
    """As the Hub holds it."""
    text = read_page(write_run(tmp_path / "hub", state=None)).check().text()
    assert "This folder holds no rsst_state.json" in text and "78.12%" in text


def test_everything_from_files_is_escaped(tmp_path):
    evil = "<script>alert('x')</script><img src=\"http://x\" onerror='y'>&amp;\"'"
    results = copy.deepcopy(RESULTS) | {"model": evil, "dataset": evil, "device": evil, "versions": {evil: evil}}
    results |= {"method": evil, "seed": evil, "channel_sparsity": {evil: 0.5}, "batch_size": evil}
    results["widths"] = {evil: results["widths"]["d_inner"]}
    results["rows"][1]["name"] = evil
    state = copy.deepcopy(STATE)
    state["stages"][1] = evil
    recipe = copy.deepcopy(RECIPE)
    recipe["pruning"]["importance"] = recipe["model"]["preset"] = evil
    history = [entry | {"stage": evil} for entry in HISTORY]
    masks = {f"x:{evil.replace('/', '|')}": [1, 0]}
    for name in ("<b>one", "two"):
        write_scores(write_run(tmp_path / name, results, state, recipe, history), masks=masks)
    for folders in ([tmp_path / "<b>one"], [tmp_path / "<b>one", tmp_path / "two"]):
        page = read_page(*folders).check()
        assert "b" not in [tag for tag, _ in page.elements if tag != "b"]
        assert evil in page.text() and "<b>one" in page.text()
        assert all(a["src"].startswith("data:") for a in page.all("img"))
    assert "1. <b>one" in page.text()


# ---- scores ----
@pytest.mark.parametrize("normalization", ["mean", "max", "none"])
def test_scores_are_divided_as_in_the_selection(tmp_path, normalization):
    recipe = RECIPE | {"pruning": RECIPE["pruning"] | {"normalization": normalization}}
    write_scores(write_run(tmp_path / "run", recipe=recipe), moments=("before",))
    scores = read_run(tmp_path / "run").scores["rsst-1"]
    scale = {"mean": (3.5, 5.5), "max": (6, 10), "none": (1, 1)}[normalization]
    kept, leaving = scores["d_inner"]["before"]  # of both layers
    np.testing.assert_allclose(kept, np.array([1, 5, 1, 2, 4, 5]) / scale[0])
    np.testing.assert_allclose(leaving, np.array([2, 3, 4, 6, 3, 6]) / scale[0])
    np.testing.assert_allclose(scores["intermediate_size"]["before"][0], np.array([1, 5, 9]) / scale[1])
    assert list(scores["d_inner"]) == ["before"]
    read_page(tmp_path / "run").check()


@pytest.mark.parametrize(
    ("values", "low", "high", "logarithmic"),
    [
        ([0.5, 1.0, 2.0], 0.5, 2.0, False),
        ([0.0, 1e-3, 1.0], 1e-3, 1.0, True),
        ([1e-20, 1.0], 1e-8, 1.0, True),
        ([-1.0, 1e-6, 1.0], -1.0, 1.0, False),
        ([0.0, 0.0], 0.0, 1.0, False),
        ([3.0], 3.0, 4.0, False),
    ],
)
def test_bins_hold_every_score(values, low, high, logarithmic):
    edges, spaced = figures._bins(np.array(values))
    assert (edges[0], edges[-1], spaced) == (pytest.approx(low), pytest.approx(high), logarithmic)
    assert (np.diff(edges) > 0).all()


def test_histograms_count_every_channel():
    scores = {"a": {"before": (np.array([1.0, 2, 3]), np.array([0.5]))}, "b": {}}
    scores["b"] = {"before": (np.ones(2), np.ones(5)), "after": (np.ones(2), np.zeros(5))}
    drawn = figures.draw_scores(scores)
    heights = [[sum(p.get_height() for p in c) for c in panel.containers] for panel in drawn.axes]
    # Bars of one panel: leaving, then kept on top of them.
    assert [list(map(float, h)) for h in heights] == [[1, 3], [], [5, 2], [5, 2]]


# ---- several runs ----
def test_several_runs_are_compared(tmp_path):
    write_run(tmp_path / "a" / "one")
    write_run(tmp_path / "b" / "one", RESULTS | {"method": "refill", "allocation": "weights", "seconds": 1234.5})
    write_run(tmp_path / "dense", RESULTS | {"method": "dense", "rows": RESULTS["rows"][:1], "channel_sparsity": {}})
    folders = [tmp_path / "a" / "one", tmp_path / "b" / "one", tmp_path / "dense"]
    page = read_page(*folders).check()
    text = page.text()
    assert text.startswith("3 runs compared")
    assert f"1. {folders[0]} RSST 81.25% 78.12% -3.12 7.83k (30.0%) 137k (30.0%) 3,176 (2.00×, 2,620–3,335) 80" in text
    assert f"2. {folders[1]} Refill 81.25% 78.12% -3.12" in text and " 1,234 " in text
    assert "3. dense Dense training 81.25% 81.25% – 26.1k 457k 1,588 (1,307–1,602)" in text
    assert [a["href"] for a in page.all("a")] == ["#run-1", "#run-2", "#run-3"]
    assert [a["id"] for a in page.all("section")] == ["run-1", "run-2", "run-3"]
    assert "Not the same in all" not in text
    assert "Accuracy against Params, MACs / image, Images / s" in page.all("img")[0]["alt"]


def test_what_cannot_be_compared_is_said_or_kept_apart(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "other", RESULTS | {"dataset": "birds", "device": "another machine"})
    language(tmp_path / "lm")
    write_run(tmp_path / "stopped", results=None, state=STATE | {"done": 1})
    page = read_page(*(tmp_path / name for name in ("one", "lm", "other", "stopped"))).check()
    text = page.text()
    assert "Not the same in all these runs: the data, so that their quality cannot be compared; the device" in text
    assert text.count("Dense accuracy") == 1 and text.count("Dense perplexity") == 1
    assert "4. stopped RSST 81.25% not finished – – – – 80" in text
    assert "2. lm Pruning by scores 20.00 25.50 +27.5%" in text


def test_the_comparison_draws_each_run_once():
    points = [
        {"number": 1, "label": "one", "dense": {"q": 90, "c": 200}, "final": {"q": 88, "c": 50}},
        {"number": 2, "label": "two", "dense": {}, "final": {"q": 80, "c": 60}},
        {"number": 3, "label": "three", "dense": {}, "final": {"q": None, "c": 60}},
    ]
    drawn = figures.draw_comparison(points, ("q", "quality"), [("c", "cost")])
    (panel,) = drawn.axes
    assert [(t.get_text(), t.get_position()) for t in panel.texts] == [("1", (50, 88)), ("2", (60, 80))]
    discs = [tuple(line.get_xydata()[0]) for line in panel.lines if line.get_marker() == "o"]
    assert discs == [(200, 90), (50, 88), (60, 80)]
    assert figures.svg_uri(drawn) == figures.svg_uri(drawn)


# ---- runs that are not finished ----
class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """An RSSTTrainer's run, killed in the fifth of its rsst stage's six steps, with a checkpoint of the fourth."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    settings = dict(rsst_epochs=2, eval_strategy="epoch", save_strategy="steps", save_steps=2)
    trainer = make_trainer(folder, **{**settings, "num_train_epochs": 1})
    step = trainer.training_step

    def dies(*args, **kwargs):
        if trainer.run_state.done == 1 and trainer.state.global_step == 4:
            raise Killed
        return step(*args, **kwargs)

    trainer.training_step = dies
    with pytest.raises(Killed):
        trainer.train()
    return folder


def test_an_interrupted_run_shows_what_is_there(interrupted):
    page, run = read_page(interrupted).check(), read_run(interrupted)
    text = page.text()
    assert "This run has not finished. 1 of its 3 stages is done (train); rsst-1 had reached step 4" in text
    assert "step 4 (epoch 1.3) at its last checkpoint." in text
    state = json.loads((interrupted / "rsst_state.json").read_text())
    accuracy = state["metrics"]["train"]["end"]["eval_accuracy"]
    assert f"its dense accuracy is {accuracy:.2%}" in text
    assert f"train 1 3 {state['spent']['train']['seconds']:,.1f} – – {accuracy:.2%}" in text
    assert "rsst-1 1.333 4 – – – –" in text
    assert {e["stage"] for e in run.history} == {"train", "rsst-1"}
    assert [e["step"] for e in run.history if "lambda" in e] == [4, 5, 6, 7]  # the first stage had three
    assert max(e["epoch"] for e in run.history) == pytest.approx(1 + 4 / 3)
    assert "As the last choice leaves them: the run has not finished." in text
    assert sum(run.widths["d_inner"]["kept"]) == sum(run.widths["d_inner"]["dense"]) / 2
    assert "recipe.yaml" not in text and "--resume" not in text  # it was not started from a recipe


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "It has not begun its first stage"),
        (STATE | {"done": 1}, "1 of its 3 stages is done (train); rsst-1 has left no checkpoint yet."),
        (
            STATE | {"done": 0, "history": [], "metrics": {}},
            "0 of its 3 stages are done; train has left no checkpoint",
        ),
        (STATE, "All its stages are done, but no results.json is there"),
    ],
    ids=["recipe-alone", "second-stage", "first-stage", "not-measured"],
)
def test_an_unfinished_run_says_so(tmp_path, state, said):
    folder = write_run(tmp_path / "run", results=None, state=state)
    text = read_page(folder).check().text()
    assert f"This run has not finished. {said}" in text
    assert f"mamba-rsst train {folder}/recipe.yaml --resume" in text
    assert "Results" not in text and "RSST of mamba_tiny on pets, not finished" in text


def test_half_a_checkpoint_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "run", results=None, state=STATE | {"done": 1})
    for step, text in ((2, '{"global_step": 2, "epoch": 0.4, "log_history": [{"loss": 1.0}]}'), (3, '{"global_st')):
        place = folder / "stages" / "1-rsst-1" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "trainer_state.json").write_text(text)
    assert read_run(folder).under_way == {"stage": "rsst-1", "steps": 2, "epochs": 0.4}


# ---- the command line ----
def shell(*argv, cwd):
    command = [sys.executable, "-m", "mamba_rsst", "report", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_pages_by_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_run(tmp_path / name)
    for argv, file in (
        (["one"], "one/report.html"),
        (["one"], "one/report.html"),  # takes the place of the earlier one
        (["one", "two"], "report.html"),
        (["one", "--out", "deep/er/page.html"], "deep/er/page.html"),
    ):
        assert main(["report", *argv]) == 0
        assert f"Written to {file}" in capsys.readouterr().out
        Page(Path(file).read_text(encoding="utf-8")).check()


def test_bad_input_in_a_process_of_its_own(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text('{"rows": [')
    before = sorted(tmp_path.rglob("*"))
    for argv, said in ((["nowhere"], "There is no folder 'nowhere'."), (["run"], "'run/results.json' is damaged")):
        done = shell(*argv, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"mamba-rsst report: error: {said}"), (
            done.stderr
        )
    assert sorted(tmp_path.rglob("*")) == before


def broken(folder, file, text):
    path = write_run(folder / "run") / file
    write_scores(path.parents[file.count("/")])
    path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("results.json", b"\xff\xfe", "results.json' is damaged"),
        ("results.json", [], "it holds no object but list"),
        ("results.json", {}, "it holds no `rows`"),
        ("results.json", {"rows": [{"accuracy": 1}]}, "it holds no `rows`"),
        ("results.json", RESULTS | {"task": "poetry"}, "its task is 'poetry', not one of"),
        (
            "results.json",
            RESULTS | {"rows": [{"name": "dense", "accuracy": "good"}]},
            "`accuracy` of 'dense' is 'good'",
        ),
        ("results.json", RESULTS | {"widths": {"d_inner": 3}}, "do not fit together"),
        ("results.json", RESULTS | {"widths": {"d_inner": {"dense": [3], "kept": []}}}, "1 dense widths but 0 kept"),
        ("results.json", RESULTS | {"dataset": [1]}, "`dataset` is [1]"),
        ("results.json", RESULTS | {"method": []}, "`method` is []"),
        ("results.json", RESULTS | {"seconds": "long"}, "`seconds` is 'long'"),
        ("results.json", RESULTS | {"channel_sparsity": {"d_inner": "much"}}, "`channel_sparsity` is"),
        ("rsst_state.json", b"{", "rsst_state.json' is damaged"),
        ("rsst_state.json", {}, "`stages` is None"),
        ("rsst_state.json", STATE | {"metrics": []}, "`metrics` is []"),
        ("rsst_state.json", STATE | {"metrics": {"train": 3}}, "do not fit together"),
        ("training_log.jsonl", b'{"loss": 1}\n{"lo', "training_log.jsonl, line 2' is damaged"),
        ("training_log.jsonl", {"loss": "small"}, "`loss` in its log is 'small'"),
        ("recipe.yaml", b"a: [", "recipe.yaml' is damaged"),
        ("recipe.yaml", ["a"], "it holds no recipe"),
        ("stages/1-rsst-1/masks.safetensors", b"no", "masks.safetensors' is damaged"),
        ("stages/1-rsst-1/scores.safetensors", b"", "scores.safetensors' is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, capsys, file, text, said):
    broken(tmp_path, file, text)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys):
    broken(tmp_path, "stages/1-rsst-1/scores.safetensors", b"")
    file = tmp_path / "run" / "stages" / "1-rsst-1" / "scores.safetensors"
    file.unlink()
    file.mkdir()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "scores.safetensors' is damaged" in capsys.readouterr().err


def test_a_sweep_is_no_run(tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text("recipe: a.yaml")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds a sweep; give the folders of its runs" in capsys.readouterr().err


def test_a_run_stopped_between_its_scores_and_its_masks(tmp_path):
    write_scores(write_run(tmp_path / "run", results=None, state=STATE | {"done": 1}))
    (tmp_path / "run" / "stages" / "1-rsst-1" / "masks.safetensors").unlink()
    assert "No scores were kept." in read_page(tmp_path / "run").check().text()


@pytest.mark.parametrize("masks", [{}, {"layers.0.mixer:d_inner": [1, 0]}], ids=["none", "other-size"])
def test_scores_without_their_masks(tmp_path, masks):
    write_scores(write_run(tmp_path / "run"))
    masks = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()}
    save_file(masks, tmp_path / "run" / "stages" / "1-rsst-1" / "masks.safetensors")
    with pytest.raises(ValueError, match="does not go with the masks beside it"):
        read_run(tmp_path / "run")


def test_what_is_no_run_and_where_a_report_may_not_go(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("dear diary")
    for argv, said in (
        ([tmp_path / "empty"], "holds no run: neither recipe.yaml nor rsst_state.json is there"),
        ([tmp_path / "notes.txt"], "There is no folder"),
        ([run, tmp_path / "run"], "is given twice"),
        ([run, "--out", tmp_path / "notes.txt"], "is there and is no report"),
        ([run, "--out", run / "results.json"], "is there and is no report"),
        ([run, "--out", tmp_path], "is a folder; the report is one file"),
        ([run, "--out", tmp_path / "notes.txt" / "x.html"], "is a file"),
    ):
        assert main(["report", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "dear diary"
    assert json.loads((run / "results.json").read_text()) == RESULTS


# ---- in a browser ----
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"


def browse(profile, *argv):
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_page_in_chromium(tmp_path, finished_run, several):
    write_scores(write_run(tmp_path / "by-hand"))
    folders = [tmp_path / "by-hand", finished_run[0], language(tmp_path / "lm")] if several else [tmp_path / "by-hand"]
    file = write_report(folders, tmp_path / "page.html")
    browse(tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1100,2400", file.as_uri())
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1100, 2400)
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    assert {(255, 255, 255), (0, 0x72, 0xB2)} <= colours and len(colours) > 100
    # Widths of a phone and of a desk, each in a frame that the page outside can measure.
    page = html.escape(file.read_text(encoding="utf-8"))
    frames = [f'<iframe width="{width}" height="800" srcdoc="{page}"></iframe>' for width in (360, 1100)]
    measure = """<script>onload = () => { const pages = [...document.querySelectorAll('iframe')]
        document.title = pages.map(({contentDocument: d}) =>
        [d.documentElement.scrollWidth, d.images.length, [...d.images].filter(i => !i.naturalWidth).length,
         d.querySelector('h1').innerText]).join('|') }</script>"""
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{measure}{''.join(frames)}")
    seen = browse(tmp_path / "profile", "--dump-dom", (tmp_path / "frames.html").as_uri())
    title = "3 runs compared" if several else "mamba_tiny on pets: RSST"
    images = len(Page(file.read_text()).all("img"))
    assert f"<title>360,{images},0,{title}|1100,{images},0,{title}</title>" in seen
