from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import Keyword
from torch import nn

from mamba_rsst.evaluation import (
    count_macs,
    count_macs_per_item,
    count_parameters,
    evaluate_images,
    weight_bytes,
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return F.scaled_dot_product_attention(x * self.scale, x, x)


# ---- counting ----
def test_tied_parameters_count_once():
    embedding, head = nn.Embedding(11, 7), nn.Linear(7, 11)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    assert count_parameters(model) == 11 * 7 + 11
    model.register_buffer("scale", torch.zeros(3, dtype=torch.float64))
    assert weight_bytes(model) == 4 * (11 * 7 + 11) + 8 * 3


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (3, 17, 7), 3 * 17 * 7 * 5),
        (nn.Conv1d(6, 8, 3), (3, 6, 17), 3 * 15 * 6 * 8 * 3),
        (nn.Conv1d(6, 6, 4, groups=6, padding=3), (3, 6, 17), 3 * 20 * 6 * 4),
        (nn.Conv2d(3, 20, 4, stride=4), (2, 3, 12, 16), 2 * 3 * 4 * 3 * 20 * 16),
        (Attention(), (2, 3, 11, 8), 2 * (2 * 3 * 11 * 11 * 8)),
        (nn.LayerNorm(7), (3, 7), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_macs_in_closed_form(module, shape, macs, dtype):
    model, inputs = Keyword(module).to(dtype), {"x": torch.randn(shape)}
    assert count_macs(model, inputs) == macs
    assert count_macs_per_item(model, inputs) == macs // shape[0]


def test_macs_name_a_custom_op_without_formula():
    @torch.library.custom_op("mamba_rsst_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Doubling(nn.Linear):
        def forward(self, x):
            return double(super().forward(x))

    with pytest.warns(UserWarning, match="mamba_rsst_test.double"):
        assert count_macs(Keyword(Doubling(7, 5)), {"x": torch.randn(3, 7)}) == 3 * 7 * 5


def test_inputs_without_a_batch_are_refused():
    with pytest.raises(ValueError, match="holds no batch"):
        count_macs(Keyword(nn.Linear(2, 2)), {})


# ---- accuracy ----
MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


class ChannelVote(nn.Module):
    """Logit k is the normalised mean of colour channel k, so a pure colour is its own class."""

    def __init__(self, num_labels=3):
        super().__init__()
        self.config = SimpleNamespace(image_size=6, num_channels=3, num_labels=num_labels)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        assert pixel_values.dtype == self.weight.dtype
        return SimpleNamespace(logits=self.weight * pixel_values.mean((2, 3)))


def pure_colours(colours):
    images = torch.zeros(len(colours), 3, 6, 6, dtype=torch.uint8)
    images[torch.arange(len(colours)), torch.tensor(colours)] = 255
    return images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_accuracy_and_loss_of_known_answers(dtype, batch_size):
    colours, labels = [0, 1, 2, 0, 1], torch.tensor([0, 1, 2, 1, 0], dtype=torch.uint8)
    rows = {0: [1.0, -1.0, 0.0], 1: [-1.0, 3.0, 0.0], 2: [-1.0, -1.0, 1.0]}  # (pixel - mean) / std by hand
    expected = F.cross_entropy(torch.tensor([rows[colour] for colour in colours]), labels.long())
    model = ChannelVote().to(dtype).train()
    result = evaluate_images(model, pure_colours(colours), labels, mean=MEAN, std=STD, batch_size=batch_size)
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert result["num_samples"] == 5
    assert model.training


def test_progress_and_device_change_nothing():
    images, labels = pure_colours([2, 1]), torch.tensor([2, 1])
    plain = evaluate_images(ChannelVote(), images, labels, mean=MEAN, std=STD)
    assert plain == evaluate_images(ChannelVote(), images, labels, mean=MEAN, std=STD, progress=True, device="cpu")


@pytest.mark.parametrize(
    ("images", "labels", "mean", "message"),
    [
        (torch.zeros(0, 3, 6, 6, dtype=torch.uint8), [], MEAN, "no images"),
        (torch.zeros(2, 3, 6, 6), [0, 1], MEAN, r"uint8 \(M, C, H, W\), got torch.float32"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), [0], MEAN, "2 images need 2 labels"),
        (torch.zeros(2, 3, 8, 6, dtype=torch.uint8), [0, 1], MEAN, "images are 8x6 but the model takes 6x6"),
        (torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [0, 1], MEAN, "have 1 channels but the model takes 3"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), [0, 1], (0.5,), "3 channels, `mean` 1 numbers"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), [0, 3], MEAN, "Label 3 is outside the model's 3 classes"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), [0, -1], MEAN, "Label -1 is outside the model's 3 classes"),
    ],
)
def test_wrong_data_is_named(images, labels, mean, message):
    with pytest.raises(ValueError, match=message):
        evaluate_images(ChannelVote(), images, torch.tensor(labels), mean=mean, std=STD)
