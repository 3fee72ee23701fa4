import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LANGUAGE, logits_of, make
from tiny_runs import assert_same_state, load_stage
from transformers.utils.logging import get_verbosity

from mamba_rsst.hub import load_model


@pytest.fixture
def saved(finished_run, tmp_path):
    """A folder with the two files that matter, to be damaged."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished_run[0] / name, folder)
    return folder


@pytest.fixture
def said_by_transformers():
    """The messages that transformers logs."""
    handler, messages = logging.Handler(), []
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


def edit_config(**changes):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return edit


def edit_weights(change):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


A_LOG = "backbone.layers.0.mixer.A_log"


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (shutil.rmtree, FileNotFoundError, "There is no model folder"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (write("config.json", b"{"), ValueError, "config.json that is not valid JSON: .*line 1"),
        (write("config.json", b"\xff\xfe"), ValueError, "config.json that is not valid JSON"),
        (write("config.json", b"[]"), ValueError, r"model_type None; supported are \['falcon_mamba', 'mamba', "),
        (write("config.json", b"{}"), ValueError, "model_type None"),
        (edit_config(model_type="bert"), ValueError, "model_type 'bert'; supported are .*'mamba_rsst_vision'"),
        (edit_config(hidden_size="wide"), ValueError, "describes no model: `hidden_size` must be an integer"),
        (edit_config(norm="batch"), ValueError, "describes no model: `norm` must be one of"),
        (edit_config(d_inner=[8, 8, 9]), ValueError, "describes no model: `d_inner` has 3 entries"),
        (edit_config(model_type="mamba", hidden_size="wide"), ValueError, "describes no model: .*hidden_size"),
        (
            edit_config(hidden_size=20),
            ValueError,
            "have another shape .* 'backbone.embeddings.cls_token'",
        ),
        (edit_config(d_state=3), ValueError, "of its weights have another shape than its config says"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no weights that can be read"),
        (truncate, ValueError, "weights of .* are damaged"),
        (write("model.safetensors", b""), ValueError, "weights of .* are damaged"),
        (write("model.safetensors", b"hello, this is no tensor"), ValueError, "weights of .* are damaged"),
        (edit_weights(lambda w: w.pop(A_LOG)), ValueError, f"1 of its weights are missing, the first is '{A_LOG}'"),
        (
            edit_weights(lambda w: w.update(extra=torch.zeros(1))),
            ValueError,
            "1 of its weights are not part of this architecture, the first is 'extra'",
        ),
        (
            edit_weights(lambda w: w.update({A_LOG: w[A_LOG][:-1].contiguous()})),
            ValueError,
            f"1 of its weights have another shape than its config says, the first is '{A_LOG}'",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(saved, said_by_transformers, damage, error, message):
    damage(saved)
    with pytest.raises(error, match=message) as caught:
        load_model(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    assert said_by_transformers == []  # its own table would say it again


@pytest.mark.parametrize("name", ["absent", "./absent", "../absent/model", "a/b/c", "/absent"])
def test_a_name_that_cannot_be_on_the_hub_is_not_looked_for_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"There is no model folder '{name}'"):
        load_model(name)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr("mamba_rsst.hub.AutoConfig.from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match="Neither a folder nor a model on the Hub .* 'nobody/nothing'"):
        load_model("nobody/nothing")


def test_a_whole_folder_loads(finished_run):
    model = load_model(finished_run[0])
    assert_same_state(model.state_dict(), load_stage(finished_run[0], "recover-1").state_dict())
    assert not model.training
    assert load_model(str(finished_run[0]), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["v1", "none", *LANGUAGE, "mamba", "falcon_mamba"])
def test_every_architecture_loads_equal(tmp_path, kind):
    model = make(kind)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded.eval()), logits_of(model))


def test_the_verbosity_of_transformers_stays(saved):
    before = get_verbosity()
    load_model(saved)
    edit_weights(lambda w: w.pop(A_LOG))(saved)
    with pytest.raises(ValueError):
        load_model(saved)
    assert get_verbosity() == before
