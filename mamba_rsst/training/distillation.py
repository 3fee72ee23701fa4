"""What a student learns from its teacher: softened predictions, and the residual stream on the way to them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pruning import Masks
from .arguments import RSSTConfig
from .rounds import Stage, surviving_blocks, survivors


CHUNK = 2**22
"""Logits that are softened at a time: of a language model's (B, L, V) several fp32 copies would not fit."""


class Teacher:
    """The dense model, from which the stages after the first learn. One object a trainer: `begin` opens a stage."""

    def __init__(self, args: RSSTConfig):
        self.args = args
        self.model = None
        """None in a stage that is not taught."""
        self._stage: Stage | None = None
        self._places = (None, None)  # the blocks and channels of this model's that the student still has
        self._hidden_weight, self._distance = torch.zeros(2, device=args.device)  # where a recorded step finds them

    @property
    def _holds(self) -> bool:
        return self.args.distillation_hidden_weight > 0

    def begin(self, stage: Stage, dense: Callable, cuts: Callable[[], list[Masks]]) -> None:
        """dense: gives the model. cuts: gives the channels that the stages before this one have kept, in order."""
        args, self._stage = self.args, stage
        if not (args.is_taught and stage.round > 0 and stage.epochs > 0):
            self.model = None
            return
        if self._holds:
            masks = cuts()
            channels = survivors(masks, "hidden_size")
            channels = None if channels is None else torch.tensor(channels, device=args.device)
            self._places = surviving_blocks(masks), channels
        if self.model is None:
            self.model = dense().eval().requires_grad_(False).to(args.device)
            self.model.config.use_cache = False  # a language model would build one for nothing

    def before_step(self, done: float) -> None:
        """done: the fraction of the stage's steps that has been made."""
        if self.model is not None and self._holds:
            fades = self.args.distillation_hidden_fade and not self._stage.decay
            self._hidden_weight.fill_(self.args.distillation_hidden_weight * (1.0 - done if fades else 1.0))

    def asked(self, inputs: dict) -> dict:
        """The student's inputs, so that its outputs hold what is compared."""
        return {**inputs, "output_hidden_states": True} if self._holds else inputs

    @torch.no_grad()
    def answer(self, inputs: dict):
        """The teacher's outputs. inputs: as `asked` gave them."""
        model = self.model if self.args.distillation_weight > 0 else self.model.base_model  # logits nobody reads
        return model(**{k: v for k, v in inputs.items() if k != "labels"})

    def add_to(self, loss: Tensor, outputs, teacher, labels, items, share: float, processes: int, mask=None) -> Tensor:
        """The task's loss with what the teacher's outputs add.

        items: of all micro-batches and of all `processes`, by which the task's sum was divided; None where it is a
        mean. share: what a mean of this micro-batch counts of the update's. mask: the positions that are no padding.
        """
        args = self.args
        if args.distillation_weight > 0:
            if torch.is_tensor(items):
                items = items.flatten()[0]  # DataParallel gives each replica one
            soft = soft_target_loss(outputs["logits"], teacher.logits, labels, args.distillation_temperature, items)
            if items is not None:
                soft = soft * processes  # which are averaged over
            loss = (1.0 - args.distillation_weight) * loss + args.distillation_weight * soft
        if self._holds:
            far = hidden_state_loss(outputs["hidden_states"], teacher.hidden_states, *self._places, mask)
            self._distance.copy_(far.detach())
            loss = loss + self._hidden_weight * share * far
        return loss

    def logs(self) -> dict:
        """How far the stream was in the last batch, as `hidden_state_loss` says."""
        if self.model is None or not self._holds:
            return {}
        return {"stream_distance": round(self._distance.item(), 6)}


def soft_target_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float, items: Tensor | int | None = None
) -> Tensor:
    """T^2 KL(teacher || student) on logits softened by T (Hinton et al. 2015, arXiv:1503.02531), fp32 scalar.

    student, teacher: logits (B, K), or a causal language model's (B, L, V), of which position t predicts label t + 1.
    labels: class indices (B,), token ids (B, L), or soft targets (B, K). Predictions of a label -100, and of what
        comes after the last token, do not count.
    items: what the sum over predictions is divided by; default the number of those that count.
    Waits for nothing on the device, so that a CUDA graph can hold it.
    """
    if student.dim() == 3:  # not by slicing the logits, which would copy them
        counted = torch.ones(student.shape[:2], device=student.device) if labels is None else (labels != -100).float()
        weights = F.pad(counted[:, 1:], (0, 1)).flatten()
    elif labels is None or labels.is_floating_point():
        weights = torch.ones(len(student), device=student.device)
    else:
        weights = (labels != -100).float()
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if items is None:
        items = weights.sum().clamp(min=1.0)
    return _SoftTargets.apply(student, teacher, weights / items, temperature)


def hidden_state_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    blocks: Sequence[int] | None = None,
    channels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """How far the student's residual stream is from the teacher's: mean_ln ||s_ln - t_ln||^2 / ||t_ln||^2, an
    fp32 scalar, over states l and samples n: a mean over samples, so that micro-batches and processes add up.

    A model whose inner widths were cut still has the stream of the dense one, so its layers need no projection to be
    compared (as layer-wise distillation does with a learnt one: TinyBERT, arXiv:1909.10351; CoFi, arXiv:2204.00408).
    Relative, because a pre-norm stream grows from layer to layer. Keeps one fp32 difference a state for the backward.

    student, teacher: (B, L, D) each, the stream before each block and, after the last norm, at the end, as
        `hidden_states` of our models; any others that go together one by one, such as those of transformers' Mamba.
    blocks: the teacher's block that each of the student's was, where whole blocks are gone; default the same.
    channels: indices (D_student,) of the teacher's hidden_size that the student has kept; default all.
    mask: (B, L), 0 where a position is padding and does not count; default all count.
    Raises ValueError where the numbers of states do not go together.
    """
    places = [*(range(len(teacher) - 1) if blocks is None else blocks), len(teacher) - 1]
    if len(places) != len(student):
        raise ValueError(f"The student has {len(student)} hidden states, {len(places)} of the teacher's answer them.")
    errors = []
    for s, place in zip(student, places):
        t = teacher[place].detach()
        t = (t if channels is None else t.index_select(-1, channels)).float()
        far, size = (x.square() for x in (s.float() - t, t))
        if mask is not None:
            far, size = (x * mask[..., None] for x in (far, size))
        far, size = (x.flatten(1).mean(1) for x in (far, size))
        errors.append((far / size.clamp(min=1e-12)).mean())
    return torch.stack(errors).mean()


class _SoftTargets(torch.autograd.Function):
    """sum_n w_n T^2 KL(softmax(teacher_n / T) || softmax(student_n / T)), (N, K) logits, a chunk of rows at a time.

    The gradient, T w (softmax(student / T) - softmax(teacher / T)), is written out: autograd would keep four tensors
    of the logits' size.
    """

    @staticmethod
    def forward(ctx, student, teacher, weights, temperature):
        ctx.save_for_backward(student, teacher, weights)
        ctx.temperature = temperature
        total = torch.zeros((), device=student.device)
        for s, t, w in _chunks(student, teacher, weights):
            s, t = (F.log_softmax(x.float() / temperature, dim=-1) for x in (s, t))
            total = total + (w * (t.exp() * (t - s)).sum(-1)).sum()
        return temperature**2 * total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        student, teacher, weights = ctx.saved_tensors
        out = torch.empty_like(student)
        for s, t, w, o in _chunks(student, teacher, weights, out):
            s, t = (F.softmax(x.float() / ctx.temperature, dim=-1) for x in (s, t))
            o.copy_((s - t) * (grad * ctx.temperature * w)[:, None])
        return out, None, None, None


def _chunks(*tensors):
    rows = max(1, CHUNK // tensors[0].shape[-1])
    return zip(*(x.split(rows) for x in tensors))
