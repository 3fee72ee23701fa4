"""Text as blocks of tokens: packing, order, errors; and what the trainer makes of them."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_text import LENGTH, data_config, docstrings, load, make_model, make_trainer, write_jsonl, write_parquet
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainerCallback

from mamba_rsst import RSSTTrainer
from mamba_rsst.training.text import (
    TextCollator,
    TextDataConfig,
    TokenBlocks,
    TokenStream,
    load_text_data,
    text_tokenizer,
)
from mamba_rsst.training.text_sources import byte_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("text"))


def encoded(texts):
    """The bytes of the texts, an end of text behind each, by the tokenizer's own vocabulary."""
    tokenizer = byte_tokenizer()
    return [i for text in texts for i in [*tokenizer(text)["input_ids"], 0]]


# ---- packing ----
@pytest.mark.parametrize("length", [7, 32, 64])
@pytest.mark.parametrize("limit", [None, 64, 130])
def test_documents_end_to_end_cut_into_blocks(folder, length, limit):
    data = load(data_config(folder, block_size=length, max_train_tokens=limit, max_eval_tokens=None))
    for part, texts, cap in ((data.train, docstrings()[3:], limit), (data.eval, docstrings()[:3], None)):
        tokens = encoded(texts)[: cap or None]
        whole = len(tokens) // length
        assert part.tokens.dtype == torch.int32 and part.tokens.shape == (whole, length)
        assert part.tokens.flatten().tolist() == tokens[: whole * length]
    assert (
        data.tokenizer.decode(data.eval.tokens[0])
        == docstrings()[0][: len(data.tokenizer.decode(data.eval.tokens[0]))]
    )


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet of several files", "sub-folders", "another column"])
def test_kinds_of_files_hold_the_same_tokens(tmp_path, folder, kind):
    texts, config = docstrings()[3:], {}
    if kind == "jsonl":
        write_jsonl(tmp_path / "train.jsonl", texts)
        write_jsonl(tmp_path / "test.jsonl", docstrings()[:3])
    elif kind == "text":  # a file is one document
        texts = ["\n".join(texts)]
        for split, text in (("train", texts[0]), ("test", "\n".join(docstrings()[:3]))):
            (tmp_path / f"{split}.txt").write_text(text)
    elif kind == "parquet of several files":
        write_parquet(tmp_path)
        (tmp_path / "train.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
        write_parquet(tmp_path / "b", ["train"])
        (tmp_path / "b" / "train.parquet").rename(tmp_path / "train-00001-of-00002.parquet")
        texts = texts * 2
    elif kind == "sub-folders":
        for split, part in (("train", texts), ("test", docstrings()[:3])):
            (tmp_path / split).mkdir()
            write_jsonl(tmp_path / split / "0.jsonl", part)
    else:
        write_parquet(tmp_path, column="prose", label=3)
    data = load(data_config(tmp_path, max_train_tokens=None, **config))
    tokens = encoded(texts)
    assert data.train.tokens.flatten().tolist() == tokens[: len(tokens) // LENGTH * LENGTH]


@pytest.mark.parametrize("name", ["one.jsonl", "one.txt", "train.parquet"])
def test_the_end_of_a_single_file_is_held_out(tmp_path, name):
    if name.endswith("jsonl"):
        write_jsonl(tmp_path / name, docstrings())
    elif name.endswith("txt"):
        (tmp_path / name).write_text("\n".join(docstrings()))
    else:
        write_parquet(tmp_path, ["train"])
    data = load(data_config(tmp_path / name, max_train_tokens=None, max_eval_tokens=None, holdout=0.1))
    every = load(data_config(tmp_path / name, max_train_tokens=None, holdout=0.5, max_eval_tokens=None))
    together = torch.cat([every.train.tokens, every.eval.tokens])
    assert torch.equal(torch.cat([data.train.tokens, data.eval.tokens]), together)
    assert len(data.eval) == round(0.1 * len(together))


def test_rows_that_are_no_text_are_named(tmp_path):
    rows = [{"text": text if i % 2 else i} for i, text in enumerate(docstrings())]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, [{"text": "words"}, *rows])))
    with pytest.raises(ValueError, match="mixed.jsonl"):
        load(data_config(tmp_path / "mixed.jsonl", holdout=0.1))


def test_a_split_without_another_is_held_out_of(folder):
    data = load(data_config(folder, eval_split=None, holdout=0.25, max_train_tokens=None, max_eval_tokens=None))
    assert len(data.eval) / (len(data.eval) + len(data.train)) == pytest.approx(0.25, abs=0.01)


# ---- batches ----
def test_a_batch(folder):
    data = load(data_config(folder))
    batch = TextCollator(data.train)([5, 0, 63])
    assert torch.equal(batch["input_ids"], data.train.tokens[[5, 0, 63]].long())
    assert (batch["labels"][:, 0] == -100).all() and torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
    assert batch.keys() == {"input_ids", "labels"}  # tensors alone: a CUDA graph holds them
    assert TextCollator(data.eval, evaluation=True)([0])["use_cache"] is False
    model = make_model()
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    torch.testing.assert_close(model(**batch).loss.double(), expected)


# ---- streams ----
def blocks_of(stream, epoch=0, seed=0):
    stream.set_epoch(epoch)
    stream.seed = seed
    return torch.cat(list(DataLoader(stream, batch_size=16, collate_fn=torch.stack)))


def test_a_stream_has_the_blocks_of_the_same_text_in_memory(folder):
    data, whole = load(data_config(folder, streaming=True, shuffle_buffer=10)), load(data_config(folder))
    assert isinstance(data.train, TokenStream) and isinstance(data.eval, TokenBlocks) and len(data.train) == 64
    assert torch.equal(data.eval.tokens, whole.eval.tokens)
    rows = {tuple(row.tolist()) for row in whole.train.tokens}
    first, again, next_epoch, other = (blocks_of(data.train, *at) for at in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert torch.equal(first, again)
    for shuffled in (first, next_epoch, other):
        assert {tuple(row.tolist()) for row in shuffled} == rows and len(shuffled) == 64
        assert not torch.equal(shuffled, whole.train.tokens)
    assert not torch.equal(first, next_epoch) and not torch.equal(first, other)
    assert torch.equal(torch.stack(data.train.first(5)), whole.train.tokens[:5])


def test_a_stream_shorter_than_its_epoch_is_repeated(tmp_path):
    write_parquet(tmp_path)
    blocks = len(load(data_config(tmp_path, max_train_tokens=None)).train)
    data = load(data_config(tmp_path, streaming=True, max_train_tokens=(blocks + 5) * LENGTH))
    assert len(blocks_of(data.train)) == blocks + 5


# ---- generated tasks ----
@pytest.mark.parametrize("seed", [0, 1])
def test_induction(seed):
    config = TextDataConfig(path="induction", block_size=20, num_symbols=6, max_train_tokens=20 * 300)
    data = load_text_data(config, text_tokenizer(config), seed=seed)
    tokens = data.train.tokens
    assert tokens.shape == (300, 20) and len(data.eval) == 1024 and set(tokens.unique().tolist()) == set(range(7))
    for row, answer in zip(tokens, data.train.answers):
        marks = (row == 0).nonzero()[:, 0].tolist()
        assert len(marks) == 2 and marks[1] == 18
        assert row[19] == row[marks[0] + 1] and row[19] != 0
        assert answer.nonzero()[:, 0].tolist() == [19]
    assert {(row == 0).nonzero()[0].item() for row in tokens} == set(range(17))
    labels = TextCollator(data.train)([0, 1])["labels"]
    assert (labels[:, :-1] == -100).all() and torch.equal(labels[:, -1], tokens[:2, -1].long())
    assert not torch.equal(tokens, load_text_data(config, data.tokenizer, seed=seed + 2).train.tokens)
    assert torch.equal(tokens, load_text_data(config, data.tokenizer, seed=seed).train.tokens)


def test_selective_copying():
    config = TextDataConfig(path="selective_copying", block_size=24, num_symbols=5, num_to_copy=4)
    data = load_text_data(config, text_tokenizer(config))
    tokens = data.train.tokens[:200]
    for row, answer in zip(tokens, data.train.answers):
        context, mark, copy = row[:19], row[19], row[20:]
        assert mark == 0 and context[context != 1].tolist() == copy.tolist() and (copy > 1).all()
        assert answer.nonzero()[:, 0].tolist() == [20, 21, 22, 23]
    assert set(tokens.unique().tolist()) == set(range(7))


def test_generated_tasks_have_words():
    config = TextDataConfig(path="selective_copying", block_size=24, num_symbols=5, num_to_copy=4)
    tokenizer = text_tokenizer(config)
    assert tokenizer("mark blank s0 s4")["input_ids"] == [0, 1, 2, 6] and len(tokenizer) == 7


# ---- tokenizers ----
def test_bytes_come_back_and_are_saved(tmp_path):
    tokenizer = byte_tokenizer()
    text = "Héllo,\n\twörld 漢字 \x00 end"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and len(tokenizer) == 257
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(text)["input_ids"] == ids and loaded.decode(ids) == text and loaded.eos_token_id == 0


# ---- bad input ----
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(path=""), "`path` must be a non-empty string"),
        (dict(block_size=1), "`block_size` must be a whole number of at least 2, got 1"),
        (dict(max_train_tokens=31), "`max_train_tokens` must be .* at least 32, one block, got 31"),
        (dict(max_eval_tokens=True), "`max_eval_tokens` must be a whole number"),
        (dict(holdout=1), r"`holdout` must be in \(0, 1\), got 1"),
        (dict(streaming="yes"), "`streaming` must be true or false"),
        (dict(streaming=True, max_train_tokens=None), "`streaming` needs `max_train_tokens`"),
        (dict(streaming=True, eval_split=None), "`streaming` needs an `eval_split`"),
        (dict(path="induction", block_size=3), "`block_size` must be at least 4 for 'induction', got 3"),
        (dict(path="selective_copying", num_to_copy=16), "`block_size` must be at least 33 for 'selective_copying'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is generated")
def test_settings_that_cannot_be(changes, message):
    defaults = dict(path="x", tokenizer="bytes", block_size=32, max_train_tokens=None, max_eval_tokens=None)
    with pytest.raises(ValueError, match=message):
        TextDataConfig(**{**defaults, **{"max_train_tokens": 64, "max_eval_tokens": 64}, **changes})


def test_what_a_generated_task_ignores_is_said():
    with pytest.warns(UserWarning, match=r"'induction' is generated: `data` ignores \['tokenizer', 'streaming'\]"):
        TextDataConfig(path="induction", tokenizer="bytes", streaming=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train_split="trian"), r"has no split 'trian'; choose from \['test', 'train'\]"),
        (dict(eval_split="validation"), r"has no split 'validation'; choose from \['test', 'train'\]"),
        (dict(text_column="txt"), r"`data.text_column`: no column 'txt'; choose from \['text'\]"),
        (dict(path="./nowhere"), "there is no file or folder './nowhere'"),
        (dict(tokenizer=None), "`data.tokenizer` is missing: name a folder, a hub id, or `bytes`"),
        (dict(tokenizer="./nowhere"), "no folder './nowhere' to load a tokenizer from"),
        (
            dict(block_size=10**6, max_train_tokens=None, max_eval_tokens=None),
            "tokens, fewer than one block of 1000000",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_are_not_there(folder, changes, message, streaming):
    if streaming:
        changes = {**changes, "streaming": True, "max_train_tokens": 10**7}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(data_config(folder, **changes))
    assert "\n" not in str(caught.value)


def test_files_without_text(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [""])
    write_jsonl(tmp_path / "test.jsonl", ["some"])
    with pytest.raises(ValueError, match="Split 'train' of .* is empty"):
        load(data_config(tmp_path, eval_split="train"))
    with pytest.raises(ValueError, match="Split 'test' of .* has 5 tokens, fewer than one block of 32; lower"):
        load(data_config(tmp_path))
    (tmp_path / "numbers.jsonl").write_text('{"a": 1, "b": "x", "c": "y"}\n')
    with pytest.raises(ValueError, match=r"No text column found among \['a', 'b', 'c'\]; name it with"):
        load(data_config(tmp_path / "numbers.jsonl"))
    with pytest.raises(ValueError, match="Column 'a' holds no text but int"):
        load(data_config(tmp_path / "numbers.jsonl", text_column="a"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load(data_config(tmp_path / "binary.txt"))
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"none of the kinds of files that are read: \['.parquet', "):
        load(data_config(tmp_path / "table.csv"))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="Cannot read '[^']*damaged.parquet': "):
        load(data_config(tmp_path / "damaged.parquet"))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="Cannot read split 'train' of '[^']*shards': "):
        load(data_config(tmp_path / "shards", eval_split="train"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no parquet, json or txt files"):
        load(data_config(tmp_path / "empty"))


def test_a_folder_with_a_model_alone_holds_no_tokenizer(tmp_path):
    """transformers would make one up that knows no words."""
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


# ---- training ----
class Gradients(TrainerCallback):
    """The gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters()})


@pytest.mark.parametrize("data", ["text", "answers"])
@pytest.mark.parametrize("distillation, hidden", [(0.0, 0.0), (0.4, 0.0), (0.0, 5.0)])
def test_accumulated_micro_batches_are_one_batch(tmp_path, folder, data, distillation, hidden):
    """Where answers are few and unevenly many, the mean over tokens is not the mean of the micro-batches' means."""
    loaded = load(data_config(folder))
    if data == "answers":
        torch.manual_seed(3)
        loaded.train.answers = torch.rand(loaded.train.tokens.shape) < torch.linspace(0.02, 0.6, 64)[:, None]
    found = []
    for batch, accumulate in ((16, 1), (4, 4)):
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path / f"{batch}",
            loaded,
            method="refill",
            rewind="none",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            distillation_weight=distillation,
            distillation_hidden_weight=hidden,
            max_grad_norm=0.0,
        )
        trainer.add_callback(gradients)
        trainer.train()
        found.append((gradients.steps, [e["loss"] for e in trainer.run_state.history if "loss" in e]))
    (one, losses), (many, others) = found
    assert len(one) == len(many) == 8 and losses == pytest.approx(others, rel=1e-3)
    for step in (0, 4):  # the first of each stage: later ones differ by what rounding made of the earlier
        for name, gradient in one[step].items():
            torch.testing.assert_close(
                many[step][name], gradient, rtol=1e-2 if step else 1e-4, atol=1e-4 if step else 1e-6
            )


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16", "compile_blocks", "streaming"])
def test_options_do_not_change_what_is_learned(tmp_path, folder, option, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    arguments = {} if option == "streaming" else {option: True}
    if option == "gradient_checkpointing":
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    losses = []
    for name, more in (("plain", {}), (option, arguments)):
        changes = {"streaming": True} if name == "streaming" else {}
        trainer = make_trainer(tmp_path / name, load(data_config(folder, **changes)), **more)
        trainer.train()
        losses.append([e["loss"] for e in trainer.run_state.history if "loss" in e])
        assert math.isfinite(trainer.run_state.metrics["recover-1"]["end"]["eval_loss"])
    assert len(losses[0]) == len(losses[1]) == 12
    tolerance = {"bf16": 0.05, "streaming": 0.1}.get(option, 1e-3)  # bf16 rounds; a stream has another order
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0][-1] < losses[0][0]


def test_the_evaluation_keeps_no_logits(tmp_path, folder):
    """They would be (B, L, vocabulary) on the host, for all batches."""

    class Seen(RSSTTrainer):
        sizes = []

        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            self.sizes.append(logits)
            return loss, logits, labels

    trainer = make_trainer(tmp_path, load(data_config(folder)), cls=Seen)
    trainer.train()
    assert Seen.sizes and all(logits is None for logits in Seen.sizes)
