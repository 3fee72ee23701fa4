"""evaluate_lm, `eval --tasks` and the task files, against definitions computed here and the harness's own command."""

import io
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import batch_of, layer_groups, make, random_masks
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import mamba_rsst
from mamba_rsst import cli, evaluate_lm, lm_evaluation, report, shrink_
from mamba_rsst.evaluation import count_parameters


LETTERS = "abcdefghijklmnopqrstuvwxyz =@.,'-\n"
PASSAGES = (
    "a small boat left the harbour and went out to sea",
    "she looked for her keys, and could not find the keys",
    "the cat sat",
    "it rained all day. nobody came to the fair",
    "one two three four five six seven eight nine ten",
)
LINES = (  # as in the corpus's files, a blank at both ends of each, also of the empty ones
    *("", "= first page =", "", "a page of words , and more words .", "", "= = its section = =", ""),
    *("twenty @-@ one words", "", "= second page =", "", "short ."),
)
WIKITEXT = "".join(f" {line} \n" if line else " \n" for line in LINES)
TASKS = ["lambada_local", "wikitext2_local"]


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval")


@pytest.fixture
def tokenizer():
    """One token a character, fewer than the tiny models have rows, an end of text and no padding token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(("<end>", "<unk>", *LETTERS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder laid out as the tasks want it, named by the environment."""
    folder = tmp_path / "data"
    for name, content in {
        "lambada/test.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES),
        "wikitext2/test.txt": WIKITEXT,
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    monkeypatch.setenv("MAMBA_RSST_DATA", str(folder))
    return folder


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(model, folder) of a model cut to other widths in every layer, its tokenizer beside it."""
    model = make("lm_mlp", num_hidden_layers=3)
    shrink_(model, random_masks(layer_groups(model), seed=4))
    assert isinstance(model.config.d_inner, list)
    model.save_pretrained(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "cut")
    return model, tmp_path / "cut"


@torch.no_grad()
def log_likelihood(model, context, target):
    """(sum of the target's log-probabilities, whether each was the most likely), one sequence at a time."""
    logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    target = torch.tensor(target)
    return logits.gather(-1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())


def expected(model, tokenizer):
    """The numbers of both tasks, by their definitions."""
    ids = tokenizer.encode
    scored = [log_likelihood(model, ids(a), ids(f" {b}")) for a, b in (text.rsplit(" ", 1) for text in PASSAGES)]
    total = words = size = 0
    for page in (WIKITEXT[: WIKITEXT.index(" = second")][:-1], WIKITEXT[WIKITEXT.index(" = second") :]):
        page = page[page.index(" = ") :]
        total += log_likelihood(model, [tokenizer.eos_token_id], ids(detokenized(page)))[0]
        words += len(re.split(r"\s+", page))
        size += len(page.encode())
    return {
        "lambada_local": {
            "perplexity,none": math.exp(-sum(s for s, _ in scored) / len(scored)),
            "acc,none": sum(greedy for _, greedy in scored) / len(scored),
        },
        "wikitext2_local": {
            "word_perplexity,none": math.exp(-total / words),
            "byte_perplexity,none": math.exp(-total / size),
            "bits_per_byte,none": -total / size / math.log(2),
        },
    }


def detokenized(page):
    """What the standard detokenizer does to these pages."""
    page = page.replace(" @-@ ", "-").replace(" , ", ", ").replace(" . ", ". ")
    return page.replace("= =", "==").replace(" \n", "\n").replace("\n ", "\n")


def numbers(results):
    return {
        (task, key): value
        for task, metrics in results["results"].items()
        for key, value in metrics.items()
        if isinstance(value, float)
    }


# ---- the numbers ----
@pytest.mark.parametrize("kind", ["lm", "lm_mlp", "mamba", "falcon_mamba"])
def test_the_numbers_are_those_of_the_definitions(harness, data, tokenizer, kind):
    model = make(kind)
    alone, padded = (evaluate_lm(model, TASKS, tokenizer=tokenizer, batch_size=size) for size in (1, 3))
    for task, metrics in expected(model, tokenizer).items():
        for metric, value in metrics.items():
            assert alone["results"][task][metric] == pytest.approx(value, rel=1e-5), metric
    assert numbers(padded) == pytest.approx(numbers(alone), rel=1e-5)
    assert alone["n-samples"]["lambada_local"] == {"original": 5, "effective": 5}
    assert alone["n-samples"]["wikitext2_local"]["original"] == 2


def test_a_last_word_that_is_guessed(harness, data):
    """Three passages end in what the model finds most likely, one in another word."""
    words = whole_words()
    model, lines = make("lm"), []
    for start, right in (("w16 w9", True), ("w9", True), ("w20 w21 w22", False), ("w5 w5", True)):
        with torch.no_grad():
            best = model(torch.tensor([words.encode(start)])).logits[0, -1].argmax().item()
        assert best > 1, "no special token"
        lines.append(json.dumps({"text": f"{start} {words.decode(best if right else best % 40 + 2)}"}))
    (data / "lambada/test.jsonl").write_text("\n".join(lines))
    results = evaluate_lm(model, "lambada_local", tokenizer=words, batch_size=2)["results"]["lambada_local"]
    assert results["acc,none"] == 0.75 and results["acc_stderr,none"] == pytest.approx(0.25)


def whole_words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(("<end>", "<unk>", *(f"w{i}" for i in range(2, 53))))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


def test_a_folder_gives_what_its_model_gives(harness, data, tokenizer, saved):
    model, folder = saved
    kwargs = {"max_length": 16, "limit": 2, "batch_size": 2}
    here = evaluate_lm(model, TASKS, tokenizer=tokenizer, **kwargs)
    assert here["n-samples"]["lambada_local"]["effective"] == 2
    for source in (str(folder), folder):
        assert numbers(evaluate_lm(source, TASKS, device="cpu", **kwargs)) == pytest.approx(numbers(here), rel=1e-6)
    # windows of 16 tokens see less than the whole page
    whole = evaluate_lm(model, "wikitext2_local", tokenizer=tokenizer, limit=2)
    assert numbers(whole)["wikitext2_local", "bits_per_byte,none"] != pytest.approx(
        numbers(here)["wikitext2_local", "bits_per_byte,none"], rel=1e-4
    )


def test_settings_reach_the_harness(harness, data, tokenizer):
    model = make("lm")
    bare = evaluate_lm(model, "lambada_local", tokenizer=tokenizer, bootstrap_iters=0, data=data)
    assert bare["results"]["lambada_local"]["acc_stderr,none"] == "N/A" and "samples" not in bare
    kept = evaluate_lm(model, "lambada_local", tokenizer=tokenizer, num_fewshot=2, log_samples=True, limit=0.4)
    assert kept["n-shot"]["lambada_local"] == 2 and len(kept["samples"]["lambada_local"]) == 2
    assert kept["results"]["lambada_local"]["acc_stderr,none"] == 0.0


def test_names_and_patterns(harness):
    assert lm_evaluation.find_tasks(TASKS[::-1])[1] == TASKS[::-1]
    manager, names = lm_evaluation.find_tasks(["wikitext2_lo*", "wikitext2_local", "lambada_openai"])
    assert names == ["wikitext2_local", "lambada_openai"] and "hellaswag" in manager.all_tasks


def test_tasks_of_ones_own(harness, data, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    text = (lm_evaluation.TASKS / "lambada_local.yaml").read_text()
    function = "!function local_data.lambada"
    assert function in text
    (tmp_path / "mine" / "mine.yaml").write_text(
        text.replace("lambada_local", "mine").replace(function, "!function words.say")
    )
    (tmp_path / "mine" / "words.py").write_text(
        "import datasets\ndef say(**kw):\n    return {'test': datasets.Dataset.from_dict({'text': ['a b', 'c d']})}\n"
    )
    results = evaluate_lm(make("lm"), ["mine", "lambada_local"], tokenizer=tokenizer, include_path=tmp_path / "mine")
    assert list(results["results"]) == ["mine", "lambada_local"]
    assert results["n-samples"]["mine"]["original"] == 2


# ---- in the middle of something else ----
def test_everything_is_left_as_it_was(harness, data, tokenizer, capfd):
    model = make("lm").train()
    model.backbone.layers[0].eval()
    next(model.parameters()).requires_grad_(False)
    model(**batch_of(model)).loss.backward()
    modes = [module.training for module in model.modules()]
    before = [
        (id(p), p.requires_grad, p.clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    special = dict(tokenizer.special_tokens_map)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    evaluate_lm(model, TASKS, tokenizer=tokenizer, batch_size=2)
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    assert states[0] == after[0] and (states[1] == after[1]).all() and torch.equal(states[2], after[2])
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.special_tokens_map == special and tokenizer.pad_token is None
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for parameter, (identity, wanted, value, grad) in zip(model.parameters(), before, strict=True):
        assert id(parameter) == identity and parameter.requires_grad is wanted and torch.equal(parameter, value)
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    assert capfd.readouterr().out == ""  # the harness prints; a program's own output stays its own


def test_a_failure_leaves_everything_too(harness, data, tokenizer):
    (data / "wikitext2/test.txt").unlink()
    model = make("lm").train()
    state = torch.get_rng_state()
    with pytest.raises(FileNotFoundError, match="wikitext2"):
        evaluate_lm(model, TASKS, tokenizer=tokenizer)
    assert model.training and torch.equal(torch.get_rng_state(), state)


class EvaluateEachStep(TrainerCallback):
    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        results = evaluate_lm(model, "lambada_local", tokenizer=self.tokenizer, bootstrap_iters=0)
        self.seen.append(results["results"]["lambada_local"]["perplexity,none"])


def noisy(module, args, output):
    """Noise from torch's generator in training, as dropout would draw it."""
    if module.training:
        output.last_hidden_state = output.last_hidden_state * (1 + 0.1 * torch.rand(()))


def test_a_training_run_does_not_notice(harness, data, tokenizer, tmp_path):
    """Evaluated after each step or never: the same weights, so the same order of samples and the same dropout."""
    weights = []
    for name in ("never", "each"):
        model = make("lm")
        model.backbone.register_forward_hook(noisy)
        ids = torch.randint(2, 30, (8, 10), generator=torch.Generator().manual_seed(3))
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, use_cpu=True, save_strategy="no", seed=1
        )
        callback = EvaluateEachStep(tokenizer)
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        if name == "each":
            trainer.add_callback(callback)
        trainer.train()
        weights.append(model.state_dict())
    assert len(set(callback.seen)) == 3, "the model was another after each step"
    for (name, never), each in zip(weights[0].items(), weights[1].values()):
        assert torch.equal(never, each), name


class EvaluateEachStage(TrainerCallback):
    """The README's."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        results = evaluate_lm(model, "wikitext2_local", tokenizer=self.tokenizer, limit=1)
        self.seen.append((model.config.d_inner, results["results"]["wikitext2_local"]["bits_per_byte,none"]))


def test_between_the_stages_of_a_pruning_run(harness, data, tokenizer, tmp_path):
    from mamba_rsst import PruningConfig, RSSTConfig, RSSTTrainer

    ids = torch.randint(2, 30, (8, 10), generator=torch.Generator().manual_seed(3))
    epochs = {"num_train_epochs": 1, "rsst_epochs": 1, "recovery_epochs": 1}
    trainer = RSSTTrainer(
        model=make("lm"),
        args=RSSTConfig(str(tmp_path / "run"), **epochs, per_device_train_batch_size=4, use_cpu=True),
        pruning=PruningConfig(targets=["d_inner"], sparsity=0.5, round_to=1),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[callback := EvaluateEachStage(tokenizer)],
    )
    trainer.train()
    widths, scores = zip(*callback.seen)
    assert widths[:2] == (46, 46) and widths[2] != 46 and len(set(scores)) == 3


# ---- what cannot be evaluated ----
@pytest.mark.parametrize(
    "change, names",
    [
        ({"tasks": []}, ["no task"]),
        ({"batch_size": 0}, ["`batch_size`", "0"]),
        ({"max_length": 0}, ["`max_length`", "0"]),
        ({"limit": 0}, ["`limit`", "0"]),
        ({"num_fewshot": -1}, ["`num_fewshot`", "-1"]),
        ({"include_path": "./absent"}, ["'./absent'"]),
        ({"data": "./absent"}, ["'absent/lambada/test.jsonl'"]),
        ({"tokenizer": None}, ["MambaForCausalLM", "`tokenizer`"]),
        ({"tokenizer": "./absent"}, ["'./absent'"]),
        ({"model": "./absent"}, ["'./absent'"]),
        ({"device": "abacus"}, ["'abacus'"]),
    ],
)
def test_what_cannot_be(harness, data, tokenizer, change, names):
    model = make("lm")
    arguments = {"model": model, "tasks": "lambada_local", "tokenizer": tokenizer, **change}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        evaluate_lm(arguments.pop("model"), arguments.pop("tasks"), **arguments)
    assert all(name in str(caught.value) for name in names), caught.value


def test_models_and_tokenizers_that_do_not_fit(harness, data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="go up to 35, but .*vocabulary of 20"):
        evaluate_lm(make("lm", vocab_size=20), "lambada_local", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no causal language model"):
        evaluate_lm(make("none"), "lambada_local", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no causal language model"):
        evaluate_lm(make("lm").backbone, "lambada_local", tokenizer=tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        evaluate_lm(make("lm"), "lambada_local", tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["lm", "mamba"])
def test_a_folder_without_a_tokenizer(tmp_path, kind):
    make(kind).save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*bare"):
        lm_evaluation.load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer in .*bare.* cannot be read"):
        lm_evaluation.load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("lambada/test.jsonl", None, ["lambada/test.jsonl", "MAMBA_RSST_DATA"]),
        ("lambada/test.jsonl", "", ["lambada/test.jsonl", "no text"]),
        ("lambada/test.jsonl", '{"text": "a b"}\n{"txt": "a b"}\n', ["Line 2", "'text'"]),
        ("lambada/test.jsonl", "a b\n", ["Line 1", "'text'"]),
        ("lambada/test.jsonl", '{"text": "alone"}\n', ["Line 1", "last word", "'alone'"]),
        ("wikitext2/test.txt", None, ["wikitext2/test.txt", "MAMBA_RSST_DATA"]),
        ("wikitext2/test.txt", " \n \n", ["wikitext2/test.txt", "no text"]),
    ],
)
def test_data_that_cannot_be_read(harness, data, tokenizer, name, content, words):
    (data / name).unlink() if content is None else (data / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        evaluate_lm(make("lm"), [task for task in TASKS if task[:7] == name[:7]], tokenizer=tokenizer)
    assert all(word in str(caught.value) for word in words), caught.value


def test_data_that_nothing_names(harness, tokenizer, monkeypatch):
    monkeypatch.delenv("MAMBA_RSST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="MAMBA_RSST_DATA .* not set"):
        evaluate_lm(make("lm"), "lambada_local", tokenizer=tokenizer)


def test_pages(harness, monkeypatch):
    monkeypatch.syspath_prepend(str(lm_evaluation.TASKS))
    import local_data

    pages = local_data.pages(WIKITEXT)
    assert [page.split("\n")[0] for page in pages] == [" = first page = ", " = second page = "]
    assert "= = its section = =" in pages[0]
    assert " \n" + "\n".join(pages) == WIKITEXT


# ---- without the harness ----
def test_without_the_harness(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install mamba_rsst\[lm\]"):
        evaluate_lm(make("lm"), "lambada_local")
    make("lm").save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "model"), "--tasks", "lambada_local"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install mamba_rsst[lm]" in err


def fake_results(perplexity, accuracy):
    metrics = {"alias": "t", "acc,none": accuracy, "acc_stderr,none": 0.01, "acc,strict": 0.125}
    metrics |= {"perplexity,none": perplexity, "perplexity_stderr,none": "N/A"}
    more = {"higher_is_better": {"t": {"acc": True, "perplexity": False}}, "n-samples": {"t": {"effective": 1234}}}
    return {"results": {"t": metrics}} | more


def test_rows_and_table():
    rows = {"dense": lm_evaluation.metric_rows(fake_results(20.5, 0.5))}
    rows["cut"] = lm_evaluation.metric_rows(fake_results(31234.0, 0.375))
    assert rows["dense"][0] == {
        **{"task": "t", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.01},
        **{"higher_is_better": True, "samples": 1234},
    }
    assert [(r["metric"], r["filter"]) for r in rows["cut"]] == [
        ("acc", "none"),
        ("acc", "strict"),
        ("perplexity", "none"),
    ]
    rows["cut"].pop(1)
    console = Console(width=120, record=True, file=io.StringIO())
    models = [{"name": "dense", "parameters": 1000}, {"name": "cut", "parameters": 400}]
    console.print(report.lm_table(models, rows, "0.4.9"))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert ["cut", "against", "dense"] in lines
    assert ["parameters", "1,000", "400", "-60.0%"] in lines
    assert ["t", "acc", "↑", "0.5000", "±", "0.0100", "0.3750", "±", "0.0100", "-0.1250"] in lines
    assert ["t", "acc", "(strict)", "↑", "0.1250", "–", "–"] in lines
    assert ["t", "perplexity", "↓", "20.5000", "31,234", "+31,213.5000"] in lines
    assert "lm-eval 0.4.9" in text and "Documents: t 1,234." in text


# ---- the command line ----
@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """call(*argv) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*argv):
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def dense(tmp_path, tokenizer):
    make("mamba").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_eval_puts_dense_and_pruned_side_by_side(harness, call, data, saved, dense):
    model, folder = saved
    argv = (
        "eval",
        folder,
        "--against",
        dense,
        "--tasks",
        "lambada_local, wikitext2_local",
        "--limit",
        3,
        "--device",
        "cpu",
    )
    code, out, err = call(*argv, "--max-length", 32, "--batch-size", 2, "--json", "out/scores.json")
    assert code == 0, err
    written = json.loads(Path("out/scores.json").read_text())
    assert [entry["name"] for entry in written["models"]] == ["dense", "cut"]
    assert written["models"][1]["parameters"] == count_parameters(model)
    assert written["versions"]["torch"] == torch.__version__
    lines = [line.split() for line in out.splitlines()]
    assert ["cut", "against", "dense"] in lines
    kwargs = {"limit": 3, "max_length": 32, "batch_size": 2, "device": "cpu"}
    rows = [lm_evaluation.metric_rows(evaluate_lm(path, TASKS, **kwargs)) for path in (dense, folder)]
    assert len(rows[0]) == len(rows[1]) == 5
    for entry, again in zip(written["models"], rows):
        assert lm_evaluation.metric_rows(entry["results"]) == again
    for one, other in zip(*rows):
        line = next(line for line in lines if line[:2] == [one["task"], one["metric"]])
        for row in (one, other):
            cells = report._score(row).split()
            assert any(line[i : i + len(cells)] == cells for i in range(len(line))), (line, cells)
    assert os.listdir() == ["out"] and os.listdir("out") == ["scores.json"]


@pytest.mark.parametrize(
    "argv, names",
    [
        (["MODEL", "--tasks", "lambada_locl"], ["'lambada_locl'", "'lambada_local'"]),
        (["MODEL", "--tasks", ","], ["no task"]),
        (["MODEL", "--tasks", "lambada_local", "--data", "./absent"], ["absent/lambada/test.jsonl"]),
        (["MODEL", "--tasks", "lambada_local", "--include-path", "./absent"], ["'./absent'"]),
        (["MODEL", "--tasks", "lambada_local", "--batch-size", "0"], ["--batch-size", "0"]),
        (["MODEL", "--tasks", "lambada_local", "--limit", "0"], ["`limit`", "0"]),
        (["MODEL", "--tasks", "lambada_local", "--json", "."], ["--json", "'.'", "folder"]),
        (["MODEL", "--tasks", "lambada_local", "--device", "abacus"], ["'abacus'"]),
        (["MODEL", "--tasks", "lambada_local", "--tokenizer", "./absent"], ["tokenizer", "'./absent'"]),
        (["MODEL", "--tasks", "lambada_local", "--split", "test"], ["--split", "images"]),
        (["MODEL", "--tasks", "lambada_local", "--against", "MODEL"], ["nothing to compare"]),
        (["MODEL", "--tasks", "lambada_local", "--against", "BARE"], ["no tokenizer", "BARE"]),
        (["BARE", "--tasks", "lambada_local"], ["no tokenizer", "BARE"]),
        (["IMAGES", "--tasks", "lambada_local"], ["IMAGES", "no causal language model"]),
        (["./absent", "--tasks", "lambada_local"], ["'./absent'"]),
        (["MODEL", "--tasks", "lambada_local", "--limit", "2.5"], ["`limit`", "2.5"]),
        (["MODEL", "--num-fewshot", "1"], ["--num-fewshot", "--tasks"]),
        (["MODEL"], ["MODEL", "--tasks"]),
    ],
)
def test_eval_refuses(harness, call, data, saved, tmp_path, argv, names):
    make("mamba").save_pretrained(tmp_path / "bare")
    make("none").save_pretrained(tmp_path / "images")
    places = {"MODEL": str(saved[1]), "BARE": str(tmp_path / "bare"), "IMAGES": str(tmp_path / "images")}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}
    code, out, err = call(
        "eval", *(places.get(word, word) for word in argv), *["--json", "x.json"] * ("." not in argv)
    )
    if argv == ["MODEL"]:
        code, out, err = call("eval", places["MODEL"])
    assert code == 2 and out == "" and re.fullmatch(r"mamba-rsst eval: error: .+\n", err), err
    assert all(places.get(name, name) in err for name in names), err
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}


# ---- the harness's own command ----
PLAIN = """
import sys
sys.modules["mamba_rsst"] = None  # any import of the package fails from here on
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
assert not [name for name in sys.modules if name.startswith("mamba_rsst.")]
"""


@pytest.mark.slow  # half a minute, nearly all of it imports
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_harness_alone_on_a_folder_of_ours(harness, data, saved, tmp_path, batch_size):
    _, folder = saved
    model_args = f"pretrained={folder},trust_remote_code=True,max_length=24"
    command = ["run", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--include_path", str(lm_evaluation.TASKS), "--tasks", *TASKS, "--batch_size", str(batch_size)]
    command += ["--output_path", str(tmp_path / "out.json")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("out*.json")
    plain = json.loads(file.read_text())
    ours = evaluate_lm(folder, TASKS, batch_size=batch_size, max_length=24, device="cpu", bootstrap_iters=100_000)
    assert len(numbers(plain)) == 7
    assert numbers(plain) == pytest.approx(numbers(ours), rel=1e-6)
    assert plain["n-samples"] == ours["n-samples"]


def test_the_package_offers_it():
    assert mamba_rsst.evaluate_lm is evaluate_lm is lm_evaluation.evaluate_lm
