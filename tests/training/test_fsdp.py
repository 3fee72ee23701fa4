"""FSDP 2: processes that share the weights out give what one process gives with whole ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from test_distributed import CLOSE, train
from tiny import BIDIRECTIONAL, KINDS, make
from tiny_runs import assert_same_state, load_masks_of, make_model

from mamba_rsst import RSSTConfig, RSSTTrainer, find_groups
from mamba_rsst.cli import main
from mamba_rsst.pruning import leaving_share
from mamba_rsst.pruning.penalty import decay_
from mamba_rsst.training.rounds import last_complete_checkpoint
from mamba_rsst.training.sharding import check_sharding, checkpoint_files, copy_to_shard, gather_


# ---- the pieces: three processes, so that one has neighbours on both sides and one may have nothing ----


def decay_and_gather(kind):
    """A model's decay and leaving share, sharded and whole, whose weights must agree to the bit."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole, result = make(kind), make(kind)
    sharded = copy_to_shard(result)
    groups, masks = find_groups(whole), {}
    torch.manual_seed(1)
    for i, group in enumerate(groups):
        if i % 3 != 2:  # some groups stay as they are
            masks[group.name] = torch.rand(group.size) > 0.5
    sharded_groups = find_groups(sharded)
    for block in sharded.backbone.layers:
        fully_shard(block)
    fully_shard(sharded)
    inputs = torch.zeros(2, 3, 12, 12) if kind in BIDIRECTIONAL else torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        sharded.eval()(inputs)  # leaves whole weights of the root behind, in which a decay would be lost
    assert not all(isinstance(p, DTensor) for p in sharded.parameters())
    gather_(result, sharded)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert_same_state(result.state_dict(), whole.state_dict())
    for amount in (0.3, 0.9):
        decay_(groups, masks, amount)
        decay_(sharded_groups, masks, amount)
        share = leaving_share(sharded_groups, masks)
        assert share == pytest.approx(leaving_share(groups, masks), rel=1e-5) and 0 < share < 1
    gather_(result, sharded)
    assert_same_state(result.state_dict(), whole.state_dict())
    return {p.to_local().shape[0] for p in sharded.parameters()}


def test_decay_share_and_gathering_of_shards():
    output = launched(3, "pieces")
    assert output.count("same") == 3
    assert "none held" in output  # a process without any row of some parameter


# ---- whole runs, by RSSTTrainer and by recipe ----

SHARDED = dict(fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})


def launched(processes, *arguments):
    """What this file's `__main__` prints in so many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=400)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize("method", ["rsst", pytest.param("refill", marks=pytest.mark.slow)])
def test_rounds_and_resuming_with_shards(tmp_path, method):
    """RSST with accelerate's sharded checkpoints, Refill with whole ones and a rewind point in the first stage."""
    output = launched(2, "run", tmp_path / "two", method)
    train(tmp_path / "one", 32, method=method)
    one = torch.load(tmp_path / "one-1-0.pt")
    both = [torch.load(tmp_path / f"two-2-{rank}.pt") for rank in (0, 1)]
    assert_same_state(both[0], one, **CLOSE)
    assert_same_state(both[1], both[0])
    assert output.count("a step on shards") == 2
    masks = [load_masks_of(tmp_path / name, f"{'rsst' if method == 'rsst' else 'prune'}-2") for name in ("one", "two")]
    assert all(torch.equal(masks[1][key], mask) for key, mask in masks[0].items())
    # Between the stages everything is whole: the models in the folders, and what is measured on them.
    state = load_file(next((tmp_path / "two" / "stages").glob("*-recover-2")) / "model" / "model.safetensors")
    assert_same_state(state, both[0])
    runs = [json.loads((tmp_path / name / "rsst_state.json").read_text()) for name in ("one", "two")]
    for stage, metrics in runs[0]["metrics"].items():
        for when, values in metrics.items():
            assert runs[1]["metrics"][stage][when]["eval_loss"] == pytest.approx(values["eval_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_language_model_in_shards(tmp_path, dtype):
    """Tied embeddings, accumulation, a teacher, recomputed activations, evaluations within the stages."""
    import tiny_text

    training = dict(distillation_weight=0.3, weight_decay=0.05, learning_rate=2e-3, gradient_accumulation_steps=2)
    training |= dict(distillation_hidden_weight=3.0, distillation_hidden_fade=True)
    training |= dict(gradient_checkpointing=True, eval_strategy="epoch", max_grad_norm=0.5, bf16=dtype == "bf16")
    text = tiny_text.write_parquet(tmp_path / "text")
    recipe = tiny_text.write_recipe(tmp_path / "tiny.yaml", text, training=training)
    one, two = tmp_path / "one", tmp_path / "two"
    launched(2, "recipe", recipe, f"training.output_dir={two}", "training.per_device_train_batch_size=8")
    assert main(["train", str(recipe), f"training.output_dir={one}"]) == 0
    close = dict(rel=1e-4 if dtype == "fp32" else 2e-2)  # bf16 rounds the two halves of a batch differently
    logs = [[json.loads(line) for line in (f / "training_log.jsonl").read_text().splitlines()] for f in (one, two)]
    for key in ("loss", "eval_perplexity", "leaving_share", "channel_sparsity"):
        values = [[entry[key] for entry in log if key in entry] for log in logs]
        assert values[0] and values[1] == pytest.approx(values[0], **close)
    if dtype == "fp32":
        assert_same_state(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"), **CLOSE)
    assert json.loads((two / "config.json").read_text()) == json.loads((one / "config.json").read_text())


# ---- what is refused, in one sentence ----


@pytest.mark.parametrize(
    ("plugin", "arguments", "message"),
    [
        (dict(fsdp_version=1), {}, "fsdp_version: 2"),
        (dict(cpu_ram_efficient_loading=True), {}, "cpu_ram_efficient_loading: false"),
        (dict(cpu_offload=True), {}, "cpu_offload"),
        ({}, dict(penalty="group_lasso"), "growing_l2"),
        ({}, dict(method="unstructured"), "unstructured"),
        ({}, dict(ema_decay=0.99), "ema_decay"),
        ({}, dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch"), "FULL_STATE_DICT"),
    ],
)
def test_settings_that_cannot_work(monkeypatch, plugin, arguments, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # and put back: the plugin writes it
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
    with pytest.raises(ValueError, match=message) as caught:
        check_sharding(plugin, make_model(), RSSTConfig(output_dir="x", use_cpu=True, **arguments))
    assert "\n" not in str(caught.value)


def test_weights_of_two_dtypes(monkeypatch):
    model = make_model()
    model.classifier.bfloat16()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    with pytest.raises(ValueError, match="one dtype"):
        check_sharding(plugin, model, RSSTConfig(output_dir="x", use_cpu=True))


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_checkpoints_are_told_apart(tmp_path, kind):
    """One of another kind cannot be read: its stage starts again."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    folder = tmp_path / "checkpoint-5"
    files = checkpoint_files(plugin)
    for name in ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", *files):
        assert last_complete_checkpoint(tmp_path, 2, files) is None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert last_complete_checkpoint(tmp_path, 2, files) == str(folder)
    assert last_complete_checkpoint(tmp_path, 2) is None


# ---- in the processes ----


def pieces():
    from torch import distributed

    distributed.init_process_group("gloo")
    rows = set.union(*[decay_and_gather(kind) for kind in KINDS])
    print("same", "none held" if 0 in rows else "", flush=True)
    distributed.destroy_process_group()


def shard_on_the_cpu():
    """Let accelerate do on the CPU what it does on GPUs; by itself it would train whole copies there."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    usual = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        usual(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def watch_steps():
    """Say once that what is trained is sharded, and that the blocks compute with fp32 A_log all the same."""
    from torch.distributed.tensor import DTensor

    step, said = RSSTTrainer.training_step, []

    def watched(self, model, *args, **kwargs):
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
        seen = []
        mixer = model.backbone.layers[0].mixer
        hook = mixer.register_forward_pre_hook(lambda module, _: seen.append((type(module.A_log), module.A_log.dtype)))
        loss = step(self, model, *args, **kwargs)
        hook.remove()
        assert seen and all(kind is not DTensor and dtype == torch.float32 for kind, dtype in seen), seen
        if not said:
            said.append(print("a step on shards", flush=True))
        return loss

    RSSTTrainer.training_step = watched


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "pieces":
        pieces()
    else:
        shard_on_the_cpu()
        watch_steps()
    if what == "run":
        folder, method = rest
        train(Path(folder), 16, kill=True, method=method, **(SHARDED if method == "rsst" else dict(fsdp=True)))
    elif what == "recipe":
        # As `accelerate launch --use_fsdp` would say it.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        sys.exit(main(["train", *rest]))
