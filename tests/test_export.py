"""Language models in the formats of others. What a clean process makes of a folder, one process makes of them all."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import BIDIRECTIONAL, MIXER_TARGETS, batch_of, logits_of, make, random_masks
from tokenizers import Tokenizer, models, pre_tokenizers

import mamba_rsst
from mamba_rsst import MambaForCausalLM, find_groups, shrink_
from mamba_rsst.cli import main
from mamba_rsst.convert import convert_checkpoint
from mamba_rsst.evaluation import count_macs_per_item, count_parameters, language_model_costs
from mamba_rsst.export import Export, export_checkpoint, inspect_model, to_transformers
from mamba_rsst.hub import load_model


# name -> (kind of model, config, whether its layers differ, dtype)
CASES = {
    "mamba": ("lm", {}, False, "float32"),
    "mamba-untied": ("lm", dict(tie_word_embeddings=False), False, "float32"),
    "mamba-plain": ("lm", dict(use_bias=False, d_inner=40), False, "float32"),
    "mamba-no-conv-bias": ("lm", dict(use_conv_bias=False), True, "float32"),
    "mamba-padded": ("lm", {}, True, "float32"),
    "mamba-padded-untied": ("lm", dict(tie_word_embeddings=False, use_bias=False), True, "float32"),
    "mamba-whole-numbers": ("lm", dict(time_step_scale=1, time_step_max=1, expand=2.3), False, "float32"),
    "mamba-bfloat16": ("lm", {}, False, "bfloat16"),
    "mamba-padded-bfloat16": ("lm", dict(tie_word_embeddings=False), True, "bfloat16"),
    "falcon": ("lm_norms", {}, False, "float32"),
    "falcon-untied": ("lm_norms", dict(tie_word_embeddings=False, mixer_rms_eps=1e-3), False, "float32"),
    "falcon-padded": ("lm_norms", {}, True, "float32"),
    "falcon-padded-plain": ("lm_norms", dict(use_bias=False, mixer_rms_eps=1e-3), True, "float32"),
    "falcon-padded-bfloat16": ("lm_norms", {}, True, "bfloat16"),
}
GENERATION = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)

# Every folder named on the command line, loaded where the package cannot be imported: {folder: what came of it}.
CLEAN = """
import sys
sys.modules["mamba_rsst"] = None  # any import of the package fails from here on
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, results = torch.load("ids.pt"), {}
for folder in sys.argv[2:]:
    options = {"trust_remote_code": True} if sys.argv[1] == "remote" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        logits = model(ids).logits
    results[folder] = {
        "class": type(model).__module__ + "." + type(model).__name__,
        "dtype": model.dtype,
        "logits": logits,
        "tokens": model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None),
        "ids": AutoTokenizer.from_pretrained(folder, **options)("w7 w3 w9").input_ids,
        "penalty": model.generation_config.repetition_penalty,
    }
assert not [name for name in sys.modules if name.startswith("mamba_rsst.")]
torch.save(results, "results.pt")
"""


def cut_unevenly(model):
    shrink_(model, random_masks(find_groups(model, MIXER_TARGETS), seed=4))
    assert all(isinstance(getattr(model.config, target), list) for target in MIXER_TARGETS)
    return model


def save(model, folder):
    """The model with a tokenizer of its 53 words and a generation config."""
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(53)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def in_a_clean_process(kind, folders, home):
    """What CLEAN makes of the folders, with "remote" code or the "stock" classes."""
    folders = [str(folder) for folder in folders]
    home.mkdir(exist_ok=True)
    torch.save(batch_of(make("lm"))["input_ids"], home / "ids.pt")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules")}
    # The environment's packages stay, and of PYTHONPATH all but this one.
    here = Path(mamba_rsst.__file__).parents[1]
    paths = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != here]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", CLEAN, kind, *folders]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(home / "results.pt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """case -> (what was written, the model it came from as this package loads it, the exported folder), and what a
    clean process made of the folders."""
    root, made = tmp_path_factory.mktemp("exported"), {}
    for case, (kind, config, uneven, dtype) in CASES.items():
        model = make(kind, **config)
        save((cut_unevenly(model) if uneven else model).to(getattr(torch, dtype)), root / case)
        done = export_checkpoint(root / case, root / f"{case}-out", pad=uneven)
        made[case] = (done, MambaForCausalLM.from_pretrained(root / case), root / f"{case}-out")
    return made, in_a_clean_process("stock", [out for *_, out in made.values()], root / "clean")


@pytest.mark.parametrize("case", CASES)
def test_the_stock_classes_compute_the_same(exported, case):
    made, results = exported
    done, model, out = made[case]
    kind, _, uneven, dtype = CASES[case]
    got = results[str(out)]
    stock = "FalconMambaForCausalLM" if kind == "lm_norms" else "MambaForCausalLM"
    assert got["class"].startswith("transformers.models.") and got["class"].endswith("." + stock)
    assert str(got["dtype"]) == f"torch.{dtype}" and done.dtype == dtype
    ids = batch_of(model)["input_ids"]
    expected = logits_of(model, {"input_ids": ids})
    if dtype == "bfloat16":  # the stock classes round A_log, D and dt's bias too, and the scan at other places
        assert (got["logits"].float() - expected).abs().mean() < 0.04 < 0.1 * expected.abs().mean()
    else:
        torch.testing.assert_close(got["logits"], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(got["tokens"], model.generate(ids, **GENERATION))
    assert got["ids"] == [7, 3, 9] and got["penalty"] == 1.25
    content = json.loads((out / "config.json").read_text())
    assert content["model_type"] == ("falcon_mamba" if kind == "lm_norms" else "mamba") == done.model_type
    assert content["dtype"] == dtype and "auto_map" not in content and not list(out.glob("*.py"))
    assert bool(done.padded) == uneven


@pytest.mark.parametrize("case", CASES)
def test_and_back(exported, case):
    """The exported folder in this package's class: the same weights, fp32 ones in a bfloat16 checkpoint too."""
    _, model, out = exported[0][case]
    kind, config, uneven, dtype = CASES[case]
    again = MambaForCausalLM.from_pretrained(out)
    tied = config.get("tie_word_embeddings", True)
    assert (again.lm_head.weight is again.backbone.embeddings.weight) == tied == again.config.tie_word_embeddings
    assert again.dtype == model.dtype and again.backbone.layers[0].mixer.A_log.dtype == torch.float32
    if uneven:
        got, expected = logits_of(again), logits_of(model)
        if dtype == "bfloat16":
            assert (got - expected).abs().mean() < 0.04
        else:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(logits_of(again), logits_of(model))
        for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
            assert torch.equal(a, b), name
        fields = ("d_inner", "d_state", "dt_rank", "d_conv", "mixer_rms_eps", "use_bias", "use_conv_bias", "norm")
        for field in (*fields, "layer_norm_epsilon", "residual_in_fp32", "vocab_size", "eos_token_id"):
            assert getattr(again.config, field) == getattr(model.config, field), field


def test_trained_fp32_values_survive_in_a_bfloat16_export(tmp_path):
    """A_log, D and dt's bias are kept in fp32; the file has them so, whatever the stock class reads them as."""
    save(make("lm").bfloat16(), tmp_path / "model")
    model = MambaForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.add_(1e-5)
    model.save_pretrained(tmp_path / "trained")
    export_checkpoint(tmp_path / "trained", tmp_path / "out")
    again = MambaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.backbone.layers[0].mixer.A_log, model.backbone.layers[0].mixer.A_log)


def test_what_padding_costs(exported):
    done, model, out = exported[0]["falcon-padded"]
    widths = {target: model.config.widths(target) for target in MIXER_TARGETS}
    assert done.padded == {target: (values, max(values)) for target, values in widths.items()}
    assert done.before == language_model_costs(model.config, model.dtype)
    assert done.before["parameters"] == count_parameters(model)
    stock = load_model(out)
    assert done.after["parameters"] == count_parameters(stock) == stock.num_parameters()
    assert all(done.after[key] > done.before[key] for key in done.before)
    even = exported[0]["falcon"][0]
    assert even.padded == {} and even.before == even.after


@pytest.mark.parametrize("kind", ["lm", "lm_norms", "lm_mlp"])
def test_costs_are_those_of_the_model_itself(kind):
    model = cut_unevenly(make(kind))
    costs = language_model_costs(model.config, torch.float32)
    ids = torch.zeros(2, 9, dtype=torch.long)
    assert costs["parameters"] == count_parameters(model) == model.num_parameters()
    assert costs["macs_per_token"] == count_macs_per_item(model, {"input_ids": ids}) // 9
    width, state = model.config.widths("d_inner"), model.config.widths("d_state")
    assert costs["state_bytes"] == 4 * sum(e * (3 + n) for e, n in zip(width, state))
    in_half = language_model_costs(model.config, torch.bfloat16)["state_bytes"]
    assert in_half == sum(e * (2 * 3 + 4 * n) for e, n in zip(width, state))


@pytest.mark.parametrize("kind", ["lm", "lm_norms"])
def test_in_memory(kind):
    model = make(kind)
    stock = to_transformers(model)
    assert stock.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr() and not stock.training
    assert not [n for n, t in (*stock.named_parameters(), *stock.named_buffers()) if t.is_meta]
    torch.testing.assert_close(logits_of(stock), logits_of(model), atol=1e-5, rtol=1e-5)
    ids = batch_of(model)["input_ids"]
    assert torch.equal(stock.generate(ids, **GENERATION), model.generate(ids, **GENERATION))
    with pytest.raises(ValueError, match="its layers differ in d_inner"):
        to_transformers(cut_unevenly(model))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("tied, norm", [(True, "rms"), (False, "layer")])
def test_mamba_ssm_and_back(tmp_path, uneven, tied, norm):
    model = make("lm", d_inner=60, tie_word_embeddings=tied, norm=norm)
    if uneven:  # one layer keeps all channels, so that the widest is a multiple of the hidden size
        groups = find_groups(model, MIXER_TARGETS)
        masks = random_masks(groups, seed=4)
        masks[groups[0].name][:] = True
        shrink_(model, masks)
    save(model, tmp_path / "model")
    done = export_checkpoint(tmp_path / "model", tmp_path / "out", format="mamba_ssm", pad=uneven)
    assert isinstance(done, Export) and done.model_type is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "pytorch_model.bin", "tokenizer.json"} <= names and "model.safetensors" not in names
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["ssm_cfg"]["expand"] == 3 and content["vocab_size"] == 53
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert "backbone.embedding.weight" in weights and "lm_head.weight" in weights  # it loads them strictly
    again = convert_checkpoint(tmp_path / "out")
    close = dict(atol=1e-5, rtol=1e-5) if uneven else dict(atol=0, rtol=0)
    torch.testing.assert_close(logits_of(again), logits_of(model), **close)


def test_a_stock_model_to_mamba_ssm_and_on_to_stock(tmp_path):
    stock = make("mamba", intermediate_size=40)
    stock.save_pretrained(tmp_path / "stock")
    export_checkpoint(tmp_path / "stock", tmp_path / "original", format="mamba_ssm")
    export_checkpoint(tmp_path / "original", tmp_path / "again")
    again = load_model(tmp_path / "again").state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, again[name]), name


def test_an_uneven_model_as_it_is_without_the_package(tmp_path):
    """Remote code: model, tokenizer and generation from the folder alone."""
    models_ = {kind: cut_unevenly(make(kind)) for kind in ("lm", "lm_norms")}
    for kind, model in models_.items():
        save(model, tmp_path / kind)
    results = in_a_clean_process("remote", [tmp_path / kind for kind in models_], tmp_path / "clean")
    for kind, model in models_.items():
        got, ids = results[str(tmp_path / kind)], batch_of(model)["input_ids"]
        assert got["class"].startswith("transformers_modules.")
        torch.testing.assert_close(got["logits"], logits_of(model, {"input_ids": ids}), atol=1e-6, rtol=1e-5)
        assert torch.equal(got["tokens"], model.generate(ids, **GENERATION))
        assert got["ids"] == [7, 3, 9] and got["penalty"] == 1.25


# ---- what cannot be exported ----
SAVED = {
    "UNEVEN": lambda: cut_unevenly(make("lm")),
    "FALCON": lambda: make("lm_norms"),
    "MLP": lambda: make("lm_mlp"),
    "LAYER": lambda: make("lm", norm="layer"),
    "EPS": lambda: make("lm", d_inner=40, layer_norm_epsilon=1e-6),
    "STOCK": lambda: make("mamba"),
    "VISION": lambda: make(BIDIRECTIONAL[0]),
    "UNEVENMLP": lambda: cut_unevenly(make("lm_mlp")),
}
REFUSED = [
    (["UNEVEN"], ["differ in d_inner [", "d_state [", "dt_rank [", "--pad", "trust_remote_code=True"]),
    (["UNEVEN", "--pad", "--format", "mamba_ssm"], ["multiple of its hidden_size 20"]),
    (["FALCON", "--format", "mamba_ssm"], ["norms of B, C and dt"]),
    (["EPS", "--format", "mamba_ssm"], ["epsilon is 1e-06"]),
    (["MLP"], ["MLPs"]),
    (["MLP", "--format", "mamba_ssm"], ["MLPs without gates"]),
    (["UNEVENMLP", "--pad"], ["MLPs"]),
    (["LAYER"], ["its norms are 'layer'"]),
    (["VISION"], ["image classifier", "trust_remote_code=True"]),
    (["STOCK"], ["transformers' own mamba already"]),
    (["STOCK", "--format", "gguf"], ["'gguf'", "['transformers', 'mamba_ssm']"]),
    (["./absent"], ["'./absent'"]),
]


@pytest.mark.parametrize("argv, names", REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_cannot_be_exported_is_one_sentence(tmp_path, capsys, argv, names):
    word, *options = argv
    if word in SAVED:
        SAVED[word]().save_pretrained(tmp_path / word)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    model = str(tmp_path / word) if word in SAVED else word
    assert main(["export", model, str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("mamba-rsst export: error: ") and said.err.count("\n") == 1
    assert all(name in said.err for name in (*names, *([model] if "gguf" not in options else [])))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save(make("lm"), tmp_path / "model")

    def full(self, folder, **kwargs):
        Path(folder).mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(transformers.MambaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        export_checkpoint(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        export_checkpoint(tmp_path / "model", tmp_path / "out")


# ---- the command line ----
def shell(*argv, cwd):
    command = [sys.executable, "-m", "mamba_rsst", *map(str, argv)]
    here = str(Path(mamba_rsst.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": here + os.pathsep + os.environ.get("PYTHONPATH", "")}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=env)


def test_the_command_refuses_and_pads(tmp_path, capsys):
    model = cut_unevenly(make("lm"))
    save(model, tmp_path / "model")
    refused = shell("export", "model", "out", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1, refused.stderr
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--pad"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    before = language_model_costs(model.config, torch.float32)
    after = language_model_costs(MambaForCausalLM.from_pretrained(tmp_path / "out").config, torch.float32)
    assert f"parameters from {before['parameters']:,} back to {after['parameters']:,} (+" in said.out
    assert f"MACs a token from {before['macs_per_token']:,} back to {after['macs_per_token']:,} (+" in said.out
    assert (
        f"Saved to {tmp_path / 'out'}: transformers' own mamba, {after['parameters']:,} parameters (float32)."
        in said.out
    )


def places(folder):
    return {place["where"]: place for place in inspect_model(folder)["runs_in"]}


def runs(folder):
    return {where for where, place in places(folder).items() if place["runs"]}


REMOTE = "transformers, trust_remote_code=True"


def test_inspect_says_where_a_model_runs_and_its_commands_make_it_so(tmp_path, capsys):
    save(make("lm", d_inner=40, use_bias=False), tmp_path / "even")
    save(cut_unevenly(make("lm_norms")), tmp_path / "un even")
    assert runs(tmp_path / "even") == runs(tmp_path / "un even") == {"mamba_rsst", REMOTE}
    for folder, where, expected in (
        ("even", "transformers", {"mamba_rsst", "transformers", "vLLM", "llama.cpp"}),
        ("un even", "vLLM", {"mamba_rsst", "transformers", "vLLM"}),
    ):
        command = shlex.split(places(tmp_path / folder)[where]["command"])
        out = tmp_path / f"{folder} out"
        assert main([str(out) if word == "OUT" else word for word in command[1:]]) == 0
        assert runs(out) == expected
    assert places(tmp_path / "even")["mamba_ssm"]["command"].endswith("OUT --format mamba_ssm")


@pytest.mark.parametrize(
    "kind, config, where, why",
    [
        ("lm", {}, "llama.cpp", "d_inner = 2 × hidden_size = 40, here 46"),
        ("lm", dict(d_inner=40), "llama.cpp", "no biases in in_proj"),
        ("lm", dict(d_inner=40, use_bias=False, use_conv_bias=False), "llama.cpp", "the convolution's bias"),
        ("lm", dict(d_state=257), "vLLM", "d_state is 257"),
        ("lm_mlp", {}, "vLLM", "MLPs"),
        ("lm_mlp", {}, "transformers", "MLPs"),
        ("lm_norms", {}, "mamba_ssm", "norms of B, C and dt"),
        ("v1", {}, "vLLM", "no such image classifier"),
    ],
)
def test_inspect_says_why_not(tmp_path, kind, config, where, why):
    make(kind, **config).save_pretrained(tmp_path)
    place = places(tmp_path)[where]
    assert not place["runs"] and why in place["why"] and place["command"] is None


def test_a_folder_without_its_code(tmp_path):
    make("lm").save_pretrained(tmp_path)
    (tmp_path / "modeling_mamba_rsst.py").unlink()
    assert not places(tmp_path)[REMOTE]["runs"]


def test_inspect_json(tmp_path, capsys):
    save(cut_unevenly(make("lm")), tmp_path / "model")
    argv = ["inspect", str(tmp_path / "model"), "--json"]
    assert main([*argv, "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*argv, str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text()) == found == inspect_model(tmp_path / "model")
    config = MambaForCausalLM.from_pretrained(tmp_path / "model").config
    assert [layer["d_inner"] for layer in found["layers"]] == config.d_inner
    assert f"parameters  {found['parameters']:,}  (torch.float32; tied embeddings counted once)" in printed
    assert f"MACs        {found['macs_per_token']:,} a token" in printed and "KiB a sequence" in printed
    assert main([*argv, str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err


def test_stock_and_ours_have_the_same_figures(exported):
    _, model, out = exported[0]["falcon"]
    ours, stock = inspect_model(out.with_name("falcon")), inspect_model(out)
    for key in ("layers", "parameters", "macs_per_token", "state_bytes", "dtype"):
        assert ours[key] == stock[key], key
