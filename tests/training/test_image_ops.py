import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mamba_rsst.training import image_ops


def random_images(count, C=3, H=11, W=14, seed=0):
    """Noise on a smooth ramp, so that neither histograms nor resampling are trivial."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(20, 200, H)[:, None] + torch.linspace(-15, 30, W)
    return (ramp + 20 * torch.randn(count, C, H, W, generator=generator)).clamp(0, 255).to(torch.uint8)


def operate(name, images, parameters):
    """One of PIXEL_OPS on all the images. parameters: a number for each of them."""
    ends = [len(images) if image_ops.PIXEL_OPS.index(name) <= i else 0 for i in range(len(image_ops.PIXEL_OPS))]
    parameters = torch.as_tensor(parameters, dtype=torch.float32)[:, None, None, None]
    (result,) = image_ops.pixel_operations(images, ends, parameters)
    return result


def operate_at(name, images, strength):
    op = np.full(len(images), image_ops.OPS.index(name), np.uint8)
    return operate(name, images, image_ops.pixel_parameters(op, np.asarray(strength, np.float32)))


def to_pil(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def from_pil(image):
    array = np.array(image)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


def solarize_add(image, amount):
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * len(image.getbands()))


PIL_OPS = {
    "autocontrast": (None, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (None, lambda image, _: ImageOps.equalize(image)),
    "posterize": ((1, 2, 3, 4, 8), ImageOps.posterize),
    "solarize": ((0, 26, 128, 200, 256), ImageOps.solarize),
    "solarize_add": ((0, 1, 55, 110), solarize_add),
    "color": ((0.1, 0.5, 1.0, 1.3, 1.9), lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    "contrast": ((0.1, 0.5, 1.0, 1.3, 1.9), lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    "brightness": ((0.1, 0.5, 1.0, 1.3, 1.9), lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "sharpness": ((0.1, 0.5, 1.0, 1.3, 1.9), lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
}


@pytest.mark.parametrize("name", PIL_OPS)
@pytest.mark.parametrize(("C", "H", "W"), [(3, 32, 32), (3, 11, 14), (1, 28, 28), (3, 8, 8), (1, 8, 8), (3, 2, 5)])
def test_pixel_operation_equals_pil(name, C, H, W):
    parameters, reference = PIL_OPS[name]
    images = random_images(6, C, H, W)
    images[1] = 77  # constant
    images[2] = images[2] // 9 + 100  # low contrast
    images[3, 0] = 255
    for parameter in parameters or [None]:
        result = operate(name, images, [parameter or 0.0] * 6)
        expected = torch.stack([from_pil(reference(to_pil(image), parameter)) for image in images])
        if name == "autocontrast":  # PIL's float product can fall a hair short of the whole number, ours is exact
            assert (result != expected).float().mean() <= 0.02
            assert ((result.int() - expected.int()) == (result != expected).int()).all()
        else:
            assert torch.equal(result, expected), parameter


def test_pixel_operations_do_something():
    images = random_images(4, H=32, W=32)
    for name in image_ops.PIXEL_OPS:
        for strength in (-0.9, 0.9):
            changed = operate_at(name, images, [strength] * 4) != images
            assert changed.float().mean() > 0.15, (name, strength)


@pytest.mark.parametrize(
    ("name", "strength", "same_as"),
    [
        ("invert", 0.4, lambda image: ImageOps.invert(image)),
        ("posterize", -0.9, lambda image: ImageOps.posterize(image, 1)),
        ("posterize", 0.3, lambda image: ImageOps.posterize(image, 3)),
        ("posterize", 1.0, lambda image: ImageOps.posterize(image, 1)),
        ("solarize", 0.5, lambda image: ImageOps.solarize(image, 128)),
        ("solarize_add", -0.9, lambda image: solarize_add(image, 99)),
        ("brightness", -1.0, lambda image: ImageEnhance.Brightness(image).enhance(0.1)),
        ("color", 1.0, lambda image: ImageEnhance.Color(image).enhance(1.9)),
    ],
)
def test_strength_is_timms(name, strength, same_as):
    images = random_images(3)
    result = operate_at(name, images, [strength] * 3)
    assert torch.equal(result, torch.stack([from_pil(same_as(to_pil(image))) for image in images]))


def test_operations_take_one_parameter_per_image():
    images = random_images(2)
    strength = [-0.9, 0.6]
    for name in image_ops.PIXEL_OPS:
        single = torch.cat([operate_at(name, images[i : i + 1], strength[i : i + 1]) for i in range(2)])
        assert torch.equal(operate_at(name, images, strength), single), name


@pytest.mark.parametrize(
    "counts", [[1] * 10, [0, 2, 0, 0, 1, 0, 3, 0, 0, 1], [2, 0, 1, 0, 0, 0, 0, 0, 0, 0], [0] * 10]
)
def test_operations_side_by_side_are_those_of_each_alone(counts):
    op = np.repeat(np.arange(10, dtype=np.uint8), counts)
    images, strength = random_images(len(op)), np.linspace(-1, 1, len(op), dtype=np.float32)
    parameters = torch.from_numpy(image_ops.pixel_parameters(op, strength))[:, None, None, None]
    parts = image_ops.pixel_operations(images, np.cumsum(counts).tolist(), parameters)
    alone = [operate_at(image_ops.OPS[i], images[k : k + 1], strength[k : k + 1]) for k, i in enumerate(op)]
    assert len(alone) == 0 if not parts else torch.equal(torch.cat(parts), torch.cat(alone))


def pil_affine(image, name, strength):
    W, H = image.size
    if name == "rotate":
        return image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)
    data = {
        "shear_x": (1, 0.3 * strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * strength, 1, 0),
        "translate_x": (1, 0, 0.45 * W * strength, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * H * strength),
    }[name]
    return image.transform((W, H), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)


@pytest.mark.parametrize("strength", [-0.9, -0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", image_ops.GEOMETRIC_OPS)
def test_geometric_operation_equals_pil(name, strength):
    H, W = 32, 28
    ramp = torch.arange(H)[:, None] * 4.0 + torch.arange(W) * 3 + torch.tensor([10, 30, 45])[:, None, None]
    image = ramp.to(torch.uint8)[None]
    kind = torch.tensor([image_ops.GEOMETRIC_OPS.index(name)])
    matrix = image_ops.affine_matrices(kind, torch.tensor([strength], dtype=torch.float64), H, W)
    result = image_ops.affine(image, matrix.float())[0]
    expected = from_pil(pil_affine(to_pil(image[0]), name, strength))
    # Where the input lies at least a pixel inside the image, so that no border is involved; PIL truncates, we round.
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    source = matrix[0] @ torch.stack([x, y, torch.ones_like(x)]).double().flatten(1)
    clear = (source[0] > 1) & (source[0] < W - 1) & (source[1] > 1) & (source[1] < H - 1)
    clear = clear.view(H, W)
    assert clear.float().mean() > 0.3
    assert (result.int() - expected.int()).abs()[:, clear].max() <= 1
    outside = (source[0] < -1) | (source[0] > W + 1) | (source[1] < -1) | (source[1] > H + 1)
    assert (result[:, outside.view(H, W)] == 128).all()


def test_matrices_of_mixed_operations_are_those_of_single_ones():
    strength = torch.tensor([0.3, -0.5, 0.7, -0.9, 1.0], dtype=torch.float64)
    kinds = torch.arange(5, dtype=torch.uint8)
    single = [image_ops.affine_matrices(kinds[i : i + 1], strength[i : i + 1], 9, 13) for i in range(5)]
    assert torch.equal(image_ops.affine_matrices(kinds, strength, 9, 13), torch.cat(single))


@pytest.mark.parametrize(("C", "H", "W"), [(3, 8, 8), (1, 17, 5)])
def test_identity_matrix_changes_nothing(C, H, W):
    images = random_images(2, C, H, W)
    assert torch.equal(image_ops.affine(images, torch.eye(2, 3).expand(2, 2, 3)), images)


# ---- to the device ----
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_arrive_together_as_they_were(device):
    """Odd sizes, none at all, slices, and every type that decisions have."""
    arrays = {
        "odd": np.arange(7, dtype=np.uint8),
        "none": np.zeros((0, 2, 3), np.float32),
        "whole": np.arange(-6, 6).reshape(3, 4),
        "columns": np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)[:, 1:4],
    }
    sent = image_ops.send_all(arrays, torch.device(device))
    assert sent.keys() == arrays.keys()
    for name, array in arrays.items():
        assert sent[name].device.type == device and sent[name].dtype == torch.from_numpy(array).dtype
        assert np.array_equal(sent[name].cpu().numpy(), array), name
