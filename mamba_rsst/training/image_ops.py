"""RandAugment's operations for whole batches, with PIL's arithmetic."""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F


# N images, C channels (1 or 3), H height, W width. Images are uint8 (N, C, H, W) and come back so; parameters are
# float32 (N, 1, 1, 1). No sum of floats runs across images: each image comes out the same in any batch.


def autocontrast(images):
    low, high = (x[..., None, None] for x in images.flatten(2).aminmax(dim=2))
    stretched = ((images - low).float() * 255 / (high - low).clamp(min=1)).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images):
    values = images.flatten(2).long()
    counts = values.new_zeros(*images.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    table = ((step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, table.to(torch.uint8).gather(2, values).view_as(images), images)


def posterize(images, bits):
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def solarize(images, threshold):
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images, amount):
    return torch.where(images < 128, (images + amount).clamp(max=255).to(torch.uint8), images)


def _gray(images):
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _mean_gray(images):
    gray = _gray(images)
    size = gray[0].numel()
    return (2 * gray.sum((2, 3), keepdim=True) + size) // (2 * size)


def _black(images):
    return torch.zeros((), device=images.device)


def _smooth(images):
    smooth = images.float()
    if min(images.shape[2:]) >= 3:  # the border has no full neighbourhood and stays as it is
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return smooth


def affine(images, matrix, fill=128):
    """Bilinear resampling: output pixel (x, y) shows the input at matrix @ (x, y, 1), in pixels. matrix: (N, 2, 3)."""
    x, y, scale = _pixel_centres(*images.shape[2:], images.device)
    a, b, c = matrix[:, None, None].unbind(-1)  # (N, 1, 1, 2): what x and y of the input are made of
    grid = (a * x + b * y + c) * scale - 1
    moved = F.grid_sample(images.float() - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved + (fill + 0.5)).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=4)
def _pixel_centres(H, W, device):
    """x and y of every pixel, (W, 1) and (H, 1, 1), and what brings them to grid_sample's [-1, 1] of both, (2,)."""
    x, y = (torch.arange(size, device=device) + 0.5 for size in (W, H))
    return x[:, None], y[:, None, None], torch.tensor([2 / W, 2 / H], device=device)


def affine_matrices(kind, strength, H, W):
    """The matrices of `affine`. kind: (N,), places in GEOMETRIC_OPS; strength: (N,) float64 in [-1, 1].

    Returns (N, 2, 3) float64.
    """
    rotate, shear_x, shear_y, move_x, move_y = strength * (kind == torch.arange(len(GEOMETRIC_OPS))[:, None])
    angle = rotate * -math.radians(30)
    cos, sin = angle.cos(), angle.sin()
    c = W / 2 - cos * W / 2 - sin * H / 2 + 0.45 * W * move_x
    f = H / 2 + sin * W / 2 - cos * H / 2 + 0.45 * H * move_y
    return torch.stack([cos, sin + 0.3 * shear_x, c, 0.3 * shear_y - sin, cos, f], dim=1).view(-1, 2, 3)


# An operation either makes the new images itself, or an image that the old one is blended with.
_MADE = {
    "autocontrast": lambda images, _: autocontrast(images),
    "equalize": lambda images, _: equalize(images),
    "invert": lambda images, _: 255 - images,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
}
_BLENDED = {"color": _gray, "contrast": _mean_gray, "brightness": _black, "sharpness": _smooth}
PIXEL_OPS = (*_MADE, *_BLENDED)
GEOMETRIC_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPS = (*PIXEL_OPS, *GEOMETRIC_OPS)


def pixel_operations(images, ends, parameter):
    """images: (N, C, H, W), those of the same operation side by side; ends: where each of PIXEL_OPS' images end.

    parameter: (N, 1, 1, 1) float32, see `pixel_parameters`. Returns the new images as a list of parts, in order.
    """
    parts, others, start = [], [], 0
    for make, end in zip(_MADE.values(), ends):
        if end > start:
            parts.append(make(images[start:end], parameter[start:end]))
        start = end
    first = start
    for make, end in zip(_BLENDED.values(), ends[len(_MADE) :]):
        if end > start:
            others.append(make(images[start:end]).float().expand_as(images[start:end]))
        start = end
    if others:
        other = torch.cat(others)
        blend = other + parameter[first:start] * (images[first:start].float() - other)
        parts.append(blend.clamp(0, 255).to(torch.uint8))
    return parts


def pixel_parameters(op, strength):
    """Each operation's own parameter, as in timm's "increasing" set: kept bits, a threshold, an amount, or a factor.

    op: places in OPS, len(OPS) for none; strength: float32 in [-1, 1]. Returns float32, 0 for operations without one.
    """
    size = np.abs(strength)
    bits = np.maximum(4 - np.floor(4 * size), 1)
    factor = np.maximum(1 + np.float32(0.9) * strength, np.float32(0.1))
    choices = np.zeros_like(size), bits, 256 - np.floor(256 * size), np.floor(110 * size), factor
    return np.choose(_PARAMETER[op], choices)


_PARAMETER = np.array(
    [{"posterize": 1, "solarize": 2, "solarize_add": 3}.get(name, 4 if name in _BLENDED else 0) for name in OPS] + [0]
)


def inside(bounds, H, W):
    """bounds: top, bottom, left, right (ends excluded), each (N,). Returns (N, 1, H, W) bool on their device."""
    top, bottom, left, right = (bound[:, None] for bound in bounds)
    rows, columns = (steps(size, 1, top.device) for size in (H, W))
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (rows[:, :, None] & columns[:, None])[:, None]


# ------------------------------------------------------------------------------------------------------- to the device


@lru_cache(maxsize=16)
def steps(count, step, device):
    """0, step, 2 step, ...: (count,) int64, kept on the device."""
    return torch.arange(0, count * step, step, device=device)


def send(tensor, images):
    """A CPU tensor on the device of `images`, without waiting for the work queued there."""
    return tensor.to(images.device, non_blocking=True)


def send_all(arrays, device):
    """NumPy arrays by name as tensors on `device`, in one transfer that does not wait for the work queued there.

    From memory that is not pinned CUDA copies at once only what is small; for the rest it waits.
    """
    if torch.device(device).type != "cuda":
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    starts, size = [], 0
    for array in arrays.values():
        starts.append(size)
        size += -(-array.nbytes // 8) * 8
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    flat = pinned.numpy()
    for start, array in zip(starts, arrays.values()):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = pinned.to(device, non_blocking=True)
    return {
        name: sent[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items())
    }
