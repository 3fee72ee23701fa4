import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import (
    PRUNING,
    STEPS,
    assert_same_state,
    channels,
    cut,
    digits,
    load_masks_of,
    load_stage,
    make_model,
    make_trainer,
    scale_leaving,
)
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback, TrainingArguments

from mamba_rsst import MambaForImageClassification, PruningConfig, RSSTTrainer, select_channels
from mamba_rsst.pruning.prune import score_groups
from mamba_rsst.training.augmentation import AugmentationConfig, BatchAugmentation
from mamba_rsst.training.data import ImageCollator, ImageTensors
from mamba_rsst.training.rounds import load_masks


class NoGradient(RSSTTrainer):
    """Its loss has no gradient, so that nothing but the penalty moves a weight."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True)
        return (0.0 * loss, outputs) if return_outputs else 0.0 * loss


class Losses(RSSTTrainer):
    """Keeps (stage, training, inputs, logits, loss) of every call of compute_loss, and the model's weights then."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True)
        if self._stage is not None and not hasattr(self, "calls"):
            self.calls = []
        if self._stage is not None:
            state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.calls.append((self._stage.name, model.training, inputs, outputs.logits.detach(), loss.item(), state))
        return (loss, outputs) if return_outputs else loss


class Spy(TrainerCallback):
    """Copies of the weights when each stage's training ends, and whatever `at_start` finds when it begins."""

    def __init__(self, at_start=None):
        self.trainer, self.at_start, self.found, self.ends = None, at_start, {}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.found[self.trainer._stage.name] = self.at_start and self.at_start(self.trainer)

    def on_train_end(self, args, state, control, **kwargs):
        state = self.trainer.model.state_dict()
        self.ends[self.trainer._stage.name] = {name: tensor.clone() for name, tensor in state.items()}


def run(folder, at_start=None, **arguments):
    """(trainer, spy) after the whole run."""
    spy = Spy(at_start)
    trainer = make_trainer(folder, callbacks=[spy], **arguments)
    spy.trainer = trainer
    trainer.train()
    return trainer, spy


def logs_of(trainer, stage):
    return [entry for entry in trainer.run_state.history if entry["stage"] == stage and "loss" in entry]


# ---- the penalty ----
SCHEDULES = {
    "constant": lambda u, p: 1.0,
    "quadratic": lambda u, p: u * u,
    "exp_power": lambda u, p: (math.exp(u**p) - 1) / (math.e - 1),
}


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("decline", ["constant", "linear"])
def test_growing_l2_shrinks_the_leaving_weights_by_the_product_and_nothing_else(tmp_path, schedule, decline):
    """w <- w (1 - lr_t lambda(u_t)) over the steps of the WHOLE stage, u_t = (t + 1) / steps."""
    rate, strength, steps, power = 0.01, 40.0, 2 * STEPS, 2.5
    arguments = dict(num_train_epochs=0, rsst_epochs=2, recovery_epochs=0, learning_rate=0.5, rsst_learning_rate=rate)
    arguments |= dict(lr_scheduler_type=decline, schedule=schedule, lambda_max=strength)
    arguments |= dict(schedule_power=power) if schedule == "exp_power" else {}
    _, spy = run(tmp_path, cls=NoGradient, **arguments)
    product = 1.0
    for t in range(steps):
        lr = rate * (1 - t / steps if decline == "linear" else 1)
        product *= 1 - lr * strength * SCHEDULES[schedule]((t + 1) / steps, power)
    assert 0.01 < product < 0.8  # neither nothing nor everything
    start, masks = load_stage(tmp_path, "start").state_dict(), load_masks_of(tmp_path, "rsst-1")
    expected = scale_leaving(start, masks, product)
    assert_same_state(spy.ends["rsst-1"], expected, rtol=1e-5, atol=0)  # six products in fp32
    moved = {name for name in start if not torch.equal(start[name], spy.ends["rsst-1"][name])}
    assert moved == {name for name, _, _ in channels(masks)}


@pytest.mark.parametrize("residual, epochs", [(1e-3, 2), (0.2, 2), (1e-3, 1)])
def test_growing_l2_of_itself_shrinks_to_the_residual(tmp_path, residual, epochs):
    """In three steps too, where no step may take more than 99%."""
    arguments = dict(num_train_epochs=0, rsst_epochs=epochs, recovery_epochs=0, residual=residual, warmup_steps=1)
    _, spy = run(tmp_path, cls=NoGradient, lr_scheduler_type="cosine", **arguments)
    start, masks = load_stage(tmp_path, "start").state_dict(), load_masks_of(tmp_path, "rsst-1")
    assert_same_state(spy.ends["rsst-1"], scale_leaving(start, masks, residual), rtol=1e-4, atol=0)


def test_a_penalised_stage_empties_the_leaving_channels_and_one_without_does_not(tmp_path):
    shares = {}
    for name, arguments in (("on", {}), ("off", {"lambda_max": 0.0})):
        trainer, _ = run(tmp_path / name, rsst_epochs=3, recovery_epochs=0, **arguments)
        shares[name] = [entry["leaving_share"] for entry in logs_of(trainer, "rsst-1")]
    assert shares["off"][-1] > 0.5 * shares["off"][0] > 0.1
    assert shares["on"][-1] < 0.02 and shares["on"] == sorted(shares["on"], reverse=True)


@pytest.mark.parametrize("penalty", ["growing_l2", "group_lasso"])
def test_lambda_grows_over_the_whole_stage(tmp_path, penalty):
    """Not over each epoch: an earlier implementation began again at every epoch and hardly left zero."""
    arguments = dict(penalty=penalty, schedule="linear", lambda_max=0.6, num_train_epochs=0, rsst_epochs=3)
    trainer, _ = run(tmp_path, **arguments)
    lambdas = [entry["lambda"] for entry in logs_of(trainer, "rsst-1")]
    assert lambdas == pytest.approx([0.6 * (t + 1) / 9 for t in range(9)])


@pytest.mark.parametrize("scope", ["leaving", "all"])
def test_group_lasso_is_in_the_training_loss_and_in_no_other(tmp_path, scope):
    strength = 0.03
    arguments = dict(penalty="group_lasso", penalty_scope=scope, schedule="constant", lambda_max=strength)
    arguments |= dict(eval_strategy="epoch", recovery_epochs=1)
    trainer, _ = run(tmp_path, cls=Losses, **arguments)
    masks = load_masks_of(tmp_path, "rsst-1")
    seen = set()
    for stage, training, inputs, logits, loss, state in trainer.calls:
        expected = F.cross_entropy(logits, inputs["labels"]).item()
        if stage == "rsst-1" and training:
            squares = {}  # (layer, target) -> |w_g|^2 of each channel
            for name, axis, _ in channels(masks):
                layer, part = int(name.split(".")[2]), name.split(".")[3]
                key = (layer, {"mixer": "d_inner", "mlp": "intermediate_size"}[part])
                w = state[name].double().transpose(0, axis).reshape(state[name].shape[axis], -1)
                sums = w.square().sum(1).view(-1, len(masks[key])).sum(0)  # in_proj holds x and z
                squares[key] = squares.get(key, 0) + sums
            norms = {key: value.sqrt() for key, value in squares.items()}
            chosen = {key: n if scope == "all" else n[~masks[key]] for key, n in norms.items()}
            penalty = strength * sum(float(n.sum()) for n in chosen.values())
            assert penalty > 0.05
            expected += penalty
        seen.add((stage, training))
        assert loss == pytest.approx(expected, rel=1e-5)
    assert {("rsst-1", True), ("rsst-1", False), ("train", True), ("recover-1", True)} <= seen


def test_group_lasso_pushes_the_leaving_channels_down(tmp_path):
    shares = {}
    for strength in (0.0, 0.3):
        arguments = dict(penalty="group_lasso", schedule="linear", lambda_max=strength, rsst_epochs=4)
        arguments |= dict(num_train_epochs=0, recovery_epochs=0, learning_rate=0.05)
        trainer, _ = run(tmp_path / str(strength), **arguments)
        shares[strength] = logs_of(trainer, "rsst-1")[-1]["leaving_share"]
    assert shares[0.3] < 0.7 * shares[0.0]


def test_a_strength_that_would_turn_weights_around_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lr \\* lambda would reach 2, .* lower `lambda_max`"):
        run(tmp_path, num_train_epochs=0, rsst_epochs=1, lambda_max=200.0, schedule="constant")


# ---- who leaves ----
@pytest.mark.parametrize("method", ["rsst", "refill"])
def test_channels_are_chosen_on_the_trained_weights(tmp_path, method):
    """Not on those that the survivors go back to: an earlier implementation scored after the rewind."""
    run(tmp_path, method=method, recovery_epochs=0)
    chosen = load_masks_of(tmp_path, f"{'rsst' if method == 'rsst' else 'prune'}-1")
    for stage, same in (("train", True), ("start", False)):
        masks = select_channels(load_stage(tmp_path, stage), PruningConfig(**PRUNING))
        masks = {(int(n.split(".")[2]), n.split(":")[1]): mask for n, mask in masks.items()}
        assert all(torch.equal(masks[key], mask) for key, mask in chosen.items()) == same


def test_the_stage_does_not_change_its_choice(tmp_path):
    """The masks that penalise, those that cut and those on disk are the same ones, and none is all True."""
    _, spy = run(tmp_path, recovery_epochs=0)
    masks = load_masks_of(tmp_path, "rsst-1")
    assert all(mask.any() and not mask.all() for mask in masks.values())
    assert_same_state(load_stage(tmp_path, "rsst-1").state_dict(), cut(spy.ends["rsst-1"], masks))


def test_data_driven_scores_look_at_the_batches_that_were_given(tmp_path):
    collate = make_trainer(tmp_path / "unused").eval_data_collator
    batches = [collate(list(range(20))), collate(list(range(20, 60)))]
    pruning = {**PRUNING, "importance": "taylor"}
    trainer = make_trainer(tmp_path / "run", pruning=pruning, recovery_epochs=0)
    trainer.calibration = batches
    trainer.train()
    masks = select_channels(load_stage(tmp_path / "run", "train"), PruningConfig(**pruning), batches)
    chosen = load_masks_of(tmp_path / "run", "rsst-1")
    for name, mask in masks.items():
        assert torch.equal(chosen[int(name.split(".")[2]), name.split(":")[1]], mask)


# ---- the cut and the rewind ----
class AtStep(TrainerCallback):
    def __init__(self, step):
        self.step, self.weights = step, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and self.weights is None:
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("rewind", ["initial", "step", "none"])
def test_refill_cuts_and_sets_the_survivors_back(tmp_path, rewind):
    spy = AtStep(2)
    arguments = dict(method="refill", rewind=rewind, rewind_step=2 if rewind == "step" else 0, recovery_epochs=0)
    trainer = make_trainer(tmp_path, callbacks=[spy], **arguments)
    initial = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    trained = load_stage(tmp_path, "train").state_dict()
    source = {"initial": initial, "step": spy.weights, "none": trained}[rewind]
    assert not torch.equal(
        source["classifier.weight"], (trained if rewind != "none" else initial)["classifier.weight"]
    )
    expected = cut(source, load_masks_of(tmp_path, "prune-1"))
    assert_same_state(trainer.model.state_dict(), expected)
    assert_same_state(load_stage(tmp_path, "prune-1").state_dict(), expected)


@pytest.mark.parametrize(
    "method, stage, rewind",
    [("rsst", "rsst", "none"), ("rsst", "rsst", "step"), ("refill", "prune", "initial"), ("prune", "prune", "step")],
)
def test_rounds_remove_more_and_more_of_the_dense_channels(tmp_path, method, stage, rewind):
    arguments = dict(rewind_step=2) if rewind == "step" else {}
    pruning = {**PRUNING, "sparsity": 0.7}
    trainer, _ = run(tmp_path, method=method, num_rounds=2, rewind=rewind, pruning=pruning, **arguments)
    dense = {"d_inner": 2 * 32, "intermediate_size": 2 * 24}
    for round_, wanted in ((1, 1 - 0.3**0.5), (2, 0.7)):
        config = load_stage(tmp_path, f"{stage}-{round_}").config
        for target, total in dense.items():
            removed = 1 - sum(config.widths(target)) / total
            assert wanted <= removed + 1e-9 < wanted + 2 / total  # no more than the channel it takes to get there
    widths = [sum(trainer.model.config.widths(target)) for target in dense]
    assert widths == [sum(config.widths(target)) for target in dense]
    if rewind != "none":  # the second round goes back to the same point, through both cuts
        first, second = (load_masks_of(tmp_path, f"{stage}-{i}") for i in (1, 2))
        point = tmp_path / ("start" if rewind == "initial" else "stages/0-train/rewind")
        point = MambaForImageClassification.from_pretrained(point).state_dict()
        assert_same_state(load_stage(tmp_path, f"{stage}-2").state_dict(), cut(cut(point, first), second))
    sparsities = [logs_of(trainer, f"recover-{i}")[-1]["channel_sparsity"] for i in (1, 2)]
    assert sparsities[0] == pytest.approx(1 - 0.3**0.5, abs=0.02) and sparsities[1] == pytest.approx(0.7, abs=0.02)


def test_sparsity_per_target_is_reached_in_rounds_too(tmp_path):
    pruning = {**PRUNING, "sparsity": {"d_inner": 0.75, "intermediate_size": 0.25}}
    trainer, _ = run(tmp_path, method="refill", num_rounds=2, num_train_epochs=0, pruning=pruning)
    assert sum(trainer.model.config.widths("d_inner")) == 0.25 * 64
    assert sum(trainer.model.config.widths("intermediate_size")) == 0.75 * 48
    first = load_stage(tmp_path, "prune-1").config
    assert sum(first.widths("d_inner")) == 0.5 * 64


def test_the_optimizer_after_a_cut_holds_the_new_parameters(tmp_path):
    def parameters(trainer):
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held})
        return {id(p) for p in held} == {id(p) for p in trainer.model.parameters()}, len(trainer.optimizer.state)

    trainer, spy = run(tmp_path, at_start=parameters)
    assert spy.found == {"train": (True, 0), "rsst-1": (True, 0), "recover-1": (True, 0)}  # and nothing of the past
    before, after = load_stage(tmp_path, "rsst-1").state_dict(), trainer.model.state_dict()
    assert [name for name in after if torch.equal(before[name], after[name])] == []  # every weight was trained on


def test_gradients_are_clipped_after_a_cut_too(tmp_path):
    found = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            found.append((trainer._stage.name, torch.stack([g.norm() for g in grads]).norm().item()))

    trainer = make_trainer(tmp_path, method="prune", max_grad_norm=0.25, num_rounds=2, callbacks=[Watch()])
    trainer.train()
    assert dict(found).keys() == {"train", "recover-1", "recover-2"}
    assert all(norm == pytest.approx(0.25, rel=1e-3) for _, norm in found), found


def test_the_final_model_is_really_smaller_and_reloads_equal(tmp_path):
    trainer, _ = run(tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    model = MambaForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same_state(model.state_dict(), trainer.model.state_dict())
    config = model.config
    for target, dense in (("d_inner", 2 * 32), ("intermediate_size", 2 * 24)):
        assert sum(config.widths(target)) == 0.5 * dense
    for i, layer in enumerate(model.backbone.layers):
        assert layer.mixer.out_proj.weight.shape == (16, config.widths("d_inner")[i])
        assert layer.mixer.in_proj.weight.shape == (2 * config.widths("d_inner")[i], 16)
        assert layer.mlp.fc1.weight.shape == (config.widths("intermediate_size")[i], 16)
    images = trainer.eval_data_collator(list(range(7)))["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(images).logits, trainer.model.eval()(images).logits)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in make_model().parameters())


# ---- distillation ----
@pytest.mark.parametrize("temperature, weight", [(2.0, 0.3), (4.0, 1.0)])
def test_distillation_is_hintons_loss_and_leaves_the_dense_teacher_alone(tmp_path, temperature, weight):
    arguments = dict(distillation_weight=weight, distillation_temperature=temperature, eval_strategy="epoch")
    model = make_model(hidden_dropout_prob=0.3)  # a teacher in training mode would show
    trainer, _ = run(tmp_path, model=model, cls=Losses, lambda_max=1.0, **arguments)
    dense = load_stage(tmp_path, "train").eval()
    assert dense.config.d_inner == 32
    assert_same_state(trainer.teacher.model.state_dict(), dense.state_dict())
    assert not trainer.teacher.model.training and not any(p.requires_grad for p in trainer.teacher.model.parameters())
    taught = set()
    for stage, training, inputs, logits, loss, _ in trainer.calls:
        task = F.cross_entropy(logits, inputs["labels"]).item()
        expected = task
        if stage != "train" and training:
            with torch.no_grad():
                p = torch.softmax(dense(inputs["pixel_values"]).logits.double() / temperature, -1)
            q = torch.softmax(logits.double() / temperature, -1)
            kl = (p * (p / q).log()).sum(-1).mean().item()
            expected = (1 - weight) * task + weight * temperature**2 * kl
            taught.add(stage)
            assert abs(expected - task) > 1e-3
        assert loss == pytest.approx(expected, rel=1e-4)
    assert taught == {"rsst-1", "recover-1"}


class FarFromTeacher(RSSTTrainer):
    """Keeps what each training step's loss should be, from the models in the run's folder, beside what it is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True)
        if model.training and self._stage.round > 0:
            dense = load_stage(self.run_folder.path, "train").eval()
            blocks, stream = torch.arange(dense.config.num_hidden_layers), torch.arange(dense.config.hidden_size)
            for file in sorted(self.run_folder.path.glob("stages/*/masks.safetensors")):
                if (file.parent / "model").is_dir():  # that stage is over: what it chose is gone
                    for name, mask in load_masks(file).items():
                        blocks = blocks[mask] if name.endswith("num_hidden_layers") else blocks
                        stream = stream[mask] if name.endswith("hidden_size") else stream
            with torch.no_grad():
                taught = dense(pixels, output_hidden_states=True).hidden_states
                own = self.model(pixels, output_hidden_states=True)
            taught = [taught[i][..., stream] for i in [*blocks, -1]]
            pairs = [st for both in zip(own.hidden_states, taught, strict=True) for st in zip(*both)]
            far = sum(((s - t) ** 2).sum() / (t**2).sum() for s, t in pairs) / len(pairs)
            task = F.cross_entropy(own.logits, labels)
            u = self.state.global_step / self.state.max_steps
            self.steps = [*getattr(self, "steps", []), (self._stage.name, far.item(), loss.item(), task.item(), u)]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("target", ["d_inner", "num_hidden_layers", "hidden_size"])
@pytest.mark.parametrize("method, fade", [("rsst", False), ("prune", False), ("rsst", True)])
def test_the_stream_is_held_to_the_dense_models_through_rounds_of_any_cut(tmp_path, method, fade, target):
    pruning = dict(targets=[target], sparsity=0.6, round_to=1, importance="magnitude_l1")
    trainer = make_trainer(
        tmp_path,
        model=make_model(num_hidden_layers=4),
        cls=FarFromTeacher,
        pruning=pruning,
        method=method,
        num_rounds=2,
        ramp="linear",
        distillation_hidden_weight=3.0,
        distillation_hidden_fade=fade,
        **({"lambda_max": 1.0} if method == "rsst" else {}),
    )
    trainer.train()
    stages = {"recover-1", "recover-2"} | ({"rsst-1", "rsst-2"} if method == "rsst" else set())
    assert {stage for stage, *_ in trainer.steps} == stages
    for stage, far, loss, task, u in trainer.steps:
        weight = 3.0 * (1.0 - u) if fade and stage.startswith("recover") else 3.0
        assert loss == pytest.approx(task + weight * far, rel=1e-4), stage
    assert max(far for _, far, *_ in trainer.steps) > 1e-2
    assert len({u for stage, *_, u in trainer.steps if stage == "recover-1"}) > 1


# ---- what is recorded ----
def evaluate_by_hand(model):
    data = digits()
    collate = ImageCollator(data.eval, mean=data.mean, std=data.std, num_classes=len(data.id2label))
    batch = collate(list(range(len(data.eval))))
    with torch.no_grad():
        logits = model.eval()(batch["pixel_values"]).logits
    loss = F.cross_entropy(logits, batch["labels"]).item()
    return {"eval_loss": loss, "eval_accuracy": (logits.argmax(-1) == batch["labels"]).float().mean().item()}


def near(metrics):
    return {key: pytest.approx(value, abs=1e-5) for key, value in metrics.items()}


@pytest.mark.parametrize("method, stage", [("rsst", "rsst-1"), ("refill", "prune-1")])
def test_the_metrics_around_the_cut_are_those_of_the_models_around_the_cut(tmp_path, method, stage):
    trainer, spy = run(
        tmp_path, method=method, num_train_epochs=2, **({"lambda_max": 1.0} if method == "rsst" else {})
    )
    recorded = {
        name: {when: {k: m[k] for k in ("eval_loss", "eval_accuracy")} for when, m in metrics.items()}
        for name, metrics in trainer.run_state.metrics.items()
    }
    trained = load_stage(tmp_path, "train")
    before = make_model()
    before.load_state_dict(spy.ends["rsst-1"] if method == "rsst" else trained.state_dict())
    after = load_stage(tmp_path, stage)
    end = evaluate_by_hand(after)  # refill: after the rewind
    after.load_state_dict(cut(before.state_dict(), load_masks_of(tmp_path, stage)))
    assert recorded == {
        "train": {"end": near(evaluate_by_hand(trained))},
        stage: {
            "before_cut": near(evaluate_by_hand(before)),
            "after_cut": near(evaluate_by_hand(after)),
            "end": near(end),
        },
        "recover-1": {"end": near(evaluate_by_hand(trainer.model))},
    }
    losses = [metrics["eval_loss"] for metrics in recorded[stage].values()]
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)
    assert (losses[1] == pytest.approx(losses[2], abs=1e-6)) == (method == "rsst")


def test_the_history_says_where_it_was_and_how_it_went(tmp_path):
    trainer, _ = run(tmp_path, num_train_epochs=2, rsst_epochs=1, recovery_epochs=1, logging_steps=2)
    history = trainer.run_state.history
    assert [(e["stage"], e["step"]) for e in history if "loss" in e] == [
        ("train", 2),
        ("train", 4),
        ("train", 6),
        ("rsst-1", 8),
        ("recover-1", 11),  # the last of the rsst stage's three steps is not logged, but counts
    ]
    assert [round(e["epoch"], 3) for e in history] == [0.667, 1.333, 2.0, 2.667, 3.667]
    for entry in history:
        decays = entry["stage"] == "rsst-1"
        assert ("lambda" in entry) == ("leaving_share" in entry) == decays
        assert entry["channel_sparsity"] == (0.5 if entry["stage"] == "recover-1" else 0.0)
        assert entry["learning_rate"] > 0
        if decays:
            assert entry["lambda"] > 0 and 0 < entry["leaving_share"] < 1
    assert trainer.run_state.steps == 12 and trainer.run_state.epochs == 4


def test_the_arguments_are_given_back_as_they_were(tmp_path):
    arguments = dict(rsst_epochs=2, rsst_learning_rate=0.02, recovery_learning_rate=0.03)
    trainer, _ = run(tmp_path, **arguments)
    assert trainer.args.output_dir == str(tmp_path)
    assert trainer.args.num_train_epochs == 1 and trainer.args.learning_rate == 0.01
    first = {stage: logs_of(trainer, stage)[0]["learning_rate"] for stage in ("train", "rsst-1", "recover-1")}
    assert first == {"train": 0.01, "rsst-1": 0.02, "recover-1": 0.03}
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_evaluating_leaves_the_random_numbers_of_training_alone(tmp_path):
    trainer = make_trainer(tmp_path, method="dense")
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ask", ["predict", "evaluate"])
def test_other_images_than_the_evaluation_set_are_looked_at_themselves(tmp_path, ask):
    """Items are indices, which the collator of another set would answer with its own images; no batch is dropped."""
    trainer = make_trainer(tmp_path, method="dense", dataloader_drop_last=True, per_device_eval_batch_size=32)
    others = ImageTensors(digits().train.images[7:52], digits().train.labels[7:52])
    with torch.no_grad():
        pixels = ImageCollator(others, mean=digits().mean, std=digits().std, num_classes=10)(range(45))["pixel_values"]
        logits = trainer.model.eval()(pixels).logits
    right = (logits.argmax(-1) == others.labels).float().mean().item()
    if ask == "predict":
        found = trainer.predict(others)
        assert found.label_ids.tolist() == others.labels.tolist()
        torch.testing.assert_close(torch.tensor(found.predictions), logits, rtol=1e-4, atol=1e-5)
        assert found.metrics["test_accuracy"] == pytest.approx(right)
    else:
        assert trainer.evaluate(others)["eval_accuracy"] == pytest.approx(right)
    assert trainer.eval_data_collator.dataset is digits().eval and trainer.args.dataloader_drop_last


def test_several_evaluation_sets_and_parts_of_one(tmp_path):
    trainer = make_trainer(tmp_path, method="dense")
    train, held_out = digits().train, digits().eval
    trainer.eval_dataset = {"seen": train, "new": held_out}
    metrics = trainer.evaluate()
    trainer.eval_dataset = held_out
    assert metrics["eval_new_accuracy"] == trainer.evaluate()["eval_accuracy"]
    found = trainer.predict(Subset(Subset(train, range(9, 60)), [3, 1, 40]))
    assert found.label_ids.tolist() == train.labels[[12, 10, 49]].tolist()
    everything = trainer.predict(train)
    assert metrics["eval_seen_accuracy"] == pytest.approx(everything.metrics["test_accuracy"])
    assert everything.metrics["test_accuracy"] != metrics["eval_new_accuracy"]
    with pytest.raises(ValueError, match="gathers from a ImageTensors or a Subset of one, not from a Conc"):
        trainer.predict(ConcatDataset([train, held_out]))

    class Bank:  # of samples that it shows beside those asked for: its own affair
        dataset = train

        def __call__(self, indices):
            return ImageCollator(held_out, mean=digits().mean, std=digits().std, num_classes=10)(indices)

    trainer.eval_data_collator = Bank()
    assert trainer.predict(held_out).label_ids.tolist() == held_out.labels.tolist() and Bank.dataset is train


def test_nothing_of_a_stage_but_what_trainer_sends_goes_to_the_hub_while_it_trains(tmp_path, monkeypatch):
    uploads = []

    class FakeHub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, folder_path, **_):
            arguments = (Path(folder_path) / "training_args.bin").read_bytes()
            assert b"hub_token" in arguments and b"hf_secret" not in arguments
            uploads.append(
                {p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()}
            )
            return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr("transformers.trainer.hf_api", FakeHub)
    arguments = dict(
        save_strategy="epoch", push_to_hub=True, hub_model_id="small", hub_token="hf_secret", method="refill"
    )
    trainer = make_trainer(tmp_path, rewind="step", rewind_step=1, recovery_epochs=1, **arguments)
    trainer.train()
    assert uploads == [{"config.json", "model.safetensors", "training_args.bin"}] * 2
    assert not list(tmp_path.glob("stages/*/upload")) and not list(tmp_path.glob("stages/*/config.json"))
    assert (tmp_path / "stages" / "1-prune-1" / "rewind").is_dir() and trainer.args.output_dir == str(tmp_path)
    assert trainer.args.hub_token == "hf_secret"


def test_a_best_model_by_an_unknown_metric_is_the_users_mistake(tmp_path):
    arguments = dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
    with pytest.raises(ValueError, match="'eval_precision'.*'eval_accuracy'"):
        make_trainer(tmp_path, metric_for_best_model="precision", **arguments).train()


def test_the_best_checkpoint_of_a_decaying_stage_is_not_brought_back(tmp_path):
    """It is the one in which the leaving channels still are what they were."""
    arguments = dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", rsst_epochs=3)
    trainer, spy = run(tmp_path, num_train_epochs=4, recovery_epochs=0, **arguments)
    assert logs_of(trainer, "rsst-1")[-1]["leaving_share"] < 0.1
    masks = load_masks_of(tmp_path, "rsst-1")
    assert_same_state(trainer.model.state_dict(), cut(spy.ends["rsst-1"], masks))
    evaluated = [e["eval_loss"] for e in trainer.run_state.history if "eval_loss" in e][-3:]
    assert evaluated[-1] > min(evaluated)  # else the best were the last
    assert trainer.run_state.metrics["rsst-1"]["before_cut"]["eval_loss"] == pytest.approx(evaluated[-1], abs=1e-5)
    assert trainer.args.load_best_model_at_end is True


@pytest.mark.parametrize("event", ["on_evaluate", "on_step_end", "on_epoch_end"])
def test_a_stage_that_decays_is_not_stopped_early_but_the_others_are(tmp_path, event):
    """Its channels would be cut alive."""

    class Stop(TrainerCallback):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            control.should_training_stop = True

    setattr(Stop, event, stop)
    arguments = dict(num_train_epochs=4, rsst_epochs=4, recovery_epochs=4, eval_strategy="epoch")
    trainer = make_trainer(tmp_path, callbacks=[Stop()] if event == "on_evaluate" else [], **arguments)
    if event != "on_evaluate":
        trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="The stage 'rsst-1' goes on: its channels have not decayed yet"):
        trainer.train()
    steps = {name: spent["steps"] for name, spent in trainer.run_state.spent.items()}
    short = 2 if event == "on_step_end" else STEPS
    assert steps == {"train": short, "rsst-1": 4 * STEPS, "recover-1": short}


def test_a_stage_that_was_stopped_all_the_same_is_not_cut(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = trainer._stage.decay

    trainer = make_trainer(tmp_path, rsst_epochs=4)
    trainer.callback_handler.callbacks.append(Stop())
    with pytest.raises(ValueError, match="The stage 'rsst-1' was stopped after 4 of 12 steps"):
        trainer.train()
    assert trainer.run_state.done == 1


def test_soft_labels_and_a_loss_of_ones_own_are_taught_as_much(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, reduction="mean")

    losses = []
    for name, function in (("model", None), ("own", own)):
        soft = BatchAugmentation(AugmentationConfig(randaugment_ops=0, erasing=0.0))
        trainer = make_trainer(
            tmp_path / name, augmentation=soft, method="prune", num_train_epochs=1, distillation_weight=1.0
        )
        trainer.compute_loss_func = function
        trainer.train()
        losses.append(logs_of(trainer, "recover-1")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] > 0.01


def test_rounds_that_remove_blocks_count_by_the_blocks_that_are_left(tmp_path):
    """Blocks are renumbered when one leaves: the second round took the first one's width for the second's."""
    model = make_model(num_hidden_layers=4, d_inner=[8, 32, 32, 32], intermediate_size=0)
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.mul_(1e-3)  # the block that leaves
    sparsity = {"d_inner": 0.5, "num_hidden_layers": 0.25}
    pruning = dict(targets=list(sparsity), sparsity=sparsity, importance="magnitude_l2", round_to=1, floor=0.01)
    arguments = dict(method="prune", num_rounds=2, num_train_epochs=0, recovery_epochs=0)
    trainer = make_trainer(tmp_path, model=model, pruning=pruning, **arguments)
    trainer.train()
    assert len(trainer.model.config.d_inner) == 3 and sum(trainer.model.config.d_inner) == 48


def test_every_epoch_of_every_stage_has_its_own_order_and_its_own_augmentation(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, augmentation=BatchAugmentation(AugmentationConfig()))
    collate, seen = trainer.data_collator, {}

    class Watched:
        seed = property(lambda self: collate.seed, lambda self, value: setattr(collate, "seed", value))

        def __call__(self, indices):
            if trainer.is_in_train:
                key = trainer._stage.name, collate.dataset.epoch, collate.seed
                seen[key] = seen.get(key, []) + list(indices)
            return collate(indices)

    trainer.data_collator = Watched()
    trainer.train()
    assert [key[:2] for key in seen] == [(stage.name, epoch) for stage in trainer.stages for epoch in (0, 1)]
    assert all(sorted(order) == list(range(96)) for order in seen.values())
    assert len({tuple(order) for order in seen.values()}) == len({key[1:] for key in seen}) == 6


def test_mixed_precision_holds_in_every_stage(tmp_path):
    found = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            def look(module, inputs, output):
                found.setdefault(trainer._stage.name, set()).add(output.dtype)

            model.backbone.layers[0].mixer.in_proj.register_forward_hook(look)

    trainer = make_trainer(tmp_path, bf16=True, callbacks=[Watch()])
    trainer.train()
    assert found == dict.fromkeys(("train", "rsst-1", "recover-1"), {torch.bfloat16})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# ---- weight decay ----
SPARED = r"(A_log|A_b_log|\.D|\.D_b|bias|norm\d?\.weight|norm_f\.weight|cls_token|position_embeddings)$"


@pytest.mark.parametrize("bidirectional", ["none", "v1", "v2"])
def test_weight_decay_spares_what_is_no_matrix(tmp_path, bidirectional):
    model = make_model(bidirectional=bidirectional, use_bias=True, class_token="both")
    trainer = make_trainer(tmp_path, model=model, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert decays.keys() == set(names.values())
    for name, decay in decays.items():
        assert decay == (0.0 if re.search(SPARED, name) else 0.1), name
    assert decays["backbone.layers.0.mixer.dt_proj.weight"] == 0.1


# ---- refusals ----
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(pruning=None), "method='rsst' needs `pruning`"),
        (dict(pruning=dict(targets=["d_inner"], round_to=33)), "`round_to` is 33 but .* only 32 channels"),
        (dict(pruning=dict(sparsity=0.95, floor=0.5)), "Cannot remove 95.0% of the d_inner channels"),
        (dict(num_train_epochs=0), "`rsst_epochs` must be set"),
        (
            dict(method="dense", optim="adamw_anyprecision"),
            "'adamw_anyprecision' cannot be made: .*torchdistx",
        ),
        (dict(dataloader_drop_last=True, per_device_train_batch_size=97), "nothing of 96 samples in batches of 97"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_target_that_the_model_lacks(tmp_path):
    with pytest.raises(ValueError, match="MambaForImageClassification has no 'intermediate_size' to prune"):
        make_trainer(tmp_path, model=make_model(intermediate_size=0))


def test_weights_too_coarse_for_a_small_decay_are_refused(tmp_path):
    with pytest.raises(ValueError, match="growing_l2 on torch.bfloat16 weights would round its small steps away"):
        make_trainer(tmp_path, model=make_model().to(torch.bfloat16))
    make_trainer(tmp_path, model=make_model().to(torch.bfloat16), method="refill")


def test_other_arguments_models_and_optimizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`args` must be an RSSTConfig, got TrainingArguments"):
        RSSTTrainer(model=make_model(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    args = make_trainer(tmp_path, method="dense").args
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    for arguments in (dict(model_init=make_model), dict(model=make_model(), optimizers=(optimizer, None))):
        with pytest.raises(ValueError, match="builds its optimizers itself"):
            RSSTTrainer(args=args, **arguments)


def test_a_rewind_step_beyond_the_first_stage(tmp_path):
    with pytest.raises(ValueError, match="`rewind_step` is 4, but the first stage has 3 steps"):
        run(tmp_path / "run", method="refill", rewind="step", rewind_step=4)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="the first stage has 3 steps. None is kept"):  # others may begin with it
        trainer, _ = run(tmp_path / "run", method="dense", rewind="step", rewind_step=4)
    assert trainer.run_state.done == 1 and not (tmp_path / "run" / "stages" / "0-train" / "rewind").exists()


def test_a_first_stage_that_ends_before_the_point_to_rewind_to_is_an_error(tmp_path):
    """Not a run that goes back to the initial weights instead."""

    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(tmp_path, method="refill", rewind="step", rewind_step=3, callbacks=[Enough()])
    with pytest.raises(ValueError, match="`rewind_step` is 3, but the first stage ended after 2 steps"):
        trainer.train()
    assert trainer.run_state.done == 0


@pytest.mark.parametrize(
    "stage, arguments",
    [
        ("train", dict(method="dense", learning_rate=1e20)),
        ("recover-1", dict(method="prune", recovery_learning_rate=1e20)),
    ],
)
def test_a_diverged_stage_is_no_result(tmp_path, stage, arguments):
    with pytest.raises(ValueError, match=f"not finite after stage '{stage}': its training has diverged"):
        run(tmp_path, max_grad_norm=0.0, **arguments)


def test_a_schedule_that_lacks_its_arguments_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="`lr_scheduler_kwargs` do not fit 'warmup_stable_decay': .*num_decay_steps"):
        run(tmp_path / "run", method="prune", lr_scheduler_type="warmup_stable_decay")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    run(tmp_path, method="dense")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path, method="dense")
    with pytest.raises(ValueError, match="holds a run with the stages .'train'., not"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was started with learning_rate=0.01, not 0.02"):
        make_trainer(tmp_path, method="dense", learning_rate=0.02).train(resume_from_checkpoint=True)
    for name, then, now in (
        ("data_seed", None, 7),
        ("train_sampling_strategy", "random", "sequential"),
        ("dataloader_drop_last", False, True),
        ("label_smoothing_factor", 0.0, 0.1),
        ("optim_args", None, "a=1"),
        ("lr_scheduler_kwargs", None, {}),
        ("bf16", False, True),
        ("neftune_noise_alpha", None, 5.0),
    ):
        with pytest.raises(ValueError, match=re.escape(f"was started with {name}={then!r}, not {now!r}")):
            make_trainer(tmp_path, method="dense", **{name: now}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was started with total_train_batch_size=32, not 16"):
        make_trainer(tmp_path, method="dense", per_device_train_batch_size=16).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is True or False here, got 'checkpoint-3'"):
        make_trainer(tmp_path, method="dense").train(resume_from_checkpoint="checkpoint-3")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="holds no run to resume"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_dense_training_needs_no_pruning_and_cuts_nothing(tmp_path):
    trainer, _ = run(tmp_path, method="dense", pruning=None)
    assert trainer.model.config.d_inner == 32 and list(trainer.run_state.metrics) == ["train"]
    assert "channel_sparsity" not in trainer.run_state.history[0]


def test_the_first_stage_of_another_model_is_refused_before_anything_is_written(tmp_path):
    run(tmp_path / "dense", method="dense", pruning=None)
    trainer = make_trainer(tmp_path / "run", model=make_model(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"trained another model: 'backbone.layers.2\..* None, not \("):
        trainer.train(first_stage=tmp_path / "dense")
    assert not list((tmp_path / "run").iterdir())


# ---- at once, gradually, and by single weights ----
def test_prune_cuts_at_once_and_keeps_the_survivors_weights(tmp_path):
    trainer, _ = run(tmp_path, method="prune", recovery_epochs=0)
    trained, masks = load_stage(tmp_path, "train").state_dict(), load_masks_of(tmp_path, "prune-1")
    assert_same_state(trainer.model.state_dict(), cut(trained, masks))


def test_gradual_pruning_follows_the_ramp(tmp_path):
    pruning = {**PRUNING, "sparsity": 0.75}
    trainer, _ = run(tmp_path, method="prune", num_rounds=3, ramp="linear", pruning=pruning)
    widths = [load_stage(tmp_path, f"prune-{r}").config.widths("d_inner") for r in (1, 2, 3)]
    assert [sum(w) for w in widths] == [48, 32, 16]  # of 2 x 32


def test_a_rate_a_round_must_come_to_the_sparsity(tmp_path):
    run(tmp_path / "right", method="prune", num_rounds=2, round_rate=0.5, pruning={**PRUNING, "sparsity": 0.75})
    assert sum(load_stage(tmp_path / "right", "prune-1").config.widths("d_inner")) == 32
    with pytest.raises(ValueError, match=r"`round_rate` 0.5 removes 0.7500 in 2 rounds, .* 0.5: give it that number"):
        make_trainer(tmp_path / "wrong", method="prune", num_rounds=2, round_rate=0.5)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("rewind", ["none", "initial", "step"])
def test_masked_weights_stay_zero_while_the_others_train(tmp_path, rewind):
    arguments = dict(rewind_step=2) if rewind == "step" else {}
    trainer, spy = run(tmp_path, method="unstructured", num_rounds=2, rewind=rewind, weight_decay=0.1, **arguments)
    initial = load_stage(tmp_path, "start").state_dict()
    if rewind == "step":
        initial = MambaForImageClassification.from_pretrained(
            next(tmp_path.glob("stages/0-train/rewind"))
        ).state_dict()
    for r, trained in ((1, "train"), (2, "recover-1")):
        masks = load_masks(next(tmp_path.glob(f"stages/*-mask-{r}/masks.safetensors")))
        reach = torch.cat([mask.flatten() for mask in masks.values()])
        assert float((~reach).float().mean()) == pytest.approx(1 - 0.5 ** (r / 2), abs=1e-2)
        before = load_stage(tmp_path, trained).state_dict() if rewind == "none" else initial
        expected = {name: w * masks[name] if name in masks else w for name, w in before.items()}
        assert_same_state(load_stage(tmp_path, f"mask-{r}").state_dict(), expected)
        after = load_stage(tmp_path, f"recover-{r}").state_dict()
        for name, mask in masks.items():
            assert not after[name][~mask].any() and not torch.equal(after[name][mask], expected[name][mask]), name
    assert trainer.model.config.widths("d_inner") == [32, 32]
    sparsities = [entry["weight_sparsity"] for entry in logs_of(trainer, "recover-2")]
    assert sparsities == pytest.approx([0.5] * len(sparsities), abs=1e-3)


# ---- GReg-2, and what is kept of the scores ----
def test_a_spreading_stage_decays_every_channel_alike_and_removes_none(tmp_path):
    arguments = dict(method="prune", num_train_epochs=0, spread_epochs=2, spread_residual=0.3, recovery_epochs=0)
    trainer, spy = run(tmp_path, cls=NoGradient, **arguments)
    start, end = load_stage(tmp_path, "start").state_dict(), spy.ends["spread-1"]
    everything = {
        (layer, t): torch.zeros(w, dtype=torch.bool)
        for layer in (0, 1)
        for t, w in (("d_inner", 32), ("intermediate_size", 24))
    }
    assert_same_state(end, scale_leaving(start, everything, 0.3), rtol=1e-4, atol=0)
    lambdas = [entry["lambda"] for entry in logs_of(trainer, "spread-1")]
    assert lambdas == pytest.approx([lambdas[-1] * (t + 1) / 6 for t in range(6)])
    assert sum(trainer.model.config.widths("d_inner")) == 32


def test_the_scores_of_a_choice_are_kept_and_those_before_the_cut(tmp_path):
    pruning = {**PRUNING, "importance": "taylor"}
    trainer, spy = run(tmp_path, pruning=pruning, rsst_epochs=3)
    scores = load_masks(next(tmp_path.glob("stages/1-rsst-1/scores.safetensors")))
    masks = load_masks(next(tmp_path.glob("stages/1-rsst-1/masks.safetensors")))
    assert sorted(scores) == sorted(f"{when}:{name}" for when in ("before", "after") for name in masks)
    for name, keep in masks.items():
        before, after = (scores[f"{when}:{name}"] for when in ("before", "after"))
        assert after[~keep].mean() < 0.1 * after[keep].mean()  # decayed away: they change nothing any more
        assert before[~keep].mean() < before[keep].mean()
    trainer, _ = run(tmp_path / "prune", method="prune")
    scores = load_masks(next((tmp_path / "prune").glob("stages/1-prune-1/scores.safetensors")))
    expected = score_groups(load_stage(tmp_path / "prune", "train"), PruningConfig(**PRUNING))
    assert sorted(scores) == sorted(f"before:{name}" for name in expected)
    assert all(torch.equal(scores[f"before:{name}"], score) for name, score in expected.items())


def test_a_search_for_blocks_is_not_made_again_to_be_looked_at(tmp_path):
    """leave_one_out runs the model for every block left and every one removed."""
    pruning = dict(targets=["num_hidden_layers"], sparsity=0.5, scope="layer")
    run(tmp_path, pruning=pruning, num_train_epochs=0, rsst_epochs=1, recovery_epochs=0)
    assert list(load_masks(next(tmp_path.glob("stages/*-rsst-1/scores.safetensors")))) == [
        "before:model:num_hidden_layers"
    ]


def test_a_decaying_stage_may_have_a_schedule_of_its_own(tmp_path):
    arguments = dict(lr_scheduler_type="linear", rsst_lr_scheduler_type="constant", rsst_epochs=2)
    trainer, _ = run(tmp_path, **arguments)
    rates = {stage: [entry["learning_rate"] for entry in logs_of(trainer, stage)] for stage in ("rsst-1", "recover-1")}
    assert rates["rsst-1"] == [1e-2] * 6
    assert rates["recover-1"] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert trainer.args.lr_scheduler_type == "linear"
    last = logs_of(trainer, "rsst-1")[-1]
    assert last["leaving_share"] < 0.05  # the strength was solved for under the stage's own rates


def test_what_is_evaluated_once_is_not_compiled(tmp_path, monkeypatch):
    """Each stage ends with one pass over the evaluation set, the cut stands between two more."""
    trained = []

    def backend(graph, inputs):
        trained.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    trainer, _ = run(tmp_path, compile_blocks=True)
    assert trained and all(trained)
    assert {name: len(found) for name, found in trainer.run_state.metrics.items()} == {
        "train": 1,
        "rsst-1": 3,
        "recover-1": 1,
    }


@pytest.mark.parametrize("most, compiled", [(None, ["train", "rsst-1", "recover-1"]), (1, ["train", "rsst-1"])])
def test_compile_shapes_spares_uneven_models_the_compiler(tmp_path, monkeypatch, most, compiled):
    """Whether each stage's blocks run as compiled code; compiling itself is stood in for."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: setattr(m, "_compiled_call_impl", m._call_impl))

    def blocks(trainer):
        return {block._compiled_call_impl is not None for block in trainer.model.backbone.layers}

    evaluated, whole = [], RSSTTrainer.evaluate
    monkeypatch.setattr(RSSTTrainer, "evaluate", lambda self: evaluated.append(*blocks(self)) or whole(self))
    _, spy = run(tmp_path, at_start=blocks, compile_blocks=True, compile_shapes=most)
    assert [stage for stage, found in spy.found.items() if found == {True}] == compiled
    assert all(len(found) == 1 for found in spy.found.values())
    # After train, before the cut, after it (where every new shape would be compiled), after recover
    assert evaluated == [True, True, most is None, most is None]
