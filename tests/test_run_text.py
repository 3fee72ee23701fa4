"""A language model from the recipe to the saved folder, on real text without a network."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard
from tiny import perturb_
from tiny_runs import assert_same_state
from tiny_text import LENGTH, SHAPE, data_config, load, make_model, make_trainer, write_parquet, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, pipeline

from mamba_rsst import speed
from mamba_rsst.cli import main
from mamba_rsst.evaluation import count_macs
from mamba_rsst.recipe import RecipeError, build_recipe, load_recipe
from mamba_rsst.run import run_recipe
from mamba_rsst.training.text_sources import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run by the command line, in a process of its own."""
    place = tmp_path_factory.mktemp("finished")
    training = dict(num_train_epochs=4, rsst_epochs=2, recovery_epochs=2, eval_strategy="epoch")
    recipe = write_recipe(place / "tiny.yaml", folder, training=training)
    command = [sys.executable, "-m", "mamba_rsst", "train", str(recipe), f"training.output_dir={place / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Perplexity" in done.stdout and "recovered" in done.stdout and "…" not in done.stdout
    return place / "run"


@pytest.fixture
def hasty(monkeypatch):
    whole = speed.compare_throughput
    monkeypatch.setattr(speed, "compare_throughput", functools.partial(whole, rounds=2, run_seconds=0.001))


def perplexity(model, blocks):
    """Token by token, once more and in double."""
    with torch.no_grad():
        logits = model.eval()(input_ids=blocks.long()).logits.double()
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten().long()))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# ---- the numbers of a run, each measured once more ----
def test_the_rows_are_the_models_of_the_stages(finished, folder):
    results, blocks = results_of(finished), load(data_config(folder)).eval.tokens
    stages = {"dense": "0-train", "cut": "1-rsst-1", "recovered": "2-recover-1"}
    assert [row["name"] for row in results["rows"]] == list(stages)
    for row in results["rows"]:
        own = finished / "stages" / stages[row["name"]] / "model"
        model = AutoModelForCausalLM.from_pretrained(own)
        assert AutoTokenizer.from_pretrained(own).get_vocab() == AutoTokenizer.from_pretrained(finished).get_vocab()
        assert row["perplexity"] == pytest.approx(perplexity(model, blocks), rel=1e-4)
        assert row["parameters"] == model.num_parameters()
        ids = {"input_ids": blocks[:1].long(), "use_cache": False}
        assert row["macs"] == count_macs(model, ids) // LENGTH
        assert row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
        assert "accuracy" not in row
    first, last = results["rows"][0], results["rows"][-1]
    assert first["parameters"] > last["parameters"] and first["macs"] > last["macs"]
    assert last["perplexity"] < 264 / 3  # it has learned something
    assert (results["task"], results["seq_len"]) == ("causal-lm", LENGTH) and results["batch_size"] >= 1
    assert sum(results["widths"]["d_inner"]["kept"]) <= SHAPE["d_inner"]


def test_the_saved_folder_generates(finished):
    generate = pipeline("text-generation", model=str(finished))
    text = generate("Return the", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("Return the") and len(text) > len("Return the")
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.decode(tokenizer("Héllo")["input_ids"]) == "Héllo"
    config = AutoModelForCausalLM.from_pretrained(finished).config
    assert config.vocab_size == 264 and config.eos_token_id == tokenizer.eos_token_id == 0


def test_the_papers_of_the_run_agree_with_it(finished, folder):
    results = results_of(finished)
    card = ModelCard((finished / "README.md").read_text())
    assert card.data.pipeline_tag == "text-generation" and card.data.eval_results[0].metric_type == "perplexity"
    assert card.data.eval_results[0].metric_value == results["rows"][-1]["perplexity"]
    for row in results["rows"]:
        assert f"{row['perplexity']:,.2f}" in card.text
    assert "AutoModelForCausalLM" in card.text and "language model" in card.text and "image" not in card.text.lower()
    assert str(folder.parent) not in card.text.split("<details>")[0]
    assert (finished / "figures" / "widths.png").exists() and (finished / "figures" / "training.png").exists()
    log = [json.loads(line) for line in (finished / "training_log.jsonl").read_text().splitlines()]
    last = {e["stage"]: e["eval_perplexity"] for e in log if "eval_perplexity" in e}
    assert results["rows"][0]["perplexity"] == last["train"]
    assert load_recipe(finished / "recipe.yaml").data.block_size == LENGTH


# ---- other kinds of runs ----
def test_generated_answers_are_counted(tmp_path, hasty):
    data = dict(path="induction", block_size=16, num_symbols=4, max_train_tokens=16 * 64, max_eval_tokens=16 * 50)
    path = write_recipe(tmp_path / "r.yaml", "induction", tmp_path / "run", data={**data, "tokenizer": None})
    results = run_recipe(load_recipe(path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    from mamba_rsst.training.text import TextDataConfig, load_text_data

    blocks = load_text_data(TextDataConfig(**data), None, seed=0).eval.tokens.long()
    with torch.no_grad():
        right = (model(input_ids=blocks).logits[:, -2].argmax(-1) == blocks[:, -1]).float().mean().item()
    assert results["rows"][-1]["accuracy"] == pytest.approx(right)
    assert "Accuracy: of the answers" in (tmp_path / "run" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("mark s0 s3")["input_ids"] == [0, 1, 4]


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_a_run_may_start_from_a_checkpoint(tmp_path, folder, kind, hasty):
    """In one shot: no training before the cut. The tokenizer is the checkpoint's."""
    if kind == "ours":
        source = make_model()
    else:
        stock = MambaConfig(hidden_size=16, num_hidden_layers=2, intermediate_size=28, state_size=3, vocab_size=264)
        source = perturb_(transformers.MambaForCausalLM(stock))
    source.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    training = dict(method="refill", rewind="none", num_train_epochs=0, recovery_epochs=1)
    path = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run", training=training, data={"tokenizer": None})
    recipe = load_recipe(path).to_dict() | {"model": {"path": str(tmp_path / "source")}}
    results = run_recipe(build_recipe(recipe))
    blocks = load(data_config(folder)).eval.tokens
    assert results["rows"][0]["perplexity"] == pytest.approx(perplexity(source, blocks), rel=1e-4)
    assert results["rows"][0]["parameters"] == source.num_parameters() > results["rows"][-1]["parameters"]
    assert "the lowest were cut out" in (tmp_path / "run" / "README.md").read_text()


# ---- bad input ----
def refused(tmp_path, folder, capsys, *overrides, **sections):
    path = write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run", **sections)
    assert main(["train", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mamba-rsst train: error: ")
    assert not (tmp_path / "run").exists()
    return error


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.tokenizer=null"], "`data.tokenizer` is missing"),
        (["model.vocab_size=200"], "The tokenizer has 257 tokens, but `model.vocab_size` embeds 200."),
        (["data.train_split=trian"], "has no split 'trian'; choose from ['test', 'train']"),
        (["data.text_column=txt"], "no column 'txt'; choose from ['text']"),
        (
            ["data.block_size=1000000", "data.max_train_tokens=null", "data.max_eval_tokens=null"],
            "fewer than one block",
        ),
        (["augmentation.mixup=0.5"], "`augmentation` does not go with task=causal-lm"),
        (["model.image_size=32"], "Unknown key `model.image_size`"),
        (["model.preset=mamba_tiny"], "`preset` must be one of ['mamba_1.4b', "),
        (["data.image_column=img"], "Unknown key `data.image_column`"),
        (["training.label_smoothing_factor=0.1"], "does not go with language models"),
        (["training.dataloader_num_workers=2"], "`training.dataloader_num_workers` must be 0"),
        (["task=causal_lm"], "`task` must be one of ['image-classification', 'causal-lm'], got 'causal_lm'"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, folder, capsys, overrides, message):
    assert message in refused(tmp_path, folder, capsys, *overrides)


def test_a_checkpoint_with_fewer_tokens_than_the_tokenizer(tmp_path, folder, capsys):
    make_model(vocab_size=100).save_pretrained(tmp_path / "small")
    path = tmp_path / "small"
    content = load_recipe(write_recipe(tmp_path / "r.yaml", folder, tmp_path / "run")).to_dict()
    with pytest.raises(ValueError, match="The tokenizer has 257 tokens, but .*small' embeds 100"):
        run_recipe(build_recipe(content | {"model": {"path": str(path)}}))
    assert not (tmp_path / "run").exists()


def test_presets_are_the_tasks_own(folder):
    with pytest.raises(RecipeError, match="`preset` must be one of .*'mamba_base'.*got 'mamba_nano'"):
        build_recipe(
            {"task": "image-classification", "model": {"preset": "mamba_nano"}, "training": {"method": "dense"}}
        )


# ---- interrupted and resumed ----
class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "streaming, stage, step", [(False, 0, 3), (False, 1, 4), (False, 2, 6), (True, 0, 4), (True, 1, 6), (True, 2, 2)]
)
def test_resuming_gives_the_same_bits(tmp_path, folder, streaming, stage, step):
    def trainer_of(place, seed=0):
        data = load(data_config(folder, streaming=streaming, shuffle_buffer=20))
        arguments = dict(num_train_epochs=2, save_strategy="steps", save_steps=2, distillation_weight=0.3)
        return make_trainer(place, data, model=make_model(seed), **arguments)

    whole, broken = trainer_of(tmp_path / "whole"), trainer_of(tmp_path / "broken")
    whole.train()
    compute_loss = broken.compute_loss

    def dies(model, inputs, *args, **kwargs):
        if broken._stage is broken.stages[stage] and model.training and broken.state.global_step + 1 == step:
            raise Killed
        return compute_loss(model, inputs, *args, **kwargs)

    broken.compute_loss = dies
    with pytest.raises(Killed):
        broken.train()
    assert broken.run_state.done == stage
    resumed = trainer_of(tmp_path / "broken", seed=9)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    losses = [[e["loss"] for e in t.run_state.history if "loss" in e] for t in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 24
