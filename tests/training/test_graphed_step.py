"""The recorded step: on the CPU against a stand-in for the graph, on a GPU against the step itself."""

import copy

import pytest
import torch
from torch import nn

from mamba_rsst import RSSTConfig, RSSTTrainer
from mamba_rsst.training.compiling import compile_blocks_
from mamba_rsst.training.graphed_step import GraphedStep
from tests.tiny import batch_of, make


class PretendGraph(GraphedStep):
    """Replays by running the step again and copying its results to where the recording left them."""

    recordings = 0

    def _run_beside(self, inputs):
        return self.step(inputs)

    def _capture(self):
        self.recordings += 1
        self._loss = self.step(self._inputs)

    def _replay(self):
        held = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        self._loss.copy_(self.step(self._inputs))
        for p, static, grad in zip(self.parameters, self._gradients, held):
            if static is not None:
                static.copy_(p.grad)
            p.grad = grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2)
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def stepper(model):
    def step(inputs):
        loss = (model(inputs["x"]) - inputs["y"]).square().mean()
        loss.backward()
        return loss.detach()

    return step


def train(model, step, batches, accumulate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for i, batch in enumerate(batches):
        losses.append(step(batch))
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_recorded_steps_train_as_the_steps_themselves(accumulate, device):
    torch.manual_seed(0)
    model = Net().to(device)
    twin = copy.deepcopy(model)
    sizes = [4, 4, 4, 4, 2, 4, 4, 4, 3, 4, 4, 4]  # some batches are smaller: those are not replayed
    batches = [{"x": torch.randn(n, 3, device=device), "y": torch.randn(n, 2, device=device)} for n in sizes]
    graphed = (PretendGraph if device == "cpu" else GraphedStep)(stepper(model), list(model.parameters()))
    assert train(model, graphed, batches, accumulate) == pytest.approx(
        train(twin, stepper(twin), batches, accumulate), rel=1e-5
    )
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)
    assert model.unused.weight.grad is None and model.a.bias.grad is None
    if device == "cpu":
        assert graphed.recordings == 1


def test_losses_are_not_overwritten_by_the_next_replay():
    model = Net()
    graphed = PretendGraph(stepper(model), list(model.parameters()))
    batches = [{"x": torch.randn(4, 3), "y": torch.randn(4, 2)} for _ in range(6)]
    losses = [graphed(batch) for batch in batches]
    assert len({float(loss) for loss in losses}) == 6


def test_a_step_that_cannot_be_recorded_says_so():
    model = Net()
    graphed = PretendGraph(stepper(model), list(model.parameters()))

    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed._capture = fail
    batch = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    for _ in range(GraphedStep.WARMUP):
        graphed(batch)
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph: operation not permitted"):
        graphed(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", ["growing_l2", "group_lasso"])
def test_recorded_vision_steps_train_as_eager_ones(penalty):
    """All that happens inside a step: both penalties' terms, the scan's kernels, distillation's loss aside."""
    from mamba_rsst.pruning import PruningConfig, find_groups, select_channels
    from mamba_rsst.pruning.penalty import decay_, group_lasso

    torch.manual_seed(0)
    first = make("v2").cuda().train()
    pruning = PruningConfig(targets=["d_inner"], sparsity=0.5, round_to=1)
    batches = [{k: v.cuda() for k, v in batch_of(first, count=6, seed=s).items()} for s in range(7)]
    results = []
    for recorded in (False, True):
        model = copy.deepcopy(first)
        masks = {n: m.cuda() for n, m in select_channels(model, pruning).items()}
        groups = find_groups(model, ["d_inner"])
        weight = torch.zeros((), device="cuda")

        def step(inputs, model=model, masks=masks, groups=groups, weight=weight):
            loss = model(**inputs).loss
            if penalty == "group_lasso":
                loss = loss + weight * group_lasso(groups, masks)
            loss.backward()
            return loss.detach()

        run = GraphedStep(step, list(model.parameters())) if recorded else step
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for i, batch in enumerate(batches):
            weight.fill_(1e-3 * i)
            losses.append(float(run(batch)))
            optimizer.step()
            if penalty == "growing_l2":
                decay_(groups, masks, 0.1)
            optimizer.zero_grad()
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for p, q in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_cuda_graphs_are_refused_where_they_cannot_run(tmp_path):
    args = RSSTConfig(output_dir=str(tmp_path), method="dense", cuda_graphs=True, use_cpu=True)
    with pytest.raises(ValueError, match="`cuda_graphs` needs one process on one CUDA GPU"):
        RSSTTrainer(model=make("none"), args=args)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing", "logging_nan_inf_filter"])
def test_cuda_graphs_name_what_they_do_not_go_with(name):
    with pytest.raises(ValueError, match=f"`cuda_graphs` does not go with `{name}`"):
        RSSTConfig.check(output_dir="out", cuda_graphs=True, **{name: True})


def test_compiling_needs_blocks():
    with pytest.raises(ValueError, match="Net does not say which modules are its blocks"):
        compile_blocks_(Net())


def test_the_shapes_that_come_often_are_recorded():
    """Not those of the third call, which may be an epoch's last batch."""
    model = Net()
    graphed = PretendGraph(stepper(model), list(model.parameters()))
    for n in [4, 4, 2] * 3:
        graphed({"x": torch.randn(n, 3), "y": torch.randn(n, 2)})
    assert graphed._inputs["x"].shape == (4, 3) and graphed.recordings == 1


def test_what_is_no_tensor_is_named():
    graphed = PretendGraph(stepper(Net()), [])
    with pytest.raises(ValueError, match="'names' is a list"):
        graphed({"x": torch.randn(4, 3), "y": torch.randn(4, 2), "names": ["a"]})


@pytest.mark.parametrize("penalty", ["growing_l2", "group_lasso"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_recorded_steps_is_the_run_without(tmp_path, monkeypatch, penalty, accumulate):
    """All stages, with evaluations between the steps, an uneven last update and the decay as a graph of its own."""
    from tiny_runs import assert_same_state, make_trainer

    made, decays = [], []

    class Kept(PretendGraph):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    def pretend_capture(function, device):
        for _ in range(4):  # as often as the real one calls it while it warms up and records
            function()
        return lambda: decays.append(function())

    monkeypatch.setattr("mamba_rsst.training.trainer.GraphedStep", Kept)
    monkeypatch.setattr("mamba_rsst.training.leaving.capture", pretend_capture)
    results = []
    for recorded in (False, True):
        arguments = dict(num_train_epochs=3, rsst_epochs=3, recovery_epochs=3, eval_strategy="epoch", penalty=penalty)
        arguments |= dict(gradient_accumulation_steps=accumulate, per_device_train_batch_size=20, learning_rate=1e-2)
        trainer = make_trainer(tmp_path / str(recorded), **arguments)
        trainer.args.cuda_graphs = recorded
        trainer.train()
        results.append(trainer)
    plain, graphed = results
    assert_same_state(graphed.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert len(made) == 3 and [g.recordings for g in made] == [1, 1, 1], "one graph a stage"
    assert all(g._inputs["pixel_values"].shape[0] == 20 for g in made)
    assert bool(decays) == (penalty == "growing_l2")
    assert graphed._graphed is None and graphed._leaving.graphed_decay is None


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{"ema_decay": 0.9}, {"distillation_hidden_weight": 3.0, "distillation_weight": 0.5}])
def test_a_run_of_recorded_steps_on_a_gpu_is_the_run_without(tmp_path, more):
    """What reads the weights between replays, the average, and what a replay must read anew, the teacher's weight."""
    from tiny_runs import assert_same_state, make_trainer

    results = []
    for recorded in (False, True):
        arguments = dict(num_train_epochs=3, rsst_epochs=3, recovery_epochs=3, eval_strategy="epoch", use_cpu=False)
        arguments |= dict(distillation_hidden_fade="distillation_weight" in more, **more)
        trainer = make_trainer(tmp_path / str(recorded), cuda_graphs=recorded, **arguments)
        trainer.train()
        results.append(trainer)
    plain, graphed = (trainer.model.state_dict() for trainer in results)
    assert next(iter(plain.values())).is_cuda
    assert_same_state(graphed, plain, rtol=1e-3, atol=1e-4)
    for before, after in zip(results[0].run_state.history, results[1].run_state.history, strict=True):
        assert before.keys() == after.keys()
        for key in {"loss", "eval_loss", "stream_distance"} & before.keys():
            assert before[key] == pytest.approx(after[key], rel=1e-2), key
