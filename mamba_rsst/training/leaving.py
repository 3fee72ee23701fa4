"""What leaves in a stage, and the force that drives it out: masks, lambda over the stage, decay, lasso, zeros."""

import functools
import math
import warnings

import torch
from torch import Tensor
from transformers import get_scheduler

from ..pruning import Masks
from ..pruning.groups import Group
from ..pruning.penalty import MAX_DECAY, check_amount, decay_, group_lasso, leaving_share, strength_for
from ..pruning.schedules import schedule_value
from .arguments import RSSTConfig
from .graphed_step import capture
from .rounds import Stage


def check_rewind_step(args: RSSTConfig, steps: int) -> None:
    """Raises ValueError for a `rewind_step` beyond the first stage's `steps`; warns where the run itself, of method
    dense, never rewinds: of a sweep's runs others may begin with it too."""
    if args.rewind_step <= steps:
        return
    beyond = f"`rewind_step` is {args.rewind_step}, but the first stage has {steps} steps."
    if args.method != "dense":
        raise ValueError(beyond)
    warnings.warn(f"{beyond} None is kept.", stacklevel=1)  # from here, so that it is said once


class Leaving:
    """One object a trainer: `begin` and `end` bound a stage, the rest is asked at each step.

    masks: what the stage chose, True = keep: channels by group, or with method "unstructured" weights by parameter.
    groups: those of `masks`, bound to the parameters that are trained; empty for masks of weights.
    """

    def __init__(self, args: RSSTConfig):
        self.args = args
        self.penalty_weight = torch.zeros((), device=args.device)  # lambda, where a recorded step can read it
        self.end()

    def begin(self, stage: Stage, masks: Masks, groups: list[Group]) -> None:
        self.stage = stage
        self.masks = {name: mask.to(self.args.device) for name, mask in masks.items()}  # read in every step
        self.bind(groups)

    def bind(self, groups: list[Group]) -> None:
        """The groups of the model that is trained: under FSDP a copy of the one that was scored."""
        self.groups = [group for group in groups if group.name in self.masks]

    def keep_zeros(self, masks: Masks) -> None:
        """Weights, by parameter, that must stay zero while the stage trains."""
        self.zeros = masks

    def end(self) -> None:
        self.stage: Stage | None = None
        self.masks: Masks = {}
        self.groups: list[Group] = []
        self.zeros: Masks = {}
        self.lambda_max, self.steps = 0.0, 1
        self.forget_parameters()

    def forget_parameters(self) -> None:
        """They are about to be replaced."""
        self.graphed_decay = None
        self._zeroed: tuple[list, list] | None = None  # the weights that are zero, and the factors that keep them so

    # ---- lambda ----
    def penalty(self) -> str | None:
        """The penalty of the stage under way; None: nothing is decayed. A spreading stage always decays."""
        if self.stage is None or not self.stage.decay:
            return None
        return "growing_l2" if self.stage.spread else self.args.penalty

    def start(self, scheduler, steps: int) -> None:
        """Fix lambda_max for the stage: as given, or from the learning rates the stage will see."""
        if self.penalty():
            self.lambda_max, self.steps = self._strength(self.stage, scheduler, steps), max(1, steps)

    def weight(self, steps: int) -> float:
        """lambda of the step with which `steps` of the stage are done."""
        return self.lambda_max * self._growth(self.stage)(min(1.0, steps / self.steps))

    def _growth(self, stage: Stage):
        """f(u) of the stage's penalty; that of all channels rises evenly, as in GReg."""
        schedule = "linear" if stage.spread else self.args.schedule
        return functools.partial(schedule_value, schedule, power=self.args.schedule_power)

    def _solves(self, stage: Stage) -> bool:
        return stage.spread or self.args.lambda_max is None

    def _strength(self, stage: Stage, scheduler, steps: int) -> float:
        """lambda_max for a stage of so many steps. Raises ValueError for one that cannot do it, or would overshoot."""
        args, learning_rate, growth = self.args, stage.learning_rate, self._growth(stage)
        if args.penalty == "group_lasso" and not stage.spread:
            return 0.1 if args.lambda_max is None else args.lambda_max
        lambdas = getattr(scheduler, "lr_lambdas", None)
        rates = [learning_rate * lambdas[0](t) for t in range(steps)] if lambdas else [learning_rate] * steps
        if self._solves(stage):
            try:
                return strength_for(args.spread_residual if stage.spread else args.residual, rates, growth)
            except ValueError as error:
                kind = "spread" if stage.spread else "rsst"
                raise ValueError(
                    f"The {kind} stage has {steps} steps at learning rates up to {max(rates):.3g}: {error} Give it a "
                    f"larger `{kind}_epochs` or learning rate, or less warm-up."
                ) from error
        peak = max(rate * args.lambda_max * growth((t + 1) / steps) for t, rate in enumerate(rates))
        if not peak < 1.0:
            raise ValueError(f"lr * lambda would reach {peak:.3g}, it must stay below 1; lower `lambda_max`.")
        return args.lambda_max

    def check(self, stages: list[Stage], samples: int) -> None:
        """Settings under which a stage cannot work are an error now, not when it begins."""
        args = self.args
        batches = samples / (args.train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        first = math.ceil(stages[0].epochs * per_epoch)
        if args.method != "scratch" and args.rewinds_to == "step":
            check_rewind_step(args, first)
        for stage in {(stage.decay, stage.spread): stage for stage in stages if stage.epochs > 0}.values():
            steps = math.ceil(stage.epochs * per_epoch)
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=stage.learning_rate)
            kind = args.scheduler_of(stage.decay)
            try:
                scheduler = get_scheduler(
                    kind,
                    optimizer,
                    num_warmup_steps=args.get_warmup_steps(steps),
                    num_training_steps=steps,
                    scheduler_specific_kwargs=args.lr_scheduler_kwargs,
                )
            except TypeError as error:
                raise ValueError(f"`lr_scheduler_kwargs` do not fit {kind.value!r}: {error}") from error
            if stage.decay:
                self._strength(stage, scheduler, steps)

    # ---- at each step ----
    def lasso(self) -> Tensor:
        """The penalty's term of the loss."""
        return self.penalty_weight * group_lasso(self.groups, self.masks, self.args.penalty_scope)

    def share(self) -> float:
        return leaving_share(self.groups, self.masks)

    def after_step(self, model, learning_rate: float, steps: int, stepped: bool) -> None:
        """After the optimizer's step: w <- w (1 - lr lambda) on the leaving channels; masked weights back to zero."""
        if self.zeros:
            self._put_zeros_back(model)
        if self.penalty() == "growing_l2" and stepped:
            amount = learning_rate * self.weight(steps)
            if self._solves(self.stage):
                amount = min(amount, MAX_DECAY)  # the bound under which the strength was solved for
            self._decay(amount)

    def _decay(self, amount: float) -> None:
        if not self.args.cuda_graphs:
            decay_(self.groups, self.masks, amount)
            return
        if self.graphed_decay is None:
            held = torch.zeros((), device=self.args.device)  # zero while the graph is recorded: nothing changes then
            replay = capture(lambda: decay_(self.groups, self.masks, held), self.args.device)
            self.graphed_decay = (held, replay)
        check_amount(amount)
        held, replay = self.graphed_decay
        held.fill_(amount)
        replay()

    @torch.no_grad()
    def _put_zeros_back(self, model) -> None:
        if self._zeroed is None:  # found once a stage: in every step the names alone would cost a millisecond
            parameters = dict(model.named_parameters())
            weights = [parameters[name] for name in self.zeros]
            self._zeroed = weights, [mask.to(w.device, w.dtype) for w, mask in zip(weights, self.zeros.values())]
        torch._foreach_mul_(*self._zeroed)
