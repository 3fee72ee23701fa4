"""What a student learns from its teacher: softened predictions, and the residual stream on the way to them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


CHUNK = 2**22
"""Logits that are softened at a time: of a language model's (B, L, V) several fp32 copies would not fit."""


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
) -> Tensor:
    """How far the student's residual stream is from the teacher's: mean_l ||s_l - t_l||^2 / ||t_l||^2, fp32 scalar.

    A model whose inner widths were cut still has the stream of the dense one, so its layers need no projection to be
    compared (as layer-wise distillation does with a learnt one: TinyBERT, arXiv:1909.10351; CoFi, arXiv:2204.00408).
    Relative, because a pre-norm stream grows from layer to layer.

    student, teacher: the stream before each block and at the end, (B, L, D) each, as `hidden_states` of our models.
    blocks: the teacher's block that each of the student's was, where whole blocks are gone; default the same.
    channels: indices (D_student,) of the teacher's hidden_size that the student has kept; default all.
    Raises ValueError where the numbers of states do not go together.
    """
    places = [*(range(len(teacher) - 1) if blocks is None else blocks), len(teacher) - 1]
    if len(places) != len(student):
        raise ValueError(f"The student has {len(student)} hidden states, {len(places)} of the teacher's answer them.")
    errors = []
    for s, place in zip(student, places):
        t = teacher[place].detach()
        t = (t if channels is None else t.index_select(-1, channels)).float()
        errors.append((s.float() - t).square().mean() / t.square().mean().clamp(min=1e-12))
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
