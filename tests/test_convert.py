import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import LANGUAGE, logits_of, make

from mamba_rsst import MambaForCausalLM
from mamba_rsst.cli import main
from mamba_rsst.convert import config_from_mamba_ssm, convert_checkpoint


# A config.json as mamba_ssm's MambaLMHeadModel.save_pretrained writes it.
MAMBA_SSM = dict(
    **dict(d_model=20, d_intermediate=0, n_layer=2, vocab_size=51, attn_layer_idx=[], attn_cfg={}, rms_norm=True),
    ssm_cfg=dict(layer="Mamba1", expand=2.3, d_state=7, d_conv=3, dt_rank=5, bias=True),
    **dict(residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=53, tie_embeddings=True),
)


def save_as_mamba_ssm(model, folder, file="pytorch_model.bin", **changes):
    """The model in the original format: the embedding's name is another, the head is there though tied."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MAMBA_SSM, **changes}))
    weights = {k.replace("embeddings", "embedding"): v.clone() for k, v in model.state_dict().items()}
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_from_mamba_ssm(tmp_path, file, tied, norm):
    model = make("lm", tie_word_embeddings=tied, norm=norm)
    save_as_mamba_ssm(model, tmp_path / "original", file, tie_embeddings=tied, rms_norm=norm == "rms")
    converted = convert_checkpoint(tmp_path / "original")
    assert type(converted) is MambaForCausalLM and not converted.training
    assert torch.equal(logits_of(converted), logits_of(model))
    assert (converted.lm_head.weight is converted.backbone.embeddings.weight) == tied
    converted.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(MambaForCausalLM.from_pretrained(tmp_path / "ours")), logits_of(model))


def test_dtype_of_a_mamba_ssm_checkpoint(tmp_path):
    save_as_mamba_ssm(make("lm").half(), tmp_path)
    model = convert_checkpoint(tmp_path)
    assert model.dtype == torch.float16 and model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert convert_checkpoint(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_the_config_of_mamba_130m():
    """As it lies on the Hub: most of it left to the library's defaults."""
    content = dict(d_model=768, n_layer=24, vocab_size=50277, ssm_cfg={}, rms_norm=True, residual_in_fp32=True)
    config = config_from_mamba_ssm({**content, "fused_add_norm": True, "pad_vocab_size_multiple": 8})
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 24, 50280)
    assert (config.d_inner, config.d_state, config.dt_rank, config.d_conv) == (1536, 16, 48, 4)
    assert (config.use_bias, config.use_conv_bias, config.norm, config.tie_word_embeddings) == (
        False,
        True,
        "rms",
        True,
    )


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_from_transformers(tmp_path, kind):
    model = make(kind)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(convert_checkpoint(tmp_path)), logits_of(model), atol=1e-5, rtol=1e-5)


def edit(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def edit_weights(change):
    def apply(folder):
        weights = torch.load(folder / "pytorch_model.bin")
        change(weights)
        torch.save(weights, folder / "pytorch_model.bin")

    return apply


class Code:
    """What a file of tensors must not hold."""


A_LOG = "backbone.layers.0.mixer.A_log"
WRONG = [
    (shutil.rmtree, "There is no model folder"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "has model_type None; what can be converted are"),
    (edit(model_type="bert"), r"has model_type 'bert'; what can be converted are \['mamba', 'falcon_mamba'\] and"),
    (edit(model_type="mamba_rsst"), "has model_type 'mamba_rsst'; what can be converted"),
    (edit(ssm_cfg={"layer": "Mamba2"}), "cannot be converted: its layers are Mamba2, and only Mamba1 is supported"),
    (edit(attn_layer_idx=[1]), "cannot be converted: it has attention layers"),
    (edit(d_intermediate=64), "cannot be converted: it has gated MLPs"),
    (edit(ssm_cfg={"d_stat": 7}), r"unknown key 'd_stat' in its ssm_cfg; known are \['bias'"),
    (edit(d_model="wide"), "cannot be converted: .*hidden_size"),
    (lambda folder: (folder / "pytorch_model.bin").unlink(), "has no weights: looked for model.safetensors and"),
    (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"no tensors"),
        "pytorch_model.bin of .* cannot be read",
    ),
    (lambda folder: torch.save(Code(), folder / "pytorch_model.bin"), "pytorch_model.bin of .* cannot be read"),
    (lambda folder: torch.save([1], folder / "pytorch_model.bin"), "pytorch_model.bin of .* cannot be read .*a list"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"{"), "model.safetensors of .* cannot be read"),
    (edit(ssm_cfg={"d_state": 6}), "of its weights have another shape than its config says, the first is 'backbone"),
    (edit_weights(lambda w: w.pop(A_LOG)), f"1 of its weights are missing, the first is '{A_LOG}'"),
    (
        edit_weights(lambda w: w.update(extra=torch.zeros(1))),
        "1 of its weights are not part of this architecture, the first is 'extra'",
    ),
]


@pytest.mark.parametrize("damage, message", WRONG)
def test_what_cannot_be_converted_is_named(tmp_path, damage, message, capsys):
    folder = tmp_path / "original"
    save_as_mamba_ssm(make("lm"), folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_checkpoint(folder)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mamba-rsst convert: error: ") and said.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path != folder], "nothing is left behind"


def test_a_transformers_checkpoint_with_missing_weights_is_named(tmp_path):
    model = make("mamba")
    weights = {k: v.clone() for k, v in model.state_dict().items() if k not in ("lm_head.weight", A_LOG)}
    model.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of its weights are missing, the first is '{A_LOG}'"):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["mamba", "lm"])
def test_command_line(tmp_path, capsys, kind):
    original, out = tmp_path / "original", tmp_path / "out"
    model = make(kind)
    if kind == "lm":
        save_as_mamba_ssm(model, original)
    else:
        model.save_pretrained(original)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (original / name).write_text("{}")
    assert main(["convert", str(original), str(out)]) == 0
    assert capsys.readouterr().out == f"Saved to {out}: {model.num_parameters():,} parameters (torch.float32).\n"
    torch.testing.assert_close(logits_of(MambaForCausalLM.from_pretrained(out)), logits_of(model))
    assert {path.name for path in out.glob("*token*.json")} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert (out / "modeling_mamba_rsst.py").is_file() and not list(tmp_path.glob(".*"))
    assert main(["convert", str(original), str(out)]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err


def test_tokenizer_of_a_model_on_the_hub(tmp_path, monkeypatch):
    """Only its small files are fetched; all requests end here."""
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "tokenizer.json").write_text("{}")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, "tokenizer*" in allow_patterns and "*.safetensors" not in allow_patterns))
        return str(tmp_path / "cached")

    monkeypatch.setattr("mamba_rsst.hub.snapshot_download", download)
    monkeypatch.setattr("mamba_rsst.convert.convert_checkpoint", lambda name: make("lm"))
    assert main(["convert", "somebody/mamba", str(tmp_path / "out")]) == 0
    assert asked == [("somebody/mamba", True)]
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_language_model_through_the_other_commands(tmp_path, capsys, kind):
    make(kind).save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "MambaForCausalLM" in capsys.readouterr().out
    options = ["--target", "d_inner", "--sparsity", "0.5", "--round-to", "1"]
    assert main(["prune", str(tmp_path / "model"), str(tmp_path / "cut"), *options]) == 0
    config = MambaForCausalLM.from_pretrained(tmp_path / "cut").config
    assert sum(config.widths("d_inner")) == 46
