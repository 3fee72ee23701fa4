"""RSSTTrainer: the staged run with the penalty, distillation, recorded steps and averages at Trainer's hooks."""

import contextlib
import functools
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs, DistributedType
from huggingface_hub import upload_folder
from transformers import TrainerCallback

from ..pruning import PruningConfig, weight_sparsity
from ..pruning.masks import kept_widths
from .arguments import RSSTConfig
from .data import EpochSampler
from .graphed_step import GraphedStep
from .leaving import check_rewind_step
from .rounds import NOT_UPLOADED, RunFolder
from .sharding import reshard_
from .staged import StagedTrainer


class RSSTTrainer(StagedTrainer):
    """Trains a model and prunes it on the way: RSST, Refill, at once or gradually, or not at all (see RSSTConfig).

    Beyond Trainer's arguments:
    pruning: what to remove; needed unless args.method is "dense" or "scratch".
    eval_data_collator: collator of the evaluation set, where it differs from `data_collator`.
    calibration: batches that data-driven scores look at; default the first `calibration_batches` of training.

    `train()` runs all stages; `train(resume_from_checkpoint=True)` goes on wherever `args.output_dir`'s run stopped
    and ends in the same weights as a run without interruption. Afterwards `trainer.model` is the cut model,
    `run_state` holds the history and the metrics around each cut, and `run_folder` every stage's model.
    Raises ValueError if `args.output_dir` already holds a run and resuming was not asked for, and for `model_init` and
    `optimizers`: a model or an optimizer that outlived a stage would undo the cut.
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
        super().__init__(model, args, pruning=pruning, calibration=calibration, **kwargs)
        self.eval_data_collator = eval_data_collator
        self._graphed: GraphedStep | None = None
        self._clock = (time.perf_counter(), 0)
        self._parameter_count: int | None = None
        self._clipped: list | None = None
        self.add_callback(_StageCallback(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's, replayed as one CUDA graph where `cuda_graphs` asks for it."""
        if self._leaving.penalty() == "group_lasso":
            self._leaving.penalty_weight.fill_(self._leaving.weight(self.state.global_step + 1))
        self.teacher.before_step(self.state.global_step / self.state.max_steps)
        if not self.args.cuda_graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.current_gradient_accumulation_steps != self.args.gradient_accumulation_steps:
            # An epoch's last update may have fewer micro-batches, and divides its loss by their number.
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphed is None:
            step = functools.partial(self._tensor_step, model)
            self._graphed = GraphedStep(step, list(model.parameters()))
        if not model.training:  # after an evaluation; a replay runs none of the code that would see to it
            model.train()
            if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
                self.optimizer.train()
        inputs = dict(self._prepare_inputs(inputs))
        if num_items_in_batch is not None:
            inputs["num_items_in_batch"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        return self._graphed(inputs)

    def _tensor_step(self, model, inputs):
        """Trainer's step as a function of tensors alone."""
        inputs = dict(inputs)
        items = inputs.pop("num_items_in_batch", None)
        return super().training_step(model, inputs, items)

    def _clip_grad_norm(self, model):
        """Trainer's, without a walk through all modules and a look at the kind of every gradient in each step."""
        plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if self.accelerator.distributed_type not in plain or getattr(
            self, "is_distributed_loading_by_transformers", False
        ):
            return super()._clip_grad_norm(model)
        if self._clipped is None:
            self._clipped = list(self.model.parameters())
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(self._clipped, self.args.max_grad_norm)

    def autocast_smart_context_manager(self, cache_enabled=True):
        """Trainer's, and under FSDP the autocast that accelerate puts around a whole model: A_log stays fp32."""
        if self._whole is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))  # a cache would keep all blocks' weights

    def floating_point_ops(self, inputs) -> int:
        """Trainer's estimate, 6 * inputs * parameters, without counting the parameters again in every step."""
        if self._parameter_count is None:
            self._parameter_count = self.model.num_parameters(exclude_embeddings=True)
        main_input = inputs.get(self.model.main_input_name)
        return 0 if main_input is None else 6 * main_input.numel() * self._parameter_count

    def _forget_parameters(self) -> None:
        """And with them the recorded step, which holds the memory of its activations."""
        super()._forget_parameters()
        self._graphed = self._parameter_count = self._clipped = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss, plus distillation and group lasso where the stage asks for them (training only)."""
        taught = self.teacher.model is not None and model.training
        labels = inputs.get("labels")  # label smoothing takes them out of the inputs
        if taught:
            inputs = self.teacher.asked(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            # Trainer divides by the accumulation steps unless the model's loss has been given the number of items.
            whole = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
            share = 1.0 / self.current_gradient_accumulation_steps if whole else 1.0
            if taught:
                items = num_items_in_batch if whole else None
                if items is not None and labels is not None and labels.is_floating_point():
                    items = items / labels.shape[-1]  # Trainer counted each class of a soft label
                processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                with self.accelerator.autocast():
                    teacher = self.teacher.answer(inputs)
                mask = inputs.get("attention_mask")
                loss = self.teacher.add_to(loss, outputs, teacher, labels, items, share, processes, mask)
            if self._leaving.penalty() == "group_lasso":
                loss = loss + share * self._leaving.lasso()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Add the speed, lambda, the leaving channels' share of the norm and the channel sparsity to the logs."""
        if self._stage is not None and "loss" in logs:
            logs["stage"] = self._stage.name
            since, step = self._clock  # of the last log or evaluation
            logs["steps_per_second"] = round((self.state.global_step - step) / (time.perf_counter() - since), 3)
            self._start_clock()
            logs |= self.teacher.logs()
            if self._stage.decay:
                logs["lambda"] = self._leaving.weight(self.state.global_step)  # as it was in the step that is logged
                if not self._stage.spread:
                    logs["leaving_share"] = self._leaving.share()
            if self._stage.masked:
                logs["weight_sparsity"] = weight_sparsity(self.model, self.pruning.targets)
            elif self.pruning is not None and self._channels:
                dense = self.run_state.dense_widths
                now = kept_widths(self._groups(), {})
                logs["channel_sparsity"] = 1.0 - sum(now.values()) / sum(dense.values())
        super().log(logs, *args, **kwargs)

    def _start_clock(self) -> None:
        self._clock = (time.perf_counter(), self.state.global_step)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Trainer's, without the stages' models; the model card that a finished run wrote is kept."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if not (self.run_folder.path / "README.md").is_file():
            self.create_model_card(model_name=self.hub_model_id.split("/")[-1], **kwargs)
        return upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            run_as_future=not blocking,
            ignore_patterns=NOT_UPLOADED,
            revision=revision,
        )

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        """Trainer's, and the averages: before trainer_state.json, which says that the checkpoint is complete."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._average.save(output_dir)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Trainer's; a `metric_for_best_model` that the evaluation does not give is the user's mistake."""
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise ValueError(error.args[0]) from error

    def get_decay_parameter_names(self, model) -> list[str]:
        """Trainer's, less what the model says weight decay must leave alone (A_log, D, biases, norms, tokens)."""
        spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
        spared |= {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__") or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        stage = self.stages.index(self._stage) if self._stage in self.stages else 0
        self._train_sampler = EpochSampler(dataset, seed + 7919 * stage)
        return self._train_sampler

    def evaluate(self, *args, **kwargs) -> dict:
        """Trainer's, of the averaged weights where they are averaged, and without touching the random numbers of
        training, since a resumed run may skip an evaluation."""
        with torch.random.fork_rng(devices=[]), self._average.in_place():
            metrics = super().evaluate(*args, **kwargs)
        if self._whole is not None:
            reshard_(self.model)
        self._start_clock()
        return metrics

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's, with its own collator, and never without the last batch."""
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        else:
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._collating_for(dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As that of the evaluation set."""
        with self._collating_for(test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _collating_for(self, dataset):
        usual, drop_last = self.data_collator, self.args.dataloader_drop_last
        collator = self.eval_data_collator or usual
        if hasattr(collator, "for_dataset"):  # items are mere indices: of another set it would gather its own samples
            collator = collator.for_dataset(dataset)
        self.data_collator, self.args.dataloader_drop_last = collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = usual, drop_last

    def add_callback(self, callback) -> None:
        """Trainer's. What this class watches for stays last: a stage that decays channels must not be stopped."""
        super().add_callback(callback)
        self.callback_handler.callbacks.sort(key=lambda known: isinstance(known, _StageCallback))

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        """Trainer's, from a folder that holds what it puts there (the model, the processor, training_args.bin) and
        nothing else: not the stage's masks, scores and rewind point."""
        stage = self.args.output_dir
        self.args.output_dir = str(RunFolder.upload(stage))
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args.output_dir = stage


class _StageCallback(TrainerCallback):
    """Passes Trainer's events on to the RSSTTrainer that owns it."""

    def __init__(self, trainer: RSSTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self._takes_rewind_point(args):
            check_rewind_step(args, state.max_steps)
        self.trainer._leaving.start(self.trainer.lr_scheduler, state.max_steps)
        self.trainer._start_clock()

    def _takes_rewind_point(self, args):
        stage = self.trainer._stage
        takes = args.method != "scratch" and args.rewinds_to == "step"  # dense: for runs that take it over
        return takes and stage is not None and stage.round == 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Said here too because accelerate does not reach a sampler that is wrapped twice (processes, skipped batches).
        order = getattr(self.trainer, "_train_sampler", None) or self.trainer.train_dataset  # or a stream's own
        if hasattr(order, "set_epoch"):
            order.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._leaving.after_step(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.optimizer.param_groups[0]["lr"],
            state.global_step + 1,
            stepped=not trainer.accelerator.optimizer_step_was_skipped,
        )

    def _goes_on(self, state, control) -> None:
        """A stage that decays channels goes on to its end: cut before, they would be cut alive."""
        if self.trainer._stage is None or not self.trainer._stage.decay or state.global_step >= state.max_steps:
            return
        if control.should_training_stop or control.should_epoch_stop:
            warnings.warn(f"The stage {self.trainer._stage.name!r} goes on: its channels have not decayed yet.")
            control.should_training_stop = control.should_epoch_stop = False

    def on_evaluate(self, args, state, control, **kwargs):
        self._goes_on(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._goes_on(state, control)

    def on_train_end(self, args, state, control, **kwargs):
        stage = self.trainer._stage
        if stage is not None and stage.decay and state.global_step < state.max_steps:
            raise ValueError(
                f"The stage {stage.name!r} was stopped after {state.global_step} of {state.max_steps} steps: its "
                "channels have not decayed yet, so they are not cut."
            )
        # It may have ended before the point, by a callback: going back to the start instead would be another method.
        if self._takes_rewind_point(args) and args.method != "dense" and not self._rewind_point().is_dir():
            raise ValueError(
                f"`rewind_step` is {args.rewind_step}, but the first stage ended after {state.global_step} steps."
            )

    def _rewind_point(self):
        return self.trainer.run_folder.kept_point(0, self.trainer.stages)

    def on_step_end(self, args, state, control, **kwargs):
        self._goes_on(state, control)
        trainer = self.trainer
        if self._takes_rewind_point(args) and state.global_step == args.rewind_step:
            trainer._save_model_folder(self._rewind_point())
