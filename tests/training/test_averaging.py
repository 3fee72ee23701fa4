import pytest
import torch
from tiny_runs import STEPS, assert_same_state, load_stage, make_model, make_trainer
from transformers import TrainerCallback

from mamba_rsst.training.averaging import WeightAverage


class Weights(TrainerCallback):
    """(stage, step) -> the weights; the weights that each evaluation and each end of a stage's training saw."""

    def __init__(self):
        self.trainer, self.steps, self.evaluated, self.ends, self.places = None, {}, {}, {}, set()

    def _state(self):
        return {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        stage = self.trainer._stage.name
        self.steps[stage, state.global_step] = self._state()
        self.places.add((stage, tuple(p.data_ptr() for p in self.trainer.model.parameters())))

    def on_evaluate(self, args, state, control, **kwargs):
        if self.trainer.is_in_train:
            self.evaluated[self.trainer._stage.name, state.global_step] = self._state()

    def on_train_end(self, args, state, control, **kwargs):
        self.ends[self.trainer._stage.name] = self._state()


def run(folder, **arguments):
    weights = Weights()
    arguments = {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 2, **arguments}
    weights.trainer = make_trainer(folder, callbacks=[weights], **arguments)
    weights.trainer.train()
    return weights


def averages(start, states, decay):
    """The averages after each step, by the definition and in float64."""
    average, found = {name: tensor.double() for name, tensor in start.items()}, []
    for t, state in enumerate(states, 1):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * state[name].double() for name in average}
        found.append({name: tensor.float() for name, tensor in average.items()})
    return found


@pytest.mark.parametrize("decay", [0.3, 0.99])  # the warm-up of the decay is over at the fourth step, or goes on
def test_evaluations_and_the_end_of_a_stage_see_the_average_and_training_does_not(tmp_path, decay):
    plain = run(tmp_path / "plain", method="dense", pruning=None)
    averaged = run(tmp_path / "averaged", method="dense", pruning=None, ema_decay=decay)
    assert averaged.steps.keys() == plain.steps.keys() == {("train", t) for t in range(1, 2 * STEPS + 1)}
    for key, state in plain.steps.items():
        assert_same_state(averaged.steps[key], state)
    expected = averages(load_stage(tmp_path / "plain", "start").state_dict(), plain.steps.values(), decay)
    for step in (2, 4, 6):
        assert_same_state(averaged.evaluated["train", step], expected[step - 1], rtol=1e-5, atol=1e-6)
        assert_same_state(plain.evaluated["train", step], plain.steps["train", step])
    for end in (averaged.ends["train"], averaged.trainer.model.state_dict()):
        assert_same_state(end, expected[-1], rtol=1e-5, atol=1e-6)
    moved = averaged.ends["train"]["classifier.weight"] - plain.ends["train"]["classifier.weight"]
    assert moved.abs().max() > 1e-4  # else this test could not tell them apart
    assert averaged.trainer.run_state.metrics["train"]["end"]["eval_loss"] == pytest.approx(
        averaged.trainer.evaluate()["eval_loss"]
    )


def test_the_parameters_stay_where_they_are_for_recorded_steps(tmp_path):
    weights = run(tmp_path, method="dense", pruning=None, ema_decay=0.9)
    assert len(weights.places) == 1


def test_a_stage_that_decays_channels_keeps_its_plain_weights(tmp_path):
    arguments = dict(num_train_epochs=0, rsst_epochs=2, recovery_epochs=1)
    plain, averaged = run(tmp_path / "plain", **arguments), run(tmp_path / "averaged", ema_decay=0.5, **arguments)
    assert_same_state(averaged.ends["rsst-1"], plain.ends["rsst-1"])
    after_cut = load_stage(tmp_path / "averaged", "rsst-1").state_dict()
    steps = [state for (stage, _), state in averaged.steps.items() if stage == "recover-1"]
    assert len(steps) == STEPS
    expected = averages(after_cut, steps, 0.5)[-1]
    assert_same_state(averaged.trainer.model.state_dict(), expected, rtol=1e-5, atol=1e-6)


def test_the_best_model_at_the_end_is_the_average_that_was_the_best(tmp_path):
    """Made the best by its steps alone: the loss falls, and the greater is called the better."""
    arguments = dict(method="dense", pruning=None, ema_decay=0.9, save_strategy="steps", save_steps=2)
    arguments |= dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    weights = run(tmp_path, **arguments)
    losses = [e["eval_loss"] for e in weights.trainer.run_state.history if "eval_loss" in e]
    assert len(losses) == 3
    best = 2 * (1 + losses.index(max(losses)))
    assert best < 2 * STEPS
    assert_same_state(weights.trainer.model.state_dict(), weights.evaluated["train", best])
    assert weights.trainer.evaluate()["eval_loss"] == pytest.approx(max(losses))


def test_the_weights_come_back_when_what_is_done_with_the_average_fails():
    model = make_model()
    average = WeightAverage(0.5)
    average.start(model)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="evaluation"), average.in_place():
        assert not torch.equal(model.classifier.weight, before["classifier.weight"])
        raise RuntimeError("evaluation")
    assert_same_state(model.state_dict(), before)


def test_bf16_weights_are_averaged_in_fp32(tmp_path):
    """A step of 2^-9 of the weight is rounded away in bf16, which has 8 bits."""
    model = torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(0.75)
    average.start(model)
    torch.nn.init.constant_(model.weight, 1.0078125)  # the next bf16 number

    class State:
        global_step = 1000

    average.on_step_end(None, State, None)
    average.save(tmp_path)
    again = WeightAverage(0.75)
    again.start(model, str(tmp_path))
    for a in (average, again):
        torch.testing.assert_close(a._averages[0], torch.full((2, 3), 1.001953125), rtol=0, atol=0)
    with again.in_place():
        assert model.weight.dtype == torch.bfloat16 and bool((model.weight == 1.0).all())


def test_what_is_frozen_is_not_averaged_and_nothing_else_is_left_out(tmp_path):
    model = make_model()
    model.backbone.embeddings.requires_grad_(False)
    average = WeightAverage(0.9)
    average.start(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(average._names) == trained < {name for name, _ in model.named_parameters()}
    assert not list(model.buffers())  # or their averages would have to be thought of
