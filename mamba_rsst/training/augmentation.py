"""Image augmentation for whole batches, in plain torch: a pure function of the images and of given random numbers."""

import math
import numbers
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .image_ops import (
    OPS,
    PIXEL_OPS,
    affine,
    affine_matrices,
    inside,
    pixel_operations,
    pixel_parameters,
    send_all,
    steps,
)


# B batch, C channels (1 or 3), H height, W width, K classes. N images are augmented: B, or 2 B with their partners.
# Every decision is taken on the CPU in float64 and reaches the device as finished indices and parameters, all in one
# transfer, so that the CPU never asks the device for a result. NumPy decides, since its calls on small arrays cost a
# fraction of torch's; functions that are not exact (exp, the normal quantile, powers) stay torch's. Pixels stay uint8
# until the mixing.


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


_BITS = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _scramble(z):
    """The output function of splitmix64, of an int or, in place, of an array of uint64."""
    for shift, factor in zip((30, 27), _FACTORS):
        z ^= z >> shift
        z *= factor
        z &= _BITS
    z ^= z >> 31
    return z


def uniforms(seed, epoch, index, count):
    """Uniform numbers in [0, 1) that depend on nothing but (seed, epoch, index, slot).

    index: (B,) int64. Returns (B, count) float32 on its device, the same bits on every device.
    """
    key = _scramble((_scramble(seed & _BITS) + epoch * _GOLDEN) & _BITS)
    stream = index.numpy(force=True).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    slots = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _scramble(_scramble(stream)[:, None] + slots) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24)).to(index.device)


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
        # Which number decides what must not change with the settings: slots keep their places, only the last are left
        # out where nothing asks for them.
        self._erase_from = 3 + 4 * config.randaugment_ops
        self._image_draws = self._erase_from + 6
        alone = self._image_draws if config.erasing > 0 else self._erase_from
        self.draws = 2 * self._image_draws + 5 if self.mixes else alone
        """How many random numbers a sample needs."""

    def __call__(self, images, labels, partner_images, partner_labels, random_numbers, num_classes):
        """images, partner_images: (B, C, H, W) uint8; labels, partner_labels: (B,), on the same device.

        random_numbers: (B, draws) in [0, 1), best on the CPU. The partners may be None where `mixes` is False.
        Returns float32 pixels (B, C, H, W) in [0, 1], not normalised, and float32 soft targets (B, K).
        """
        B, config = len(images), self.config
        decided, ends = self.decide(random_numbers, *images.shape[2:])
        decided = send_all(decided, images.device)
        if self.mixes:
            images = torch.cat([images, partner_images])
        if "crop" in decided:
            images = self._crop_and_flip(images, *decided["crop"])
        for r, here in enumerate(ends):
            images = self._randaugment(images, here, *(decided[f"{name}{r}"] for name in _RANDAUGMENT))
        if "erase" in decided:
            images = self._erase(images, *decided["erase"])
        pixels, targets = images.float(), _one_hot(labels, num_classes)
        if self.mixes:
            keep, share = decided["keep"]
            keep = keep[:, None, None, None] * ~inside(decided["box"], *images.shape[2:])
            pixels = pixels[B:] + keep * (pixels[:B] - pixels[B:])
            targets = share[:, None] * targets + (1 - share[:, None]) * _one_hot(partner_labels, num_classes)
        return pixels / 255, targets * (1 - config.label_smoothing) + config.label_smoothing / num_classes

    # ---- on the CPU: what happens to which image -------------------------------------------------------------------

    def decide(self, random_numbers, H, W):
        """All decisions about a batch, as arrays by name, and by round where each operation's images end."""
        draws, n = random_numbers.numpy(force=True).astype(np.float64), self._image_draws
        of_images = np.concatenate([draws[:, :n], draws[:, n : 2 * n]]) if self.mixes else draws[:, :n]
        of_images = np.ascontiguousarray(of_images.T)
        decided, ends = {}, []
        if self.config.crop_padding > 0 or self.config.flip > 0:
            decided["crop"] = self._decide_crop(of_images, W)
        if self.config.randaugment_ops > 0:
            parts, ends = self._decide_randaugment(of_images[3 : self._erase_from], H, W)
            decided |= parts
        if self.config.erasing > 0:
            decided["erase"] = self._decide_erasing(of_images[self._erase_from :], H, W)
        if self.mixes:
            decided |= self._decide_mix(np.ascontiguousarray(draws[:, 2 * n :].T), H, W)
        return decided, ends

    def _decide_crop(self, draws, W):
        """(3, N): where the window begins in the padded image, in which column and direction its rows are read."""
        pad = self.config.crop_padding
        top, left = (draws[:2] * (2 * pad + 1)).astype(np.int64)
        flip = draws[2] < self.config.flip
        return np.stack([top * (W + 2 * pad), left + flip * (W - 1), 1 - 2 * flip])

    def _decide_randaugment(self, draws, H, W):
        config, pixel_ops = self.config, len(PIXEL_OPS)
        applied, choice, sign, deviate = draws.reshape(config.randaugment_ops, 4, -1).swapaxes(0, 1)
        normal = torch.special.ndtri(torch.from_numpy(np.maximum(deviate, 2**-25))).numpy()
        strength = np.clip(config.randaugment_magnitude + config.randaugment_std * normal, 0, 10) / 10
        strength *= np.where(sign < 0.5, -1, 1)
        op = np.where(applied < config.randaugment_probability, choice * len(OPS), len(OPS)).astype(np.uint8)
        order = op.argsort(axis=1, kind="stable")  # images with the same operation lie side by side
        op, strength = np.take_along_axis(op, order, 1), np.take_along_axis(strength, order, 1)
        parameters = pixel_parameters(op, strength.astype(np.float32))
        moved = (op >= pixel_ops) & (op < len(OPS))
        kinds, sizes = torch.from_numpy(op[moved]) - pixel_ops, torch.from_numpy(strength[moved])
        matrices = affine_matrices(kinds, sizes, H, W).float().numpy()
        matrices = np.split(matrices, moved.sum(1).cumsum()[:-1])
        ends = [row.searchsorted(np.arange(len(OPS)), side="right").tolist() for row in op]
        decided = {}
        for r, end in enumerate(ends):
            values = order[r, : end[-1]], parameters[r, : end[-1]], matrices[r]
            decided |= {f"{name}{r}": value for name, value in zip(_RANDAUGMENT, values)}
        return decided, ends

    def _decide_erasing(self, draws, H, W):
        """(6, images that are erased): their rows, where their noise begins, and the rectangle."""
        rows = np.flatnonzero(draws[0] < self.config.erasing)
        area, aspect, top, left, offset = draws[1:, rows]
        area = (0.02 + (1 / 3 - 0.02) * area) * H * W
        ratio = torch.from_numpy(math.log(0.3) * (1 - 2 * aspect)).exp().numpy()
        height = np.rint(np.sqrt(area * ratio)).clip(1, H).astype(np.int64)
        width = np.rint(np.sqrt(area / ratio)).clip(1, W).astype(np.int64)
        top, left = (top * (H - height + 1)).astype(np.int64), (left * (W - width + 1)).astype(np.int64)
        return np.stack([rows, (offset * 2**16).astype(np.int64), top, top + height, left, left + width])

    def _decide_mix(self, draws, H, W):
        """box: (4, B), the partner's rectangle.  keep: (2, B), the own share outside of it, and of all pixels."""
        config = self.config
        applied, switch, weight, row, column = draws
        applied = applied < config.mix_probability
        cut = switch < config.switch_probability
        if config.mixup == 0 or config.cutmix == 0:
            cut = np.full_like(cut, config.cutmix > 0)
        keep, box = np.ones_like(weight), np.zeros((4, len(weight)), np.int64)
        if config.cutmix > 0:
            side = np.sqrt(1 - beta_quantile(torch.from_numpy(weight), config.cutmix).numpy()) * (cut & applied)
            height, width = (H * side).astype(np.int64), (W * side).astype(np.int64)
            top = (row * H).astype(np.int64) - height // 2
            left = (column * W).astype(np.int64) - width // 2
            box = np.stack([top, top + height, left, left + width])
            box = np.minimum(np.maximum(box, 0), np.array([H, H, W, W])[:, None])
        if config.mixup > 0:
            own = beta_quantile(torch.from_numpy(weight), config.mixup).numpy()
            keep = np.where(applied & ~cut, own, keep)
        top, bottom, left, right = box
        outside = 1 - ((bottom - top) * (right - left)).astype(np.float32) / np.float32(H * W)
        return {"box": box, "keep": np.stack([keep, keep * outside]).astype(np.float32)}

    # ---- on the device ---------------------------------------------------------------------------------------------

    def _crop_and_flip(self, images, start, column, direction):
        C, H, W = images.shape[1:]
        pad = self.config.crop_padding
        rows = start[:, None] + steps(H, W + 2 * pad, images.device)
        columns = column[:, None] + direction[:, None] * steps(W, 1, images.device)
        index = (rows[:, :, None] + columns[:, None]).flatten(1)[:, None].expand(-1, C, -1)
        return F.pad(images, (pad, pad, pad, pad)).flatten(2).gather(2, index).view_as(images)

    def _randaugment(self, images, ends, rows, parameter, matrices):
        part = images.index_select(0, rows)
        parts = pixel_operations(part, ends, parameter[:, None, None, None])
        if len(matrices) > 0:
            parts.append(affine(part[len(part) - len(matrices) :], matrices))
        return images.index_copy(0, rows, torch.cat(parts)) if parts else images

    def _erase(self, images, rows, offset, *rectangle):
        C, H, W = images.shape[1:]
        noise = _noise(C * H * W, images.device)[offset].view(-1, C, H, W)
        box = inside(rectangle, H, W)
        return images.index_copy(0, rows, torch.where(box, noise, images.index_select(0, rows)))


_RANDAUGMENT = "rows", "parameter", "matrices"
"""Of each round: which images an operation is applied to, in the order of the operations, and how."""


def _one_hot(labels, num_classes):
    """F.one_hot would wait for the device."""
    zeros = torch.zeros(len(labels), num_classes, device=labels.device)
    return zeros.scatter_(1, labels[:, None], 1.0)


@lru_cache(maxsize=4)
def _noise(size, device):
    """(2**16, size), a view of one fixed row of random bytes: window i starts at byte i."""
    row = torch.randint(256, (size + 2**16 - 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return row.to(device).unfold(0, size, 1)
