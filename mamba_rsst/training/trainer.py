"""RSSTTrainer: transformers' Trainer, run once per stage, with the penalty, the cut and distillation at its hooks."""

import contextlib
import copy
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Iterable
from itertools import islice

import torch
from accelerate.utils import AutocastKwargs, DistributedType, broadcast_object_list
from huggingface_hub import upload_folder
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from ..pruning import (
    Masks,
    PruningConfig,
    align_,
    apply_weight_masks_,
    choose_weights,
    find_groups,
    select_channels,
    shrink_,
    weight_sparsity,
)
from ..pruning.masks import kept_widths
from ..pruning.prune import score_groups
from ..pruning.weight_masks import check_weight_sparsity
from .arguments import UNPRUNED, RSSTConfig
from .averaging import WeightAverage
from .compiling import compile_blocks_, few_shapes, uncompile_blocks_
from .data import EpochSampler
from .distillation import Teacher
from .first_stage import copy_first_stage, read_first_stage
from .graphed_step import GraphedStep
from .leaving import Leaving, check_rewind_step
from .prunable import check_prunable, check_taught
from .rounds import (
    NOT_UPLOADED,
    WHOLE,
    RunFolder,
    RunState,
    Stage,
    last_complete_checkpoint,
    load_masks,
    plan_stages,
    remove_checkpoints,
    save_masks,
    save_tensors,
)
from .sharding import check_sharding, checkpoint_files, copy_marks, copy_to_shard, gather_, reshard_


_FREE = ("compile_blocks", "compile_shapes", "cuda_graphs", "logging_nan_inf_filter")
"""Settings that a resumed run may change."""


class RSSTTrainer(Trainer):
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
        args = RSSTConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RSSTConfig):
            raise ValueError(f"`args` must be an RSSTConfig, got {type(args).__name__}.")
        if kwargs.get("model_init") is not None or any(kwargs.get("optimizers") or ()):
            raise ValueError("RSSTTrainer takes a `model` and builds its optimizers itself, by `args.optim`.")
        if args.method not in UNPRUNED:
            if pruning is None:
                raise ValueError(f"method={args.method!r} needs `pruning`, a PruningConfig.")
            if model is not None:
                check_prunable(model, args, pruning)
                check_taught(model, args)
        batch, samples = args.train_batch_size * args.world_size, kwargs.get("train_dataset")
        if args.dataloader_drop_last and hasattr(samples, "__len__") and len(samples) < batch:
            raise ValueError(f"`dataloader_drop_last` leaves nothing of {len(samples)} samples in batches of {batch}.")
        if args.cuda_graphs and (args.device.type != "cuda" or args.world_size * args.n_gpu > 1):
            here = f"{args.world_size * max(1, args.n_gpu)} x {args.device.type}"
            raise ValueError(f"`cuda_graphs` needs one process on one CUDA GPU; this run has {here}.")
        stages, leaving = plan_stages(args), Leaving(args)
        if hasattr(samples, "__len__"):
            leaving.check(stages, len(samples))
        super().__init__(model=model, args=args, **kwargs)
        if self.is_deepspeed_enabled and (args.method not in UNPRUNED or args.ema_decay > 0):
            raise ValueError("Weights that DeepSpeed has sharded cannot be scored, cut or averaged; use FSDP 2.")
        self._fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self._fsdp is not None:
            check_sharding(self._fsdp, self.model, args)
            self._fsdp.mixed_precision_policy = None  # would round A_log to bf16: autocast_smart_context_manager
            self.is_fsdp_enabled = False  # but while a stage trains: before and after it the model is whole
        self._whole = None  # the whole model, which waits while a stage trains a sharded copy
        self.pruning = pruning
        self.eval_data_collator = eval_data_collator
        self.calibration = None if calibration is None else list(calibration)  # read again in every round
        self.stages = stages
        self.run_folder = RunFolder(args.output_dir)
        self.run_state: RunState | None = None
        self.teacher = Teacher(args)
        self._stage: Stage | None = None
        self._leaving = leaving
        self._graphed: GraphedStep | None = None
        self._clock = (time.perf_counter(), 0)
        self._parameter_count: int | None = None
        self._clipped: list | None = None
        self._average = WeightAverage(args.ema_decay)
        self.callback_handler.callbacks.insert(0, self._average)  # others see the average when a stage's training ends
        self.add_callback(_StageCallback(self))

    # ---- the run: stages, one after the other ----------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | None = None, first_stage=None, **kwargs) -> TrainOutput:
        """Run the stages that are not done yet. Returns the last one's TrainOutput.

        resume_from_checkpoint: True goes on with the run in `args.output_dir`, under the same settings. Raises
        ValueError for a path: where a run goes on follows from its folder.
        first_stage: folder of a finished run of method "dense" with the same model, data and settings, whose training
        a new run takes over as its own first stage: the same weights, without training them again.
        """
        if resume_from_checkpoint not in (None, False, True):
            raise ValueError(f"`resume_from_checkpoint` is True or False here, got {resume_from_checkpoint!r}.")
        self._open_run(bool(resume_from_checkpoint), first_stage)
        output = TrainOutput(0, 0.0, {})
        whole_run = copy.copy(self.args)
        try:
            for index in range(self.run_state.done, len(self.stages)):
                output = self._run_stage(index, whole_run, **kwargs) or output
        finally:
            names = ("output_dir", "num_train_epochs", "learning_rate", "lr_scheduler_type", "load_best_model_at_end")
            for name in names:
                setattr(self.args, name, getattr(whole_run, name))
            self._stage = None
            self._leaving.end()
            self._average.stop()
        return output

    def _open_run(self, resume: bool, first_stage=None) -> None:
        folder = self.run_folder
        if folder.exists():
            if not resume:
                raise ValueError(
                    f"{str(folder.path)!r} already holds a run: resume it, or choose another `output_dir`."
                )
            self.run_state = folder.read(self.stages, self._settings())
            self._set_model(folder.model(self.run_state.done, self.stages))
            if self.is_world_process_zero():
                for i, stage in enumerate(self.stages[: self.run_state.done]):
                    remove_checkpoints(folder.stage(i, stage))  # interrupted before they were
            return
        if resume:
            raise ValueError(f"{str(folder.path)!r} holds no run to resume.")
        widths = {g.name: g.size for g in self._groups()} if self.pruning else {}
        self.run_state = RunState([s.name for s in self.stages], settings=self._settings(), dense_widths=widths)
        taken = first_stage and read_first_stage(first_stage, self.run_state.settings, self.model)
        self._save_model_folder(folder.start)
        if taken:
            if self.is_world_process_zero():
                point = self.args.rewind == "step"  # a run that rewinds to `start` must not find it
                copy_first_stage(first_stage, folder.stage(0, self.stages[0]), point)
            self.accelerator.wait_for_everyone()
            self.run_state.take_over(taken, channel_sparsity=bool(widths) and self._channels)
            self._set_model(folder.model(1, self.stages))
        self._write_state()

    def _settings(self) -> dict:
        """What a run may not change when it is resumed, as JSON holds it."""
        # Not the batch sizes: other processes may share the same batch out in other ways.
        names = [*RSSTConfig.__annotations__, "learning_rate", "num_train_epochs", "weight_decay", "seed", "optim"]
        names += ["lr_scheduler_type", "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"]
        settings = {name: getattr(self.args, name) for name in names if name not in _FREE}
        if self.pruning is not None:
            settings["pruning"] = dataclasses.asdict(self.pruning)
        return json.loads(json.dumps(settings))

    def _run_stage(self, index: int, run_args, **kwargs) -> TrainOutput | None:
        stage = self._stage = self.stages[index]
        folder = self.run_folder.stage(index, stage)
        metrics = {}
        started = time.time()
        set_seed(self.args.seed + index)  # each stage draws its own numbers, the same whether resumed or not
        for part in (self.data_collator, self.train_dataset):  # augmentation; a stream's order
            if hasattr(part, "seed"):  # others in every stage, the same in every resumption
                part.seed = self.args.seed + 7919 * index
        masks = self._select(stage, folder) if stage.select else {}
        if stage.spread:
            masks = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in self._groups()}
        self._leaving.begin(stage, masks, self._groups() if masks else [])
        if stage.masked:
            file = self.run_folder.masks(index - 1, self.stages[index - 1])
            self._leaving.keep_zeros(load_masks(file))
        self.args.output_dir = str(folder)
        self.args.num_train_epochs = stage.epochs
        self.args.learning_rate = stage.learning_rate
        self.args.lr_scheduler_type = run_args.scheduler_of(stage.decay)
        # The best weights of a stage that decays channels are its first: they would bring the leaving channels back.
        self.args.load_best_model_at_end = run_args.load_best_model_at_end and not stage.decay
        self.teacher.begin(stage, self._dense_model, lambda: self.run_folder.cuts(self.stages[:index]))
        output = None
        if stage.epochs > 0:
            self._fresh_optimizer()
            files = WHOLE if self._fsdp is None else checkpoint_files(self._fsdp)
            checkpoint = last_complete_checkpoint(folder, self.args.world_size, files)
            with self._sharded():
                (compile_blocks_ if self._compiles() else uncompile_blocks_)(self.model)
                set_seed(self.args.seed + index)
                if self.args.ema_decay > 0 and not stage.decay:
                    self._average.start(self.model, checkpoint)
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            self._forget_graphs()
            if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
                # They would still be scored: of nothing but NaN the first class is the largest.
                raise ValueError(f"The weights are not finite after stage {stage.name!r}: its training has diverged.")
        else:
            self.state.log_history, self.state.epoch = [], 0
        if stage.cut:
            importances = map(self.pruning.importance_of, self.pruning.targets)
            if stage.decay and "leave_one_out" not in importances:  # what the same score says of the channels now
                self._save_scores(folder, "after", self._score(stage, folder))
            metrics["before_cut"] = self._evaluate_quietly()
            self._remove_(self.model)
            self._fresh_optimizer()
            if not self._compiles():  # or scoring them without a recovery before would compile every new shape
                uncompile_blocks_(self.model)
            metrics["after_cut"] = self._evaluate_quietly()
        if stage.rewind:
            self._rewind(index, folder)
        check_weight_sparsity(self.model, self._leaving.zeros)
        metrics["end"] = metrics["after_cut"] if stage.cut and not stage.rewind else self._evaluate_quietly()
        self._leaving.end()
        self._save_model_folder(folder / "model")
        state = self.run_state
        state.history += self._with_offsets(self.state.log_history, stage)
        steps, epochs = (self.state.global_step, self.state.epoch) if stage.epochs > 0 else (0, 0.0)
        state.spent[stage.name] = {"epochs": epochs, "steps": steps, "seconds": time.time() - started}
        state.steps, state.epochs = state.steps + steps, state.epochs + epochs
        state.metrics[stage.name] = metrics
        state.done = index + 1
        state.seconds += state.spent[stage.name]["seconds"]
        self._write_state()
        if self.is_world_process_zero():
            remove_checkpoints(folder)
        return output

    def _compiles(self) -> bool:
        return self.args.compile_blocks and few_shapes(self.model, self.args.compile_shapes)

    def _forget_graphs(self) -> None:
        """And with them the memory of a step's activations."""
        self._graphed = None
        self._leaving.forget_parameters()

    @property
    def _channels(self) -> bool:
        return self.args.method != "unstructured"

    def _select(self, stage: Stage, folder) -> Masks:
        """Choose on the trained weights, before anything is rewound; rank 0 decides for all processes."""
        path = folder / RunFolder.MASKS
        chosen = [path.is_file() and load_masks(path)]
        broadcast_object_list(chosen)
        if self._channels:
            align_(self.model, self.pruning)
        if not chosen[0]:
            config = self._config_of(stage)
            if self._channels:
                scores = self._score(stage, folder)
                chosen = [select_channels(self.model, config, dense=self.run_state.dense_widths, scores=scores)]
                self._save_scores(folder, "before", scores)
            else:
                chosen = [choose_weights(self.model, config)]
            broadcast_object_list(chosen)
            if self.is_world_process_zero():
                save_masks(chosen[0], path)
        return chosen[0]

    def _score(self, stage: Stage, folder) -> dict[str, torch.Tensor]:
        batches = self.calibration
        if batches is None:
            batches = islice(self.get_train_dataloader(), self.args.calibration_batches)
        self._move_model_to_device(self.model, self.args.device)
        # Scores hook into modules and run each batch size once: compiled code would neither be hooked nor pay.
        with self.accelerator.autocast(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            return score_groups(self.model, self._config_of(stage), batches, self.run_state.dense_widths)

    def _save_scores(self, folder, when: str, scores: dict[str, torch.Tensor]) -> None:
        """stages/<i>-<name>/scores.safetensors: "before:<group>" when channels were chosen, "after:<group>" at the end
        of a stage that decayed some of them, unless the score is a search that costs as much as training."""
        if self.is_world_process_zero():
            file = folder / "scores.safetensors"
            kept = load_masks(file) if file.is_file() else {}
            save_tensors(kept | {f"{when}:{name}": score for name, score in scores.items()}, file)

    def _config_of(self, stage: Stage) -> PruningConfig:
        """What is to be gone once the stage's round is over."""

        def reached(sparsity):
            return self.args.sparsity_after(sparsity, stage.round)

        sparsity = self.pruning.sparsity
        sparsity = {t: reached(s) for t, s in sparsity.items()} if isinstance(sparsity, dict) else reached(sparsity)
        return dataclasses.replace(self.pruning, sparsity=sparsity)

    def _remove_(self, model) -> None:
        if self._channels:
            shrink_(model, self._leaving.masks)
        else:
            apply_weight_masks_(model, self._leaving.masks)

    def _rewind(self, index: int, folder) -> None:
        """Set the survivors back to the rewind point, which is cut alike and kept for the next round."""
        point = type(self.model).from_pretrained(self.run_folder.rewind_point(index, self.stages))
        if self._channels:
            align_(point, self.pruning)
        self._remove_(point)
        self.model.load_state_dict(point.state_dict())
        if self._channels and self.is_world_process_zero():
            _replace_folder(point, folder / "rewind")
        self.accelerator.wait_for_everyone()

    def _fresh_optimizer(self) -> None:
        """Forget the optimizer, schedule and wrapped model: they may hold parameters from before a cut."""
        self.optimizer = self.lr_scheduler = None
        self._forget_graphs()
        self._parameter_count = self._clipped = None
        self._created_lr_scheduler = False
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        if (
            self.accelerator.scaler is not None
        ):  # its scale is the last stage's, and no checkpoint of this stage holds it
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)
        # An evaluation before the training prepares the bare model; left marked so, it would not be wrapped in DDP.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self._move_model_to_device(self.model, self.args.device)

    @contextlib.contextmanager
    def _sharded(self):
        """Under FSDP: `self.model` is a copy for accelerate to shard; afterwards the whole model, with its weights."""
        if self._fsdp is None:
            yield
            return
        whole = self._whole = self.model
        self._move_model_to_device(whole, torch.device("cpu"))
        self.model = self.model_wrapped = copy_to_shard(whole)
        if self._leaving.masks:  # the table, bound to the parameters that are trained
            self._leaving.bind(self._groups())
        self.is_fsdp_enabled = True
        try:
            yield
            gather_(whole, self.model)
        finally:
            self.is_fsdp_enabled = False
            self._whole = None
            self._leaving.bind([])
            self.model = self.callback_handler.model = whole
            self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None  # nor do they hold the copy
            self._fresh_optimizer()

    def _set_model(self, folder) -> None:
        model = type(self.model).from_pretrained(folder)
        copy_marks(self.model, model)  # a file holds neither what is frozen nor flags
        self._move_model_to_device(model, self.args.device)
        model.train(self.model.training)
        self.model = self.model_wrapped = model

    def _save_model_folder(self, path) -> None:
        model = self.model if self._whole is None else gather_(self._whole, self.model)
        if self.is_world_process_zero():
            _replace_folder(model, path)
        self.accelerator.wait_for_everyone()

    def _write_state(self) -> None:
        if self.is_world_process_zero():
            self.run_folder.write(self.run_state)
        self.accelerator.wait_for_everyone()

    def evaluate(self, *args, **kwargs) -> dict:
        """Trainer's, of the averaged weights where they are averaged, and without touching the random numbers of
        training, since a resumed run may skip an evaluation."""
        with torch.random.fork_rng(devices=[]), self._average.in_place():
            metrics = super().evaluate(*args, **kwargs)
        if self._whole is not None:
            reshard_(self.model)
        self._start_clock()
        return metrics

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        """Trainer's, and the averages: before trainer_state.json, which says that the checkpoint is complete."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._average.save(output_dir)

    def _start_clock(self) -> None:
        self._clock = (time.perf_counter(), self.state.global_step)

    def _evaluate_quietly(self) -> dict:
        """Metrics of the evaluation set, not mixed into the stage's log. Uncompiled: that would take longer."""
        if self.eval_dataset is None:
            return {}
        self._move_model_to_device(self.model, self.args.device)
        history = list(self.state.log_history)
        with torch.compiler.set_stance("force_eager"):
            metrics = self.evaluate()
        self.state.log_history = history
        return metrics

    def _with_offsets(self, history: list[dict], stage: Stage) -> list[dict]:
        step, epoch = self.run_state.steps, self.run_state.epochs
        return [
            {**entry, "stage": stage.name, "step": entry["step"] + step, "epoch": entry.get("epoch", 0.0) + epoch}
            for entry in history
            if "train_runtime" not in entry
        ]

    def _groups(self):
        return find_groups(self.model, self.pruning.targets)

    # ---- hooks of Trainer -------------------------------------------------------------------------------------------

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
                processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                with self.accelerator.autocast():
                    teacher = self.teacher.answer(inputs)
                loss = self.teacher.add_to(loss, outputs, teacher, labels, items, share, processes)
            if self._leaving.penalty() == "group_lasso":
                loss = loss + share * self._leaving.lasso()
        return (loss, outputs) if return_outputs else loss

    def _dense_model(self):
        return type(self.model).from_pretrained(self.run_folder.model(1, self.stages))

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

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's, with its own collator, and never without the last batch."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            with self._collate_with(self.eval_data_collator):
                return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

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

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if self._takes_rewind_point(args) and state.global_step == args.rewind_step:
            trainer._save_model_folder(trainer.run_folder.stage(0, trainer.stages[0]) / "rewind")


def _replace_folder(model, path) -> None:
    """Save a model beside `path`, then put it in place: the folder is whole or absent."""
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)
