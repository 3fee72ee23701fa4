"""The run of RSSTTrainer: stages one after the other, each a whole `Trainer.train()`, and the cut between them."""

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Iterable
from itertools import islice

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, set_seed
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
)
from ..pruning.prune import score_groups
from ..pruning.weight_masks import check_weight_sparsity
from .arguments import UNPRUNED, RSSTConfig
from .averaging import WeightAverage
from .compiling import compile_blocks_, few_shapes, uncompile_blocks_
from .distillation import Teacher
from .first_stage import copy_first_stage, read_first_stage
from .leaving import Leaving
from .prunable import check_run
from .rounds import (
    UNWRITTEN,
    WHOLE,
    RunFolder,
    RunState,
    Stage,
    dense_widths_of,
    last_complete_checkpoint,
    load_masks,
    plan_stages,
    remove_checkpoints,
    replace_folder,
    save_masks,
    save_tensors,
)
from .sharding import check_sharding, checkpoint_files, copy_marks, copy_to_shard, gather_


_FREE = ("compile_blocks", "compile_shapes", "cuda_graphs", "logging_nan_inf_filter")
"""Settings that a resumed run may change."""


class StagedTrainer(Trainer):
    """Opens or resumes a run, and trains stage by stage: chooses before Trainer's training, cuts and rewinds after it.

    What happens within a stage's training is RSSTTrainer's, whose docstring also holds the arguments.
    """

    def __init__(
        self,
        model=None,
        args: RSSTConfig | None = None,
        *,
        pruning: PruningConfig | None = None,
        calibration: Iterable | None = None,
        **kwargs,
    ):
        args = RSSTConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RSSTConfig):
            raise ValueError(f"`args` must be an RSSTConfig, got {type(args).__name__}.")
        if kwargs.get("model_init") is not None or any(kwargs.get("optimizers") or ()):
            raise ValueError("RSSTTrainer takes a `model` and builds its optimizers itself, by `args.optim`.")
        check_run(model, args, pruning, kwargs.get("train_dataset"))
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
        self.calibration = None if calibration is None else list(calibration)  # read again in every round
        self.stages = plan_stages(args)
        self.run_folder = RunFolder(args.output_dir)
        self.run_state: RunState | None = None
        self.teacher = Teacher(args)
        self._stage: Stage | None = None
        self._leaving = Leaving(args)
        self._average = WeightAverage(args.ema_decay)
        self.callback_handler.callbacks.insert(0, self._average)  # others see the average when a stage's training ends

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
        # Not the batch of a process: others may share the same batch out in other ways.
        names = [*RSSTConfig.__annotations__, "learning_rate", "num_train_epochs", "weight_decay", "seed", "optim"]
        names += ["lr_scheduler_type", "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"]
        names += UNWRITTEN
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
            self._forget_parameters()
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
            self._rewind(index)
        check_weight_sparsity(self.model, self._leaving.zeros)
        metrics["end"] = metrics["after_cut"] if stage.cut and not stage.rewind else self._evaluate_quietly()
        self._leaving.end()
        self._save_model_folder(self.run_folder.model(index + 1, self.stages))
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

    def _forget_parameters(self) -> None:
        """Those that a stage has trained: the next may train others."""
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
                chosen = [select_channels(self.model, config, dense=self._dense_widths(stage), scores=scores)]
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
            return score_groups(self.model, self._config_of(stage), batches, self._dense_widths(stage))

    def _dense_widths(self, stage: Stage) -> dict[str, int]:
        cuts = self.run_folder.cuts(self.stages[: self.stages.index(stage)])
        return dense_widths_of(self._groups(), self.run_state.dense_widths, cuts)

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

    def _rewind(self, index: int) -> None:
        """Set the survivors back to the rewind point, which is cut alike and kept for the next round."""
        from_step = self.args.rewinds_to == "step"
        point = type(self.model).from_pretrained(self.run_folder.rewind_point(index, self.stages, from_step))
        if self._channels:
            align_(point, self.pruning)
        self._remove_(point)
        self.model.load_state_dict(point.state_dict())
        if self._channels and self.is_world_process_zero():
            replace_folder(point, self.run_folder.kept_point(index, self.stages))
        self.accelerator.wait_for_everyone()

    def _fresh_optimizer(self) -> None:
        """Forget the optimizer, schedule and wrapped model: they may hold parameters from before a cut."""
        self.optimizer = self.lr_scheduler = None
        self._forget_parameters()
        self._created_lr_scheduler = False
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        # The loss scale is the last stage's, and no checkpoint of this stage holds it.
        if self.accelerator.scaler is not None:
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
        if not folder.is_dir():
            raise ValueError(f"{str(self.run_folder.path)!r} cannot be resumed: {str(folder)!r} is missing from it.")
        model = type(self.model).from_pretrained(folder)
        copy_marks(self.model, model)  # a file holds neither what is frozen nor flags
        self._move_model_to_device(model, self.args.device)
        model.train(self.model.training)
        self.callback_handler.model = model
        self.model = self.model_wrapped = model

    def _save_model_folder(self, path) -> None:
        model = self.model if self._whole is None else gather_(self._whole, self.model)
        if self.is_world_process_zero():
            replace_folder(model, path, self.processing_class)
        self.accelerator.wait_for_everyone()

    def _write_state(self) -> None:
        if self.is_world_process_zero():
            self.run_folder.write(self.run_state)
        self.accelerator.wait_for_everyone()

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

    def _dense_model(self):
        return type(self.model).from_pretrained(self.run_folder.model(1, self.stages))
