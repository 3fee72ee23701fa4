"""A saved folder must work where the package is absent: each test loads one in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import batch_of, layer_groups, logits_of, make, random_masks
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import mamba_rsst
from mamba_rsst import shrink_
from mamba_rsst.models import modeling_mamba_rsst_vision


MODELS = Path(modeling_mamba_rsst_vision.__file__).parent

CLEAN = """
import sys
sys.modules["mamba_rsst"] = None  # any import of the package fails from here on
import torch
from transformers import AutoConfig, AutoModelForImageClassification

folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert type(config).__name__ == type(model.config).__name__ == "MambaRsstVisionConfig"
pixels = torch.load(out + "/pixels.pt")
result = model(pixels, labels=torch.tensor([1, 2, 3]))
result.loss.backward()
assert all(p.grad is not None for p in model.parameters())
model.save_pretrained(out + "/again")
again = AutoModelForImageClassification.from_pretrained(out + "/again", trust_remote_code=True)
assert torch.equal(again(pixels).logits, result.logits)
assert not [name for name in sys.modules if name.startswith("mamba_rsst.")]
torch.save({"logits": result.logits.detach(), "gradient": model.classifier.weight.grad}, out + "/result.pt")
"""

CLEAN_LANGUAGE = """
import sys
sys.modules["mamba_rsst"] = None
import torch
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids = torch.load(out + "/ids.pt")
result = model(ids, labels=ids)
result.loss.backward()
tokens = model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None)
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True)
assert torch.equal(again(ids).logits, result.logits)
assert not [name for name in sys.modules if name.startswith("mamba_rsst.")]
gradient = model.get_input_embeddings().weight.grad
torch.save({"logits": result.logits.detach(), "gradient": gradient, "tokens": tokens}, out + "/result.pt")
"""

BOTH = """
import sys
import torch
import mamba_rsst
from mamba_rsst import MambaForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, out = sys.argv[1:]
pixels, labels = torch.load(out + "/pixels.pt"), torch.tensor([1, 2, 3])

def step(model):
    result = model(pixels, labels=labels)
    return result.logits.detach(), *torch.autograd.grad(result.loss, list(model.parameters()))

ours = MambaForImageClassification.from_pretrained(folder)
before = step(ours)
kept = torch.compile(ours, fullgraph=True, backend="aot_eager")
step(kept)
op = torch.ops.mamba_rsst.selective_scan_torch.default
inputs = [torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), -torch.rand(1, 4, 5), *torch.rand(2, 1, 2, 3, 5)]
scanned = op(*inputs, None, None, None, True, 0, False)[0]
remote_class = get_class_from_dynamic_module("modeling_mamba_rsst_vision.MambaForImageClassification", folder)
assert remote_class is not MambaForImageClassification
assert remote_class.__module__.startswith("transformers_modules.")
remote = remote_class.from_pretrained(folder)
for model in (ours, remote, ours):
    torch.testing.assert_close(step(model), before)
torch.testing.assert_close(step(kept), before)  # compiled before the copy came
assert torch.equal(op(*inputs, None, None, None, True, 0, False)[0], scanned), "the op itself, looked up before"
torch.testing.assert_close(step(torch.compile(remote, fullgraph=True, backend="aot_eager")), before)
torch.save({"logits": before[0], "gradient": before[-2]}, out + "/result.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model cut to another width in every layer, its folder, and inputs."""
    folder = tmp_path_factory.mktemp("saved")
    model = make("v2", num_hidden_layers=3)
    shrink_(model, random_masks(layer_groups(model), seed=4))
    assert all(isinstance(getattr(model.config, name), list) for name in ("d_inner", "intermediate_size", "dt_rank"))
    model.save_pretrained(folder)
    return model, folder


def run(script, folder, tmp_path, inputs, **env):
    """What the script, in a process of its own, made of `inputs` (name -> tensor)."""
    for name, tensor in inputs.items():
        torch.save(tensor, tmp_path / f"{name}.pt")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), **env}
    env["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, *([] if "PYTHONPATH" in env else ["-I"]), "-c", script, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "result.pt")


def run_vision(script, saved, tmp_path, **env):
    """The script's results, and what they should be."""
    model, folder = saved
    pixels = batch_of(model)["pixel_values"]
    result = run(script, folder, tmp_path, {"pixels": pixels}, **env)
    loss = model(pixels, labels=torch.tensor([1, 2, 3])).loss
    expected = {"logits": logits_of(model, {"pixel_values": pixels})}
    (expected["gradient"],) = torch.autograd.grad(loss, [model.classifier.weight])
    return result, expected


def test_without_the_package(saved, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    result, expected = run_vision(CLEAN, saved, tmp_path)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


def test_a_language_model_without_the_package(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    model = make("lm_norms", intermediate_size=33)
    shrink_(model, random_masks(layer_groups(model), seed=4))
    model.save_pretrained(tmp_path / "saved")
    assert {"mamba_block.py", "mamba_mixer.py"} <= {path.name for path in (tmp_path / "saved").glob("*.py")}
    ids = batch_of(model)["input_ids"]
    result = run(CLEAN_LANGUAGE, tmp_path / "saved", tmp_path, {"ids": ids})
    expected = model(ids, labels=ids)
    (gradient,) = torch.autograd.grad(expected.loss, [model.get_input_embeddings().weight])
    torch.testing.assert_close(result["logits"], expected.logits.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result["gradient"], gradient, atol=1e-6, rtol=1e-5)
    tokens = model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert torch.equal(result["tokens"], tokens)


def test_beside_the_package(saved, tmp_path):
    """Package and copy register the same custom ops; both go on working, forward, backward and compiled."""
    result, expected = run_vision(BOTH, saved, tmp_path, PYTHONPATH=str(Path(mamba_rsst.__file__).parents[1]))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


def test_the_folder_holds_every_file_it_needs(saved):
    _, folder = saved
    needed = {path.name for path in MODELS.glob("*.py")} - {"__init__.py"}
    needed = {name for name in needed if name in _reached("modeling_mamba_rsst_vision.py")}
    assert needed <= {path.name for path in folder.glob("*.py")}
    assert {"selective_scan_torch.py", "mamba_mixer.py", "configuration_mamba_rsst.py"} <= needed


def _reached(name):
    """The files that `name` imports, directly or not, and itself; read by a rule of our own: a line "from .x"."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            lines = (MODELS / name).read_text().splitlines()
            todo += [line.split()[1][1:] + ".py" for line in lines if line.strip().startswith("from .")]
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.glob("*.py") if path.name != "__init__.py"))
def test_transformers_finds_the_siblings(name):
    """transformers reads the files as text; what it does not find is missing in the copy."""
    found = {Path(path).name for path in get_relative_import_files(str(MODELS / name))}
    assert found == _reached(name) - {name}


def test_the_scan_needs_its_back_ends():
    assert set(get_relative_imports(str(MODELS / "selective_scan.py"))) == {
        "selective_scan_mamba_ssm",
        "selective_scan_torch",
        "selective_scan_triton",
    }


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.glob("*.py") if path.name != "__init__.py"))
def test_a_copy_needs_torch_and_transformers_alone(name):
    """What transformers asks the user to install before it runs the file; it overlooks imports inside a `try`."""
    assert set(get_imports(MODELS / name)) <= {"torch", "transformers", "math", "os", "collections", "typing"} | set(
        sys.stdlib_module_names
    )
