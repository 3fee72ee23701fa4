"""Image augmentation for whole batches, in plain torch: a pure function of the images and of given random numbers."""

import math
import numbers
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from .image_ops import OPS, PIXEL_OPS, affine, affine_matrices, inside, send


# B batch, C channels (1 or 3), H height, W width, K classes, N images that share an operation.
# Every decision is taken on the CPU in float64 and reaches the device as finished indices and parameters, so that the
# CPU never asks the device for a result. Pixels stay uint8 until the mixing.


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    crop_padding: int = 4
    """Black pixels added on every side before a random crop back to the original size; 0 = no crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    randaugment_ops: int = 2
    """RandAugment operations drawn per image; 0 = no RandAugment."""
    randaugment_probability: float = 0.5
    """Probability that a drawn operation is applied (timm's 0.5; the paper has 1.0)."""
    randaugment_magnitude: float = 9.0
    """Strength of the operations on the scale 0..10 of timm's `rand-m9-inc1`."""
    randaugment_std: float = 0.5
    """Standard deviation of that strength between images (timm's `mstd`)."""
    erasing: float = 0.25
    """Probability that a rectangle of 2 to 33 % of the area is replaced by noise."""
    mixup: float = 0.8
    """Alpha of Mixup's Beta(alpha, alpha) weight; 0 = no Mixup."""
    cutmix: float = 1.0
    """Alpha of CutMix's Beta(alpha, alpha) area; 0 = no CutMix."""
    mix_probability: float = 1.0
    """Probability that an image is mixed with a partner at all."""
    switch_probability: float = 0.5
    """Probability of CutMix rather than Mixup where both are on."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""

    def __post_init__(self):
        highest = dict.fromkeys(("crop_padding", "randaugment_ops", "randaugment_std"), math.inf)
        highest |= {"randaugment_magnitude": 10, "mixup": 100, "cutmix": 100}
        for name, value in vars(self).items():
            kind = numbers.Integral if name in ("crop_padding", "randaugment_ops") else numbers.Real
            high = highest.get(name, 1)
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value <= high or value == math.inf:
                what = "a whole number" if kind is numbers.Integral else "a number"
                span = "of at least 0" if high == math.inf else f"in [0, {high}]"
                raise ValueError(f"`{name}` must be {what} {span}, got {value!r}.")


# ------------------------------------------------------------------------------------------------------ random numbers


def _signed(value):
    """The int64 with the low 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _scramble(z):
    """The output function of splitmix64; `>>` on int64 copies the sign, hence the masks."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & (2**33 - 1))


def uniforms(seed, epoch, index, count):
    """Uniform numbers in [0, 1) that depend on nothing but (seed, epoch, index, slot).

    index: (B,) int64. Returns (B, count) float32 on its device, the same bits on every device.
    """
    key = _scramble(_scramble(torch.tensor(_signed(seed))) + _signed(epoch * _GOLDEN))
    stream = _scramble(key + index * _GOLDEN)[:, None]
    slots = torch.arange(1, count + 1, device=index.device)
    return ((_scramble(stream + slots * _GOLDEN) >> 40) & (2**24 - 1)).float() * 2**-24


@lru_cache
def _beta_table(alpha, points=4096):
    """(cumulative, t): the lower half of Beta(alpha, alpha) over t = x ** min(alpha, 1), finite even at x = 0."""
    power = min(alpha, 1.0)
    t = torch.linspace(0, 0.5**power, points, dtype=torch.float64)
    x = t ** (1 / power)
    cumulative = torch.cumulative_trapezoid(x ** (alpha - power) * (1 - x) ** (alpha - 1), t)
    return 0.5 * F.pad(cumulative, (1, 0)) / cumulative[-1], t


def beta_quantile(u, alpha):
    """Inverse distribution function of Beta(alpha, alpha): uniform numbers in, Beta samples out. u: (B,) float64."""
    cumulative, t = _beta_table(float(alpha))
    low = torch.minimum(u, 1 - u)
    right = torch.searchsorted(cumulative, low).clamp(1, len(t) - 1)
    c0, c1, t0, t1 = cumulative[right - 1], cumulative[right], t[right - 1], t[right]
    x = (t0 + (t1 - t0) * ((low - c0) / (c1 - c0).clamp(min=1e-300)).clamp(0, 1)) ** (1 / min(alpha, 1.0))
    return torch.where(u < 0.5, x, 1 - x)


# -------------------------------------------------------------------------------------------------- the whole pipeline


class BatchAugmentation:
    """Crop, flip, RandAugment, erasing, then Mixup or CutMix with a partner image, each drawn per image.

        augment = BatchAugmentation(AugmentationConfig())
        numbers = uniforms(seed, epoch, index, augment.draws)
        pixels, targets = augment(images, labels, partner_images, partner_labels, numbers, num_classes=10)

    The partner is augmented in the same way with numbers of its own. Nothing here draws a random number.
    """

    def __init__(self, config):
        self.config = config
        self.mixes = config.mix_probability > 0 and max(config.mixup, config.cutmix) > 0
        """Whether partner images are used at all."""
        self._image_draws = 9 + 4 * config.randaugment_ops
        self.draws = 2 * self._image_draws + 5
        """How many random numbers a sample needs."""

    def __call__(self, images, labels, partner_images, partner_labels, random_numbers, num_classes):
        """images, partner_images: (B, C, H, W) uint8; labels, partner_labels: (B,), on the same device.

        random_numbers: (B, draws) in [0, 1), best on the CPU. The partners may be None where `mixes` is False.
        Returns float32 pixels (B, C, H, W) in [0, 1], not normalised, and float32 soft targets (B, K).
        """
        B, n = len(images), self._image_draws
        draws = random_numbers.cpu().double()
        targets = _one_hot(labels, num_classes)
        if self.mixes:
            both = self._augment(torch.cat([images, partner_images]), torch.cat([draws[:, :n], draws[:, n : 2 * n]]))
            pixels, share = self._mix(both[:B].float(), both[B:].float(), draws[:, 2 * n :])
            targets = share * targets + (1 - share) * _one_hot(partner_labels, num_classes)
        else:
            pixels = self._augment(images, draws[:, :n]).float()
        smoothing = self.config.label_smoothing
        return pixels / 255, targets * (1 - smoothing) + smoothing / num_classes

    def _augment(self, images, draws):
        draw = iter(draws.unbind(1))
        images = self._crop_and_flip(images, draw)
        for _ in range(self.config.randaugment_ops):
            images = self._randaugment(images, draw)
        return self._erase(images, draw)

    def _crop_and_flip(self, images, draw):
        C, H, W = images.shape[1:]
        pad = self.config.crop_padding
        top, left = ((next(draw) * (2 * pad + 1)).long()[:, None] for _ in range(2))
        flip = (next(draw) < self.config.flip)[:, None]
        rows = send(torch.arange(H) + top, images)
        columns = send(torch.where(flip, torch.arange(W).flip(0), torch.arange(W)) + left, images)
        index = (rows[:, :, None] * (W + 2 * pad) + columns[:, None]).flatten(1)[:, None].expand(-1, C, -1)
        return F.pad(images, (pad, pad, pad, pad)).flatten(2).gather(2, index).view_as(images)

    def _randaugment(self, images, draw):
        applied, choice, sign, deviate = (next(draw) for _ in range(4))
        deviation = self.config.randaugment_std * torch.special.ndtri(deviate.clamp(min=2**-25))
        strength = (self.config.randaugment_magnitude + deviation).clamp(0, 10) / 10 * torch.where(sign < 0.5, -1, 1)
        op = torch.where(applied < self.config.randaugment_probability, (choice * len(OPS)).long(), len(OPS))
        op, rows = op.sort(stable=True)  # images with the same operation lie side by side
        ends = torch.searchsorted(op, torch.arange(len(OPS)), right=True).tolist()
        rows, op, strength = rows[: ends[-1]], op[: ends[-1]], strength[rows[: ends[-1]]]
        on_device = send(strength.float(), images)[:, None, None, None]
        rows = send(rows, images)
        part = images.index_select(0, rows)
        start = 0
        for function, end in zip(PIXEL_OPS.values(), ends):
            if end > start:
                part[start:end] = function(part[start:end], on_device[start:end])
            start = end
        if start < len(part):
            matrix = affine_matrices([OPS[i] for i in op[start:].tolist()], strength[start:], *images.shape[2:])
            part[start:] = affine(part[start:], send(matrix.float(), images))
        return images.index_copy(0, rows, part)

    def _erase(self, images, draw):
        C, H, W = images.shape[1:]
        applied, area, aspect, top, left, offset = (next(draw) for _ in range(6))
        area = (0.02 + (1 / 3 - 0.02) * area) * H * W
        ratio = (math.log(0.3) * (1 - 2 * aspect)).exp()
        height = (area * ratio).sqrt().round().clamp(1, H).long()
        width = (area / ratio).sqrt().round().clamp(1, W).long()
        top, left = (top * (H - height + 1)).long(), (left * (W - width + 1)).long()
        rows = (applied < self.config.erasing).nonzero()[:, 0]
        box = inside(torch.stack([top, top + height, left, left + width], 1)[rows], images)
        offset = send((offset[rows] * 2**16).long(), images)
        rows = send(rows, images)
        noise = _noise(C * H * W, images.device)[offset].view(-1, C, H, W)
        return images.index_copy(0, rows, torch.where(box, noise, images.index_select(0, rows)))

    def _mix(self, images, partners, draws):
        """Returns the mixed images and each image's own share of the pixels, (B, 1)."""
        H, W = images.shape[2:]
        applied, switch, weight, row, column = draws.unbind(1)
        config = self.config
        applied = applied < config.mix_probability
        cut = switch < config.switch_probability
        if config.mixup == 0 or config.cutmix == 0:
            cut = torch.full_like(cut, config.cutmix > 0)
        keep = torch.ones_like(weight)
        bounds = torch.zeros(len(images), 4, dtype=torch.long)
        if config.cutmix > 0:
            side = (1 - beta_quantile(weight, config.cutmix)).sqrt() * (cut & applied)
            height, width = (H * side).long(), (W * side).long()
            top, left = (row * H).long() - height // 2, (column * W).long() - width // 2
            bounds = torch.stack([top, top + height, left, left + width], 1).clamp(min=0)
            bounds = torch.minimum(bounds, torch.tensor([H, H, W, W]))
        if config.mixup > 0:
            keep = torch.where(applied & ~cut, beta_quantile(weight, config.mixup), keep)
        top, bottom, left, right = bounds.unbind(1)
        share = send((keep * (1 - (bottom - top) * (right - left) / (H * W))).float(), images)[:, None]
        keep = send(keep.float(), images)[:, None, None, None] * ~inside(bounds, images)
        return partners + keep * (images - partners), share


def _one_hot(labels, num_classes):
    """F.one_hot would wait for the device."""
    zeros = torch.zeros(len(labels), num_classes, device=labels.device)
    return zeros.scatter_(1, labels[:, None], 1.0)


@lru_cache(maxsize=4)
def _noise(size, device):
    """(2**16, size), a view of one fixed row of random bytes: window i starts at byte i."""
    row = torch.randint(256, (size + 2**16 - 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return row.to(device).unfold(0, size, 1)
