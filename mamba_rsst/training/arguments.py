"""RSSTConfig: transformers' TrainingArguments plus the rounds of training, pruning and recovery."""

import math
import warnings
from dataclasses import dataclass, field, fields

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import trainer_log_levels

from ..pruning.penalty import PENALTIES, PENALTY_SCOPES
from ..pruning.schedules import SCHEDULES


METHODS = ("rsst", "refill", "prune", "unstructured", "dense", "scratch")
UNPRUNED = ("dense", "scratch")
"""Methods whose run is its first stage alone."""
REWINDS = ("none", "initial", "step")
RAMPS = ("geometric", "linear", "cubic")
SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")
LARGEST_WEIGHT, TEMPERATURES = 1e6, (0.01, 1000.0)
"""Of distillation: what lies beyond leaves nothing of the task, or overflows."""


@dataclass
class RSSTConfig(TrainingArguments):
    """Arguments of `RSSTTrainer`. All of TrainingArguments keep their meaning, within each stage of the run.

    A run is a list of stages, each with an optimizer and a learning-rate schedule of its own:

        method="rsst"          train, then per round: rsst (channels chosen, decayed away, cut at the end), recover
        method="refill"        train, then per round: prune (channels chosen and cut, survivors rewound), recover
        method="prune"         the same without rewinding: one-shot pruning, or gradual with several rounds
        method="unstructured"  train, then per round: mask (the smallest weights zeroed), recover under the mask
        method="dense"         train
        method="scratch"       train; a recipe then builds its model anew at the size that `pruning` would leave

    `spread_epochs` puts a stage before each choice in which all channels are decayed a little. `num_train_epochs` is
    the length of the first stage; 0 starts from the weights as they are given.

    With `ema_decay` each stage averages its weights anew (see `averaging.WeightAverage`); its evaluations see the
    average, and so does all that follows it: selection, cut, teacher, the next stage. A stage that decays channels
    keeps its plain weights, since an average would bring the leaving channels back. So does the point that rewinding
    goes back to, since training goes on from there.
    """

    method: str = field(default="rsst", metadata={"help": f"One of {list(METHODS)}."})
    num_rounds: int = field(default=1, metadata={"help": "Rounds of choosing, removing and recovering."})
    ramp: str = field(
        default="geometric",
        metadata={
            "help": "Sparsity after round i of S: geometric 1-(1-s)^(i/S), linear s i/S, cubic s (1-(1-i/S)^3) "
            "(arXiv:1710.01878)."
        },
    )
    round_rate: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of what is left that each round removes, in place of the final sparsity: "
            "1-(1-rate)^num_rounds."
        },
    )
    spread_epochs: float = field(
        default=0.0,
        metadata={
            "help": "Before each choice: epochs in which all channels are decayed, so that those the loss does not "
            "hold up fall behind and the scores spread (GReg-2, arXiv:2012.09243)."
        },
    )
    spread_residual: float = field(
        default=0.5, metadata={"help": "That decay alone would shrink every weight to this fraction."}
    )
    rsst_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of each RSST stage; default num_train_epochs."}
    )
    recovery_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of training after each cut; default num_train_epochs."}
    )
    rsst_learning_rate: float | None = field(default=None, metadata={"help": "Default learning_rate."})
    recovery_learning_rate: float | None = field(default=None, metadata={"help": "Default learning_rate."})
    rsst_lr_scheduler_type: SchedulerType | None = field(
        default=None,
        metadata={
            "help": "Learning-rate schedule of stages that decay channels; default lr_scheduler_type. Constant ones "
            "leave the annealing to the recovery."
        },
    )

    penalty: str = field(
        default="growing_l2", metadata={"help": "growing_l2 (decoupled decay) or group_lasso (in the loss)."}
    )
    penalty_scope: str = field(default="leaving", metadata={"help": "group_lasso: the leaving channels, or all."})
    schedule: str = field(default="exp_power", metadata={"help": f"Growth of lambda over a stage: {list(SCHEDULES)}."})
    schedule_power: float = field(default=4.0, metadata={"help": "Exponent p of the schedules power and exp_power."})
    lambda_max: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the penalty at the end of the stage; default: see `residual` (growing_l2), 0.1."
        },
    )
    residual: float = field(
        default=1e-3,
        metadata={"help": "growing_l2 without lambda_max: shrink the leaving weights to this fraction in one stage."},
    )

    rewind: str | None = field(
        default=None,
        metadata={"help": "Where survivors go back to: initial, step, none. Default: refill initial, others none."},
    )
    rewind_step: int = field(default=0, metadata={"help": "rewind=step: the optimizer step of the first stage."})

    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight w in [0, 1] of the dense model's soft targets, after the first stage: "
            "(1-w) task + w T^2 KL."
        },
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "Temperature T of the soft targets."})
    distillation_hidden_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the relative squared distance between the residual streams of the model and the dense "
            "one, block by block, added to the loss after the first stage; 0 = off; 30 on CIFAR-10. Costs the memory "
            "of both streams. With drop path its noise counts as distance."
        },
    )
    distillation_hidden_fade: bool = field(
        default=False,
        metadata={
            "help": "Let that weight fall evenly to 0 over each recovery: held at first, free at the end; a stage "
            "that decays channels keeps it."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of an exponential moving average of the weights, 0.999 or so; 0 = none. Evaluations and "
            "the end of a stage take the average, except in a stage that decays channels."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={"help": "torch.compile each block by itself: fused kernels, seconds to compile, once per width."},
    )
    compile_shapes: int | None = field(
        default=None,
        metadata={
            "help": "Compile only models whose blocks have at most so many different shapes, each of which takes "
            "seconds: 1 compiles the dense model and spares short runs the uneven ones. Default: always."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Replay each training step of the usual batch size as one CUDA graph. One GPU, fp32 or bf16; "
            "compiled steps gain most."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Not transformers' True, which waits for the GPU in every step and hides a NaN loss."},
    )
    calibration_batches: int = field(default=8, metadata={"help": "Training batches that data-driven scores look at."})

    def __post_init__(self):
        self._check()
        super().__post_init__()
        if self.rsst_lr_scheduler_type is not None:
            self.rsst_lr_scheduler_type = SchedulerType(self.rsst_lr_scheduler_type)
        self._warn_of_ignored()

    @classmethod
    def check(cls, **arguments) -> "RSSTConfig":
        """The settings without a device, which an instance made as usual claims: to plan with, not to train with.

        Raises ValueError for settings that no machine could follow.
        """
        self = cls.__new__(cls)
        self.__dict__.update({f.name: f.default for f in fields(cls)}, **arguments)
        self._check()
        return self

    def _check(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("penalty", PENALTIES),
            ("penalty_scope", PENALTY_SCOPES),
            ("schedule", tuple(SCHEDULES)),
            ("ramp", RAMPS),
            ("rewind", (None, *REWINDS)),
            ("train_sampling_strategy", SAMPLING),
            ("log_level", tuple(trainer_log_levels)),
            ("log_level_replica", tuple(trainer_log_levels)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")
        if not 0 <= self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` must be >= 0 and finite, got {self.num_train_epochs}.")
        for name in (
            "num_rounds",
            "calibration_batches",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be > 0 and finite, got {getattr(self, name)}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        numbers = ("learning_rate", "rsst_learning_rate", "recovery_learning_rate", "lambda_max")
        numbers += ("rsst_epochs", "recovery_epochs", "spread_epochs")
        numbers += ("weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon")
        for name in numbers:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be >= 0 and finite, got {value}.")
        weight = self.distillation_hidden_weight
        if weight is None or not 0 <= weight <= LARGEST_WEIGHT:
            raise ValueError(
                f"`distillation_hidden_weight` must be >= 0 and at most {LARGEST_WEIGHT:g}, got {weight}."
            )
        if not 0 < self.schedule_power < math.inf:
            raise ValueError(f"`schedule_power` must be > 0 and finite, got {self.schedule_power}.")
        if self.method == "rsst" and self.rsst_epochs == 0:
            raise ValueError("`rsst_epochs` must be > 0: the leaving channels are decayed away during that stage.")
        if self.compile_shapes is not None and self.compile_shapes < 1:
            raise ValueError(f"`compile_shapes` must be at least 1, got {self.compile_shapes}.")
        for name in ("residual", "spread_residual"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in (0, 1), got {getattr(self, name)}.")
        if self.round_rate is not None:
            if not 0.0 < self.round_rate < 1.0:
                raise ValueError(f"`round_rate` must be in (0, 1), got {self.round_rate}.")
            if self.ramp != "geometric":
                raise ValueError(f"`round_rate` removes the same fraction in each round: ramp={self.ramp!r} does not.")
        if self.spread_epochs > 0 and self.method == "unstructured":
            raise ValueError("`spread_epochs` spreads the scores of channels; method='unstructured' removes weights.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.ema_decay > 0 and optimizer.startswith("schedule_free"):
            raise ValueError(f"`ema_decay` does not go with optim={optimizer!r}, which averages the weights itself.")
        if self.method not in UNPRUNED and optimizer.startswith("schedule_free"):
            raise ValueError(
                f"optim={optimizer!r} keeps weights of its own and would bring back what is decayed or masked; prune "
                "with another optimizer."
            )
        if not 0.0 <= self.distillation_weight <= 1.0:
            raise ValueError(f"`distillation_weight` must be in [0, 1], got {self.distillation_weight}.")
        low, high = TEMPERATURES
        if not low <= self.distillation_temperature <= high:
            raise ValueError(
                f"`distillation_temperature` must be in [{low}, {high}], got {self.distillation_temperature}."
            )
        if self.penalty_scope == "all" and self.penalty != "group_lasso":
            raise ValueError(
                '`penalty_scope="all"` goes with penalty="group_lasso"; growing_l2 decays leaving channels.'
            )
        if self.rewind == "step" and (self.rewind_step < 1 or self.num_train_epochs == 0):
            raise ValueError("rewind='step' needs a `rewind_step` of at least 1 and a first stage to take it from.")
        if self.save_only_model:
            raise ValueError(
                "`save_only_model` leaves out what a run needs to be resumed: optimizer and random numbers."
            )
        if self.resume_from_checkpoint:
            raise ValueError(
                "`resume_from_checkpoint` is no setting here: where a run goes on follows from its folder (--resume)."
            )
        for name in ("seed", "data_seed"):
            if (seed := getattr(self, name)) is not None and not 0 <= seed < 2**32:
                raise ValueError(f"`{name}` must be in [0, 2**32), got {seed}.")
        if self.max_steps > 0:
            raise ValueError("`max_steps` does not say which stage it bounds; set the epochs of the stages instead.")
        if getattr(self, "enable_jit_checkpoint", False):
            raise ValueError(
                "`enable_jit_checkpoint` stops a stage early, which would count as its end; save by `save_steps` and "
                "go on with the run in its folder."
            )
        if self.parallelism_config is not None and not hasattr(self.parallelism_config, "get_device_mesh"):
            raise ValueError(
                f"`parallelism_config` must be accelerate's ParallelismConfig, got {self.parallelism_config!r}."
            )
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` takes the whole model, whose widths change here: use `compile_blocks` instead."
            )
        if self.cuda_graphs:
            apart = ("fp16", "gradient_checkpointing", "logging_nan_inf_filter", "torch_empty_cache_steps")
            apart += ("activation_checkpointing",)  # what transformers 5.23 calls gradient_checkpointing
            for name in (*apart, "auto_find_batch_size"):
                if getattr(self, name, False):
                    raise ValueError(f"`cuda_graphs` does not go with `{name}`: a recorded step runs without the CPU.")
        scheduler = self.rsst_lr_scheduler_type or self.lr_scheduler_type
        scheduler = getattr(scheduler, "value", scheduler)
        if scheduler in ("reduce_lr_on_plateau", "greedy"):
            unknown = f"with lr_scheduler_type={scheduler!r} the learning rates are not known ahead."
            if self.spread_epochs > 0 and self.method not in UNPRUNED:
                raise ValueError(f"`spread_epochs` needs another `rsst_lr_scheduler_type`: {unknown}")
            if self._solves_residual():
                raise ValueError(f"Give `lambda_max`: {unknown}")

    def _solves_residual(self) -> bool:
        return self.method == "rsst" and self.penalty == "growing_l2" and self.lambda_max is None

    def __getstate__(self) -> dict:
        """What Trainer pickles as training_args.bin, which a push uploads: without the hub's token. A copy lacks it
        too."""
        return {**vars(self), "hub_token": None}

    @property
    def total_train_batch_size(self) -> int:
        """Samples of an update, of all processes and accumulated micro-batches."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def rewinds_to(self) -> str:
        """`rewind` with its default filled in."""
        return self.rewind or ("initial" if self.method == "refill" else "none")

    @property
    def is_taught(self) -> bool:
        """Whether the dense model teaches the stages after the first, where there are any."""
        return max(self.distillation_weight, self.distillation_hidden_weight) > 0

    def scheduler_of(self, decays: bool) -> SchedulerType:
        """The learning-rate schedule of stages that decay channels, or of the others."""
        return (self.rsst_lr_scheduler_type if decays else None) or self.lr_scheduler_type

    def sparsity_after(self, sparsity: float, round: int) -> float:
        """What of a final `sparsity` is reached after a round, 1..num_rounds; the last one reaches all of it."""
        done = round / self.num_rounds
        if self.ramp == "geometric":
            return 1.0 - (1.0 - sparsity) ** done  # densities multiply
        return sparsity * (done if self.ramp == "linear" else 1.0 - (1.0 - done) ** 3)

    def _warn_of_ignored(self) -> None:
        ignored = [] if self._solves_residual() else ["residual"]
        if self.method != "rsst":
            ignored += ["rsst_epochs", "penalty", "schedule", "lambda_max", "penalty_scope"]
        if self.method != "rsst" or self.schedule not in ("power", "exp_power"):
            ignored += ["schedule_power"]
        if self.distillation_weight == 0:
            ignored += ["distillation_temperature"]
        if self.method == "rsst" and not self.num_train_epochs and not self.recovery_epochs:
            ignored += ["ema_decay"]  # no stage but those that decay channels
        if self.rewind != "step":
            ignored += ["rewind_step"]
        if self.spread_epochs == 0:
            ignored += ["spread_residual"]
            if self.method != "rsst":
                ignored += ["rsst_learning_rate", "rsst_lr_scheduler_type"]
        recovers = self.num_train_epochs if self.recovery_epochs is None else self.recovery_epochs
        if not recovers and self.method != "rsst" and self.spread_epochs == 0:
            ignored += ["distillation_weight", "distillation_hidden_weight"]  # no stage that trains after the first
        if not recovers or self.method in UNPRUNED or self.distillation_hidden_weight == 0:
            ignored += ["distillation_hidden_fade"]
        if not self.compile_blocks:
            ignored += ["compile_shapes"]
        if self.num_rounds == 1:
            ignored += ["ramp"]
        if self.method in UNPRUNED:
            ignored += ["num_rounds", "round_rate", "spread_epochs", "spread_residual", "ramp"]
            ignored += ["recovery_epochs", "recovery_learning_rate"]
            ignored += ["distillation_weight", "distillation_hidden_weight"]
            if self.method == "scratch" or self.rewind != "step":  # dense: for runs that take its stage over
                ignored += ["rewind"]
        defaults = {f.name: f.default for f in fields(self)}
        if names := [name for name in dict.fromkeys(ignored) if getattr(self, name) != defaults[name]]:
            warnings.warn(f"With method={self.method!r} and the other settings, {names} is ignored.", stacklevel=4)
