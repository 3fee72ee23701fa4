"""RandAugment's operations for whole batches, with PIL's arithmetic."""

import math

import torch
import torch.nn.functional as F


# N images, C channels (1 or 3), H height, W width. Images are uint8 (N, C, H, W) and come back so; parameters are
# float32 (N, 1, 1, 1). No sum of floats runs across images: each image comes out the same in any batch.


def autocontrast(images):
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
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


def _blend(degenerate, images, factor):
    degenerate = degenerate.float()
    return (degenerate + factor * (images.float() - degenerate)).clamp(0, 255).to(torch.uint8)


def _gray(images):
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def color(images, factor):
    return _blend(_gray(images), images, factor)


def contrast(images, factor):
    gray = _gray(images)
    size = gray[0].numel()
    return _blend((2 * gray.sum((2, 3), keepdim=True) + size) // (2 * size), images, factor)


def brightness(images, factor):
    return _blend(images.new_zeros(()), images, factor)


def sharpness(images, factor):
    smooth = images.float()
    if min(images.shape[2:]) >= 3:  # the border has no full neighbourhood and stays as it is
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(smooth, images, factor)


def affine(images, matrix, fill=128):
    """Bilinear resampling: output pixel (x, y) shows the input at matrix @ (x, y, 1), in pixels. matrix: (N, 2, 3)."""
    H, W = images.shape[2:]
    x = (torch.arange(W, device=images.device) + 0.5).expand(len(images), H, W)
    y = (torch.arange(H, device=images.device) + 0.5)[:, None].expand(len(images), H, W)
    (a, b, c), (d, e, f) = (row.unbind(1) for row in matrix[..., None, None].unbind(1))
    grid = torch.stack([(a * x + b * y + c) * (2 / W) - 1, (d * x + e * y + f) * (2 / H) - 1], dim=-1)
    moved = F.grid_sample(images.float() - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved + (fill + 0.5)).clamp(0, 255).to(torch.uint8)


def affine_matrices(names, strength, H, W):
    """The matrices of `affine`. names: N of GEOMETRIC_OPS; strength: (N,) in [-1, 1]. Returns (N, 2, 3) float64."""
    rotate, shear_x, shear_y, move_x, move_y = (
        strength * torch.tensor([name == op for name in names], dtype=torch.float64) for op in GEOMETRIC_OPS
    )
    angle = rotate * -math.radians(30)
    cos, sin = angle.cos(), angle.sin()
    c = W / 2 - cos * W / 2 - sin * H / 2 + 0.45 * W * move_x
    f = H / 2 + sin * W / 2 - cos * H / 2 + 0.45 * H * move_y
    return torch.stack([cos, sin + 0.3 * shear_x, c, 0.3 * shear_y - sin, cos, f], dim=1).view(-1, 2, 3)


def _factor(strength):
    return (1 + 0.9 * strength).clamp(min=0.1)


# Strength in [-1, 1] to each operation's own parameter, as in timm's "increasing" set.
PIXEL_OPS = {
    "autocontrast": lambda images, strength: autocontrast(images),
    "equalize": lambda images, strength: equalize(images),
    "invert": lambda images, strength: 255 - images,
    "posterize": lambda images, strength: posterize(images, (4 - (4 * strength.abs()).floor()).clamp(min=1)),
    "solarize": lambda images, strength: solarize(images, 256 - (256 * strength.abs()).floor()),
    "solarize_add": lambda images, strength: solarize_add(images, (110 * strength.abs()).floor()),
    "color": lambda images, strength: color(images, _factor(strength)),
    "contrast": lambda images, strength: contrast(images, _factor(strength)),
    "brightness": lambda images, strength: brightness(images, _factor(strength)),
    "sharpness": lambda images, strength: sharpness(images, _factor(strength)),
}
GEOMETRIC_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPS = (*PIXEL_OPS, *GEOMETRIC_OPS)


def inside(bounds, images):
    """bounds: (N, 4) top, bottom, left, right (ends excluded). Returns (N, 1, H, W) bool on the device of `images`."""
    top, bottom, left, right = send(bounds, images)[..., None].unbind(1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (rows[:, :, None] & columns[:, None])[:, None]


def send(tensor, images):
    """A CPU tensor on the device of `images`, without waiting for the work queued there."""
    return tensor.to(images.device, non_blocking=True)
