"""RSSTConfig: transformers' TrainingArguments plus the rounds of training, pruning and recovery."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..pruning.penalty import PENALTIES, PENALTY_SCOPES
from ..pruning.schedules import SCHEDULES


METHODS = ("rsst", "refill", "dense")
REWINDS = ("none", "initial", "step")


@dataclass
class RSSTConfig(TrainingArguments):
    """Arguments of `RSSTTrainer`. All of TrainingArguments keep their meaning, within each stage of the run.

    A run is a list of stages, each with an optimizer and a learning-rate schedule of its own:

        method="rsst"    train, then per round: rsst (channels chosen, decayed away, cut at the end), recover
        method="refill"  train, then per round: prune (channels chosen and cut, survivors rewound), recover
        method="dense"   train

    `num_train_epochs` is the length of the first stage; 0 starts from the weights as they are given.
    """

    method: str = field(default="rsst", metadata={"help": "rsst, refill or dense."})
    num_rounds: int = field(
        default=1, metadata={"help": "Rounds; after round i of S the density is (1-sparsity)^(i/S)."}
    )
    rsst_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of each RSST stage; default num_train_epochs."}
    )
    recovery_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of training after each cut; default num_train_epochs."}
    )
    rsst_learning_rate: float | None = field(default=None, metadata={"help": "Default learning_rate."})
    recovery_learning_rate: float | None = field(default=None, metadata={"help": "Default learning_rate."})

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

    rewind: str = field(default="initial", metadata={"help": "refill: survivors go back to initial, step, or none."})
    rewind_step: int = field(default=0, metadata={"help": "rewind=step: the optimizer step of the first stage."})

    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight w of the dense model's soft targets: (1-w) task + w T^2 KL, in [0, 1]."}
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "Temperature T of the soft targets."})
    calibration_batches: int = field(default=8, metadata={"help": "Training batches that data-driven scores look at."})

    def __post_init__(self):
        for name, choices in (
            ("method", METHODS),
            ("penalty", PENALTIES),
            ("penalty_scope", PENALTY_SCOPES),
            ("schedule", tuple(SCHEDULES)),
            ("rewind", REWINDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")
        if self.num_train_epochs < 0:
            raise ValueError(f"`num_train_epochs` must be >= 0, got {self.num_train_epochs}.")
        if self.num_rounds < 1:
            raise ValueError(f"`num_rounds` must be at least 1, got {self.num_rounds}.")
        for name in ("rsst_epochs", "recovery_epochs", "rsst_learning_rate", "recovery_learning_rate", "lambda_max"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must be >= 0, got {value}.")
        if self.method == "rsst" and self.rsst_epochs == 0:
            raise ValueError("`rsst_epochs` must be > 0: the leaving channels are decayed away during that stage.")
        if not 0.0 < self.residual < 1.0:
            raise ValueError(f"`residual` must be in (0, 1), got {self.residual}.")
        if not 0.0 <= self.distillation_weight <= 1.0:
            raise ValueError(f"`distillation_weight` must be in [0, 1], got {self.distillation_weight}.")
        if self.distillation_temperature <= 0:
            raise ValueError(f"`distillation_temperature` must be > 0, got {self.distillation_temperature}.")
        if self.penalty_scope == "all" and self.penalty != "group_lasso":
            raise ValueError(
                '`penalty_scope="all"` goes with penalty="group_lasso"; growing_l2 decays leaving channels.'
            )
        if self.rewind == "step" and self.rewind_step < 1:
            raise ValueError("`rewind_step` must be at least 1 with rewind='step'.")
        if self.max_steps > 0:
            raise ValueError("`max_steps` does not say which stage it bounds; set the epochs of the stages instead.")
        super().__post_init__()
