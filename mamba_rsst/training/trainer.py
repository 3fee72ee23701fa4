"""RSSTTrainer: transformers' Trainer, run once per stage, with the penalty, the cut and distillation at its hooks."""

import contextlib
import copy
import dataclasses
import shutil
import time
from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from ..pruning import Masks, PruningConfig, find_groups, leaving_share, select_channels, shrink_
from ..pruning.masks import kept_widths
from ..pruning.penalty import MAX_DECAY, decay_, group_lasso, strength_for
from ..pruning.schedules import schedule_value
from .arguments import RSSTConfig
from .data import EpochSampler
from .rounds import (
    RunFolder,
    RunState,
    Stage,
    last_complete_checkpoint,
    load_masks,
    plan_stages,
    remove_checkpoints,
    round_sparsity,
    save_masks,
)


class RSSTTrainer(Trainer):
    """Trains a model and prunes its width on the way: RSST, Refill, or dense training only (see RSSTConfig).

    Beyond Trainer's arguments:
    pruning: what to remove; needed unless args.method is "dense".
    eval_data_collator: collator of the evaluation set, where it differs from `data_collator`.
    calibration: batches that data-driven scores look at; default the first `calibration_batches` of training.

    `train()` runs all stages; `train(resume_from_checkpoint=True)` goes on wherever `args.output_dir`'s run stopped
    and ends in the same weights as a run without interruption. Afterwards `trainer.model` is the cut model, `run_state`
    holds the history and the metrics around each cut, and `run_folder` every stage's model.
    Raises ValueError if `args.output_dir` already holds a run and resuming was not asked for.
    """

    def __init__(
        self,
        model=None,
        args: RSSTConfig | None = None,
        *,
        pruning: PruningConfig | None = None,
        eval_data_collator=None,
        calibration: Iterable | None = None,
        **kwargs,
    ):
        args = RSSTConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RSSTConfig):
            raise ValueError(f"`args` must be an RSSTConfig, got {type(args).__name__}.")
        if args.method != "dense":
            if pruning is None:
                raise ValueError(f"method={args.method!r} needs `pruning`, a PruningConfig.")
            if model is not None:
                find_groups(model, pruning.targets)  # a target that this model lacks is an error now, not hours later
        super().__init__(model=model, args=args, **kwargs)
        self.pruning = pruning
        self.eval_data_collator = eval_data_collator
        self.calibration = calibration
        self.stages = plan_stages(args)
        self.run_folder = RunFolder(args.output_dir)
        self.run_state: RunState | None = None
        self.teacher = None
        self._stage: Stage | None = None
        self._masks: Masks = {}
        self._leaving_groups = []
        self._lambda_max = 0.0
        self.add_callback(_StageCallback(self))

    # ---- the run: stages, one after the other ----------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | None = None, **kwargs) -> TrainOutput:
        """Run the stages that are not done yet. Returns the last one's TrainOutput."""
        self._open_run(bool(resume_from_checkpoint))
        output = TrainOutput(0, 0.0, {})
        whole_run = copy.copy(self.args)
        try:
            for index in range(self.run_state.done, len(self.stages)):
                output = self._run_stage(index, whole_run, **kwargs) or output
        finally:
            for name in ("output_dir", "num_train_epochs", "learning_rate"):
                setattr(self.args, name, getattr(whole_run, name))
            self._stage, self._masks, self._leaving_groups = None, {}, []
        return output

    def _open_run(self, resume: bool) -> None:
        folder = self.run_folder
        if folder.exists():
            if not resume:
                raise ValueError(
                    f"{str(folder.path)!r} already holds a run: resume it, or choose another `output_dir`."
                )
            self.run_state = folder.read(self.stages)
            self._set_model(folder.model(self.run_state.done, self.stages))
            return
        if resume:
            raise ValueError(f"{str(folder.path)!r} holds no run to resume.")
        widths = {g.name: g.size for g in self._groups()} if self.pruning else {}
        self.run_state = RunState([s.name for s in self.stages], dense_widths=widths)
        self._save_model_folder(folder.start)
        self._write_state()

    def _run_stage(self, index: int, run_args, **kwargs) -> TrainOutput | None:
        stage = self._stage = self.stages[index]
        folder = self.run_folder.stage(index, stage)
        metrics = {}
        started = time.time()
        set_seed(self.args.seed + index)  # each stage draws its own numbers, the same whether resumed or not
        self._masks, self._leaving_groups = {}, []
        if stage.select:
            self._masks = self._select(stage, folder / "masks.safetensors")
            self._leaving_groups = [g for g in self._groups() if g.name in self._masks]
        if hasattr(self.data_collator, "seed"):  # another augmentation in every stage, the same in every resumption
            self.data_collator.seed = self.args.seed + 7919 * index
        self.args.output_dir = str(folder)
        self.args.num_train_epochs = stage.epochs
        self.args.learning_rate = stage.learning_rate
        self._load_teacher(stage)
        output = None
        if stage.epochs > 0:
            self._fresh_optimizer()
            set_seed(self.args.seed + index)
            output = super().train(resume_from_checkpoint=last_complete_checkpoint(folder), **kwargs)
        else:
            self.state.log_history = []
        if stage.cut:
            metrics["before_cut"] = self._evaluate_quietly()
            shrink_(self.model, self._masks)
            self._fresh_optimizer()
            metrics["after_cut"] = self._evaluate_quietly()
        if stage.rewind:
            self._rewind(index, folder)
        metrics["end"] = metrics["after_cut"] if stage.cut else self._evaluate_quietly()
        self._masks, self._leaving_groups = {}, []
        self._save_model_folder(folder / "model")
        state = self.run_state
        state.history += self._with_offsets(self.state.log_history, stage)
        state.metrics[stage.name] = metrics
        state.done = index + 1
        state.seconds += time.time() - started
        self._write_state()
        if self.is_world_process_zero():
            remove_checkpoints(folder)
        return output

    def _select(self, stage: Stage, path) -> Masks:
        """Choose on the trained weights, before anything is rewound; rank 0 decides for all processes."""
        self.accelerator.wait_for_everyone()
        if not path.is_file():
            config = dataclasses.replace(self.pruning, sparsity=self._cumulative_sparsity(stage))
            batches = self.calibration
            if batches is None:
                batches = islice(self.get_train_dataloader(), self.args.calibration_batches)
            self._move_model_to_device(self.model, self.args.device)
            masks = [select_channels(self.model, config, batches, self.run_state.dense_widths)]
            broadcast_object_list(masks)
            if self.is_world_process_zero():
                save_masks(masks[0], path)
            self.accelerator.wait_for_everyone()
        return load_masks(path)

    def _cumulative_sparsity(self, stage: Stage):
        def reached(sparsity):
            return round_sparsity(sparsity, stage.round, self.args.num_rounds)

        sparsity = self.pruning.sparsity
        return {t: reached(s) for t, s in sparsity.items()} if isinstance(sparsity, dict) else reached(sparsity)

    def _rewind(self, index: int, folder) -> None:
        """Set the survivors back to the rewind point, which is cut alike and kept for the next round."""
        point = type(self.model).from_pretrained(self.run_folder.rewind_point(index, self.stages))
        shrink_(point, self._masks)
        self.model.load_state_dict(point.state_dict())
        if self.is_world_process_zero():
            _replace_folder(point, folder / "rewind")
        self.accelerator.wait_for_everyone()

    def _fresh_optimizer(self) -> None:
        """Forget the optimizer, schedule and wrapped model: they may hold parameters from before a cut."""
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self._move_model_to_device(self.model, self.args.device)

    def _set_model(self, folder) -> None:
        model = type(self.model).from_pretrained(folder)
        self._move_model_to_device(model, self.args.device)
        model.train(self.model.training)
        self.model = self.model_wrapped = model

    def _save_model_folder(self, path) -> None:
        if self.is_world_process_zero():
            _replace_folder(self.model, path)
        self.accelerator.wait_for_everyone()

    def _write_state(self) -> None:
        if self.is_world_process_zero():
            self.run_folder.write(self.run_state)
        self.accelerator.wait_for_everyone()

    def _evaluate_quietly(self) -> dict:
        """Metrics of the evaluation set, not mixed into the stage's log."""
        if self.eval_dataset is None:
            return {}
        self._move_model_to_device(self.model, self.args.device)
        history = list(self.state.log_history)
        metrics = self.evaluate()
        self.state.log_history = history
        return metrics

    def _with_offsets(self, history: list[dict], stage: Stage) -> list[dict]:
        past = self.run_state.history
        step = max((entry["step"] for entry in past), default=0)
        epoch = max((entry["epoch"] for entry in past), default=0.0)
        return [
            {**entry, "stage": stage.name, "step": entry["step"] + step, "epoch": entry.get("epoch", 0.0) + epoch}
            for entry in history
            if "train_runtime" not in entry
        ]

    def _groups(self):
        return find_groups(self.model, self.pruning.targets)

    # ---- hooks of Trainer -------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss, plus distillation and group lasso where the stage asks for them (training only)."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            if self.teacher is not None:
                weight = self.args.distillation_weight
                loss = (1.0 - weight) * loss + weight * self._distillation(inputs, outputs)
            if self._decaying("group_lasso"):
                penalty = group_lasso(self._leaving_groups, self._masks, self.args.penalty_scope)
                loss = loss + self._lambda() * penalty
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, inputs, outputs):
        """T^2 KL(teacher || student) on softened logits (Hinton et al. 2015, arXiv:1503.02531)."""
        labels = inputs.get("labels")
        with torch.no_grad():
            teacher = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        student = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        t = self.args.distillation_temperature
        student, teacher = (F.log_softmax(x.float().flatten(0, -2) / t, dim=-1) for x in (student, teacher))
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        if labels is not None and not labels.is_floating_point() and labels.numel() == divergence.numel():
            divergence = divergence[labels.flatten() != -100]
        return t * t * divergence.mean()

    def _load_teacher(self, stage: Stage) -> None:
        wanted = self.args.distillation_weight > 0 and stage.round > 0 and stage.epochs > 0
        if not wanted:
            self.teacher = None
        elif self.teacher is None:
            dense = self.run_folder.model(1, self.stages)
            self.teacher = type(self.model).from_pretrained(dense).eval().requires_grad_(False).to(self.args.device)

    def _decaying(self, penalty: str) -> bool:
        return self._stage is not None and self._stage.decay and self.args.penalty == penalty

    def _progress(self) -> float:
        """u in (0, 1]: how much of the stage has passed once the step under way is done."""
        return min(1.0, (self.state.global_step + 1) / max(1, self.state.max_steps))

    def _lambda(self) -> float:
        return self._lambda_max * schedule_value(self.args.schedule, self._progress(), self.args.schedule_power)

    def _start_decay(self) -> None:
        """Fix lambda_max for the stage: as given, or from the learning rates the stage will see."""
        if not (self._stage and self._stage.decay):
            return
        if self.args.lambda_max is not None:
            self._lambda_max = self.args.lambda_max
        elif self.args.penalty == "group_lasso":
            self._lambda_max = 0.1
        else:
            lambdas = getattr(self.lr_scheduler, "lr_lambdas", None)
            if lambdas is None:
                raise ValueError(
                    f"Give `lambda_max`: lr_scheduler_type={self.args.lr_scheduler_type} is not known ahead."
                )
            rates = [self.args.learning_rate * lambdas[0](t) for t in range(self.state.max_steps)]
            self._lambda_max = strength_for(
                self.args.residual, rates, lambda u: schedule_value(self.args.schedule, u, self.args.schedule_power)
            )

    def _decay_step(self) -> None:
        """After the optimizer's step: w <- w (1 - lr lambda) on the leaving channels."""
        if self._decaying("growing_l2"):
            amount = self.optimizer.param_groups[0]["lr"] * self._lambda()
            if self.args.lambda_max is None:
                amount = min(amount, MAX_DECAY)  # the bound under which the strength was solved for
            decay_(self._leaving_groups, self._masks, amount)

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Add lambda, the leaving channels' share of the norm and the channel sparsity to the training logs."""
        if self._stage is not None and "loss" in logs:
            logs["stage"] = self._stage.name
            if self._stage.decay:
                logs["lambda"] = self._lambda()
                logs["leaving_share"] = leaving_share(self._leaving_groups, self._masks)
            if self.pruning is not None:
                dense = self.run_state.dense_widths
                now = kept_widths(self._groups(), {})
                logs["channel_sparsity"] = 1.0 - sum(now.values()) / sum(dense.values())
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Trainer's, less what the model says weight decay must leave alone (A_log, D, biases, norms, tokens)."""
        spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__") or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        stage = self.stages.index(self._stage) if self._stage in self.stages else 0
        self._train_sampler = EpochSampler(dataset, seed + 7919 * stage)
        return self._train_sampler

    def get_eval_dataloader(self, eval_dataset=None):
        with self._collate_with(self.eval_data_collator):
            return super().get_eval_dataloader(eval_dataset)

    @contextlib.contextmanager
    def _collate_with(self, collator):
        usual = self.data_collator
        self.data_collator = collator or usual
        try:
            yield
        finally:
            self.data_collator = usual


class _StageCallback(TrainerCallback):
    """Passes Trainer's events on to the RSSTTrainer that owns it."""

    def __init__(self, trainer: RSSTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start_decay()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Said here too because accelerate does not reach a sampler that is wrapped twice (processes, skipped batches).
        sampler = getattr(self.trainer, "_train_sampler", None)
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._decay_step()

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        first = trainer._stage is not None and trainer._stage.round == 0
        if first and args.rewind == "step" and args.method == "refill" and state.global_step == args.rewind_step:
            trainer._save_model_folder(trainer.run_folder.stage(0, trainer.stages[0]) / "rewind")


def _replace_folder(model, path) -> None:
    """Save a model beside `path`, then put it in place: the folder is whole or absent."""
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)
