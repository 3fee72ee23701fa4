import pytest
import torch
import torch.nn.functional as F

from mamba_rsst.training import distillation
from mamba_rsst.training.distillation import hidden_state_loss, soft_target_loss


def reference(student, teacher, temperature):
    """Of one prediction, (K,) logits each, in double."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum()


def draw(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, *shape)).to(dtype).unbind(0)
    return student.clone().requires_grad_(), teacher


@pytest.mark.parametrize("chunk", [1, 20, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("labels", ["none", "classes", "soft"])
def test_images(monkeypatch, chunk, temperature, labels):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    student, teacher = draw(5, 7)
    labels = {"none": None, "classes": torch.tensor([1, 2, -100, 0, 6]), "soft": torch.rand(5, 7)}[labels]
    rows = [0, 1, 3, 4] if labels is not None and labels.dim() == 1 else range(5)
    expected = sum(reference(student[i], teacher[i], temperature) for i in rows) / len(rows)
    loss = soft_target_loss(student, teacher, labels, temperature)
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, student)[0], torch.autograd.grad(3 * expected, student)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
@pytest.mark.parametrize("labels", ["none", "some"])
def test_a_language_models_predictions_are_aligned_with_the_next_label(items, labels):
    """An earlier version took the mask of the token that is read for that of the token that is predicted."""
    student, teacher = draw(2, 6, 9)
    labels = None if labels == "none" else torch.tensor([[4, -100, 1, 2, -100, 3], [-100, -100, -100, -100, 8, 0]])
    places = [(0, 1), (0, 2), (0, 4), (1, 3), (1, 4)]  # predict the labels at 2, 3, 5 and 4, 5; none predicts label 0
    if labels is None:
        places = [(b, t) for b in range(2) for t in range(5)]
    expected = sum(reference(student[b, t], teacher[b, t], 2.0) for b, t in places) / (items or len(places))
    loss = soft_target_loss(student, teacher, labels, 2.0, items)
    torch.testing.assert_close(loss, expected.float())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-5, atol=1e-6)
    assert {tuple(i.tolist()) for i in gradient.abs().sum(-1).nonzero()} == set(places)


def test_the_mask_is_that_of_the_models_own_loss():
    """A teacher that is sure of the labels makes of the soft targets the model's own loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    student, _ = draw(3, 8, 5)
    labels = torch.randint(5, (3, 8)).masked_fill(torch.rand(3, 8) < 0.4, -100)
    sure = 200.0 * F.one_hot(labels.roll(-1, 1).clamp(min=0), 5).float()  # position t is sure of label t + 1
    torch.testing.assert_close(
        soft_target_loss(student, sure, labels, 1.0), ForCausalLMLoss(student, labels, vocab_size=5)
    )


def test_bf16_logits_get_a_bf16_gradient():
    student, teacher = draw(4, 7, dtype=torch.bfloat16)
    expected = sum(reference(student[i], teacher[i], 2.0) for i in range(4)) / 4
    loss = soft_target_loss(student, teacher, None, 2.0)
    torch.testing.assert_close(loss, expected.float())
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


def test_nothing_to_predict_is_nothing_to_learn():
    student, teacher = draw(2, 3, 4)
    loss = soft_target_loss(student, teacher, torch.full((2, 3), -100), 2.0)
    assert loss.item() == 0 and not torch.autograd.grad(loss, student)[0].any()


# ---- the residual stream ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks, channels", [(None, None), ([0, 2], None), ([1, 3], [0, 2, 5]), (None, [4, 1])])
def test_the_stream_is_compared_where_it_is_the_same_and_relative_to_its_size(blocks, channels, dtype):
    torch.manual_seed(0)
    width = 6 if channels is None else len(channels)
    places = [*(range(4) if blocks is None else blocks), 4]
    teacher = [(3.0**i * torch.randn(2, 5, 6)).to(dtype).requires_grad_() for i in range(5)]
    student = [torch.randn(2, 5, width).to(dtype).requires_grad_() for _ in places]
    index = None if channels is None else torch.tensor(channels)
    loss = hidden_state_loss(student, teacher, blocks, index)
    expected = 0.0
    for s, place in zip(student, places):
        t = teacher[place].double()[..., list(range(6)) if channels is None else channels]
        for i in range(len(t)):
            expected += ((s[i].double() - t[i]) ** 2).sum() / (t[i] ** 2).sum() / len(t) / len(places)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    expected = torch.autograd.grad(expected, student)
    for mine, other in zip(torch.autograd.grad(loss, student, retain_graph=True), expected):
        torch.testing.assert_close(mine, other)
    loss.backward()
    assert all(t.grad is None for t in teacher)


def test_padding_is_no_part_of_the_stream():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 5, 4).unbind(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = 0.0
    for s, t in zip(student, teacher):
        for row, length in ((0, 3), (1, 5)):
            expected += ((s[row, :length] - t[row, :length]) ** 2).sum() / (t[row, :length] ** 2).sum() / 6
    torch.testing.assert_close(hidden_state_loss(list(student), list(teacher), mask=mask), expected)
    everything = hidden_state_loss(list(student), list(teacher))
    torch.testing.assert_close(hidden_state_loss(list(student), list(teacher), mask=torch.ones(2, 5)), everything)
    assert abs(everything - expected) > 1e-3


def test_states_without_a_counterpart_are_an_error():
    states = [torch.zeros(1, 2, 3)] * 5
    with pytest.raises(ValueError, match="4 hidden states, 5 of the teacher's"):
        hidden_state_loss(states[:4], states)
    with pytest.raises(ValueError, match="5 hidden states, 3 of the teacher's"):
        hidden_state_loss(states, states, blocks=[0, 2])


def test_a_teacher_whose_stream_is_zero_gives_no_nan():
    loss = hidden_state_loss([torch.ones(1, 2, 3)] * 2, [torch.zeros(1, 2, 3)] * 2)
    assert loss.isfinite()


def test_a_stream_that_is_the_teachers_is_nowhere_far_even_if_it_is_zero():
    states = [torch.zeros(1, 2, 3)] * 2
    assert hidden_state_loss(states, states) == 0.0
