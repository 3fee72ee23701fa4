import math

import numpy as np
import pytest
import torch

from mamba_rsst.training import augmentation, image_ops
from mamba_rsst.training.augmentation import AugmentationConfig, BatchAugmentation, beta_quantile, uniforms


OFF = {
    "crop_padding": 0,
    "flip": 0.0,
    "randaugment_ops": 0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
}
K = 7


def random_images(count, C=3, H=11, W=14):
    return torch.randint(256, (count, C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run(config, images, epoch=0, index=None, seed=0, labels=None):
    """The augmentation of `images` with partners in reversed order."""
    augment = BatchAugmentation(AugmentationConfig(**config))
    index = torch.arange(len(images)) if index is None else index
    labels = torch.arange(len(images)) % K if labels is None else labels
    numbers = uniforms(seed, epoch, index, augment.draws)
    return augment(images, labels, images.flip(0), labels.flip(0), numbers, K)


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_padding", -1),
        ("crop_padding", 1.5),
        ("crop_padding", True),
        ("flip", -0.1),
        ("flip", 1.1),
        ("flip", "0.5"),
        ("flip", None),
        ("flip", math.nan),
        ("randaugment_ops", -1),
        ("randaugment_ops", 2.0),
        ("randaugment_probability", 1.01),
        ("randaugment_magnitude", 10.5),
        ("randaugment_magnitude", -1),
        ("randaugment_std", -0.5),
        ("randaugment_std", math.inf),
        ("erasing", 2),
        ("mixup", -0.2),
        ("mixup", math.inf),
        ("cutmix", -1.0),
        ("cutmix", 101),
        ("mix_probability", 1.5),
        ("switch_probability", -0.5),
        ("label_smoothing", 1.2),
    ],
)
def test_config_refuses(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a (whole )?number .*, got {value!r}"):
        AugmentationConfig(**{name: value})


def test_config_accepts_the_limits():
    AugmentationConfig(flip=1, erasing=0, mixup=100, cutmix=0, randaugment_magnitude=10, label_smoothing=1.0)


# ------------------------------------------------------------------------------------------------------ random numbers


def splitmix(z):
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize(("seed", "epoch", "index"), [(0, 0, 0), (3, 5, 49_999), (2**63 + 11, 299, 2**40), (-1, 1, 1)])
def test_uniforms_are_splitmix64(seed, epoch, index):
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    key = splitmix((splitmix(seed & mask) + epoch * golden) & mask)
    stream = splitmix((key + index * golden) & mask)
    expected = [(splitmix((stream + slot * golden) & mask) >> 40) / 2**24 for slot in range(1, 6)]
    assert uniforms(seed, epoch, torch.tensor([index]), 5).double().tolist() == [expected]


def test_splitmix64_known_output():
    # The published first outputs of splitmix64 for the seed 1234567 check the reference above.
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix((1234567 + slot * golden) % 2**64) for slot in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_statistics():
    u = uniforms(1, 2, torch.arange(20_000), 12)
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    deviation = 1 / math.sqrt(12 * 20_000)
    assert (u.mean(0) - 0.5).abs().max() < 5 * deviation
    assert (u.var(0) - 1 / 12).abs().max() < 0.003
    correlation = torch.corrcoef(u.T) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    other = torch.cat([uniforms(1, 3, torch.arange(20_000), 1), uniforms(2, 2, torch.arange(20_000), 1)], dim=1)
    neighbour = torch.stack([u[:, 0], u[:, 0].roll(1), other[:, 0], other[:, 1]])
    assert (torch.corrcoef(neighbour) - torch.eye(4)).abs().max() < 5 / math.sqrt(20_000)


def test_uniforms_slots_do_not_depend_on_the_count():
    index = torch.tensor([5, 0, 5, 17])
    assert torch.equal(uniforms(0, 0, index, 3), uniforms(0, 0, index, 9)[:, :3])
    assert torch.equal(uniforms(0, 0, index, 3)[0], uniforms(0, 0, index, 3)[2])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 1.5, 4.0, 100.0])
def test_beta_quantile_is_the_inverse_distribution_function(alpha):
    stats = pytest.importorskip("scipy.stats")
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    # The tolerance is the width of the table's cells.
    np.testing.assert_allclose(beta_quantile(u, alpha), stats.beta.ppf(u.numpy(), alpha, alpha), atol=5e-4)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_beta_moments(alpha):
    x = beta_quantile((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000, alpha)
    assert abs(x.mean() - 0.5) < 1e-6
    assert abs(x.var() - 1 / (4 * (2 * alpha + 1))) < 1e-4


# ------------------------------------------------------------------------------------------------------------ pipeline


@pytest.mark.parametrize("C", [1, 3])
def test_everything_off_is_the_identity(C):
    images = random_images(5, C)
    pixels, targets = run(OFF, images)
    assert torch.equal(pixels, images.float() / 255)
    assert torch.equal(targets, torch.eye(K)[:5])


def test_label_smoothing():
    _, targets = run(OFF | {"label_smoothing": 0.3}, random_images(3))
    expected = torch.full((3, K), 0.3 / K) + 0.7 * torch.eye(K)[:3]
    torch.testing.assert_close(targets, expected)


def test_flip():
    images = random_images(400)
    pixels, _ = run(OFF | {"flip": 0.25}, images)
    plain, mirrored = images.float() / 255, images.flip(3).float() / 255
    flipped = (pixels == mirrored).flatten(1).all(1)
    assert (flipped | (pixels == plain).flatten(1).all(1)).all()
    assert 0.17 < flipped.float().mean() < 0.33
    assert torch.equal(run(OFF | {"flip": 1.0}, images)[0], mirrored)


@pytest.mark.parametrize("padding", [1, 2])
def test_crop_is_a_window_of_the_padded_image(padding):
    images = random_images(300, H=6, W=9)
    pixels, _ = run(OFF | {"crop_padding": padding}, images)
    padded = torch.nn.functional.pad(images.float() / 255, (padding,) * 4)
    shifts = range(2 * padding + 1)
    windows = torch.stack([padded[:, :, y : y + 6, x : x + 9] for y in shifts for x in shifts])
    found = (windows == pixels).flatten(2).all(2)
    assert (found.sum(0) == 1).all()
    frequency = found.float().mean(1)
    assert frequency.min() > 0.4 / len(windows)
    assert frequency.max() < 2 / len(windows)


def test_randaugment_takes_every_operation(monkeypatch):
    seen = {}

    def parameters(op, strength):
        for i, value in zip(op.flatten().tolist(), strength.flatten().tolist()):
            if i < len(image_ops.OPS):
                seen.setdefault(image_ops.OPS[i], []).append(value)
        return image_ops.pixel_parameters(op, strength)

    monkeypatch.setattr(augmentation, "pixel_parameters", parameters)
    images = random_images(3000)
    config = OFF | {"randaugment_ops": 1, "randaugment_magnitude": 6.0, "randaugment_std": 0.5}
    pixels, _ = run(config, images)
    assert set(seen) == set(image_ops.OPS)
    for name, strengths in seen.items():
        assert 60 < len(strengths) < 145, name  # 3000 * 0.5 / 15 = 100
    strengths = torch.tensor([value for values in seen.values() for value in values])
    assert 0.44 < (strengths > 0).float().mean() < 0.56
    assert abs(strengths.abs().mean() - 0.6) < 0.01
    assert abs(strengths.abs().std() - 0.05) < 0.005
    untouched = (pixels == images / 255).flatten(1).all(1).float().mean()
    assert 0.45 < untouched < 0.6


def test_randaugment_order_of_images_is_kept():
    images = (torch.arange(64, dtype=torch.uint8) * 2)[:, None, None, None].expand(64, 1, 8, 8).contiguous()
    config = OFF | {"randaugment_ops": 2, "randaugment_magnitude": 0.0, "randaugment_std": 0.0}
    # At strength 0 only these change anything, and posterize merely clears the low bits.
    pixels, _ = run(config, images)
    level = (pixels[:, 0, 4, 4] * 255).round().int()
    plain = images[:, 0, 0, 0].int()
    allowed = (level == plain) | (level == 255 - plain) | (level == plain & 240) | (level == (255 - plain) & 240)
    assert (allowed | (level == 255 - (plain & 240))).all()
    assert (level == plain).float().mean() > 0.6


def test_erasing():
    images = torch.full((600, 3, 20, 30), 77, dtype=torch.uint8)
    pixels, targets = run(OFF | {"erasing": 0.3}, images)
    changed = (pixels != 77 / 255).any(1)
    erased = changed.flatten(1).any(1)
    assert 0.24 < erased.float().mean() < 0.36
    rows, columns = changed.any(2)[erased], changed.any(1)[erased]
    area = changed[erased].flatten(1).float().mean(1)
    boxes = rows.sum(1) * columns.sum(1) / 600
    torch.testing.assert_close(area, boxes, rtol=0, atol=0.02)  # a full rectangle, but for noise that happens to be 77
    assert area.min() < 0.05
    assert 0.28 < area.max() < 0.37
    noise = pixels.permute(0, 2, 3, 1)[changed]
    assert 0.49 < noise.mean() < 0.51
    assert abs(noise.std() - 1 / math.sqrt(12)) < 0.01
    assert torch.equal(targets, torch.eye(K)[torch.arange(600) % K])


def mixing_inputs(count=400, H=9, W=14):
    """Own pixels 1.0, partner pixels 0.0: the mean of the result is the share of the own image."""
    own = torch.full((count, 1, H, W), 255, dtype=torch.uint8)
    return own, torch.zeros(count, dtype=torch.long), own * 0, torch.ones(count, dtype=torch.long)


@pytest.mark.parametrize(
    ("mixup", "cutmix", "probability", "switch"),
    [
        (0.8, 0.0, 1.0, 0.5),
        (0.0, 1.0, 1.0, 0.5),
        (0.0, 1.0, 1.0, 0.0),
        (0.8, 1.0, 1.0, 0.25),
        (0.8, 1.0, 0.3, 0.5),
        (0.2, 0.0, 0.6, 1.0),
    ],
)
def test_targets_are_the_shares_of_the_pixels(mixup, cutmix, probability, switch):
    config = {"mixup": mixup, "cutmix": cutmix, "mix_probability": probability, "switch_probability": switch}
    augment = BatchAugmentation(AugmentationConfig(**OFF | config))
    inputs = mixing_inputs()
    pixels, targets = augment(*inputs, uniforms(0, 0, torch.arange(400), augment.draws), 3)
    share = pixels.double().mean((1, 2, 3))
    torch.testing.assert_close(targets[:, 0].double(), share, rtol=0, atol=1e-6)
    torch.testing.assert_close(targets[:, 1].double(), 1 - share, rtol=0, atol=1e-6)
    assert (targets[:, 2] == 0).all()
    uniform = (pixels == pixels[:, :, :1, :1]).flatten(1).all(1)
    cut = ~uniform
    assert ((pixels[cut] == 0) | (pixels[cut] == 1)).all()
    mixed = uniform & (share > 0) & (share < 1)
    part = cutmix and (switch if mixup else 1.0)
    assert abs(mixed.float().mean() - probability * (1 - part)) < 0.08
    # A box smaller than one pixel, or larger than the image, leaves a uniform image.
    assert probability * part - 0.25 * part - 0.05 < cut.float().mean() <= probability * part + 0.08


def test_cutmix_box_is_a_rectangle_of_the_beta_area():
    augment = BatchAugmentation(AugmentationConfig(**OFF | {"cutmix": 1.0}))
    pixels, _ = augment(*mixing_inputs(2000, 32, 32), uniforms(0, 0, torch.arange(2000), augment.draws), 2)
    taken = pixels[:, 0] == 0
    boxes = taken.any(1).sum(1) * taken.any(2).sum(1)
    assert torch.equal(boxes, taken.sum((1, 2)))
    numbers = uniforms(0, 0, torch.arange(2000), augment.draws)[:, -5:].double()
    side = (32 * (1 - beta_quantile(numbers[:, 2], 1.0)).sqrt()).long()
    inner = (numbers[:, 3:] * 32).long()
    start = inner - side[:, None] // 2
    clear = ((start >= 0) & (start + side[:, None] <= 32)).all(1)  # not clipped at the border
    assert clear.float().mean() > 0.1
    assert torch.equal(boxes[clear], side[clear] ** 2)


def test_mixup_weight_follows_the_beta_distribution():
    augment = BatchAugmentation(AugmentationConfig(**OFF | {"mixup": 0.8}))
    pixels, _ = augment(*mixing_inputs(4000, 2, 2), uniforms(0, 0, torch.arange(4000), augment.draws), 2)
    weight = pixels[:, 0, 0, 0]
    assert abs(weight.mean() - 0.5) < 0.03
    assert abs(weight.var() - 1 / (4 * 2.6)) < 0.01


def test_partner_is_augmented_with_its_own_numbers():
    # A tiny alpha gives either the image or, half the time, its partner alone; both are the same picture here.
    images = random_images(1).expand(300, -1, -1, -1)
    augment = BatchAugmentation(AugmentationConfig(**OFF | {"mixup": 1e-3, "flip": 0.5}))
    labels = torch.zeros(300, dtype=torch.long)
    numbers = uniforms(0, 0, torch.arange(300), augment.draws)
    pixels, targets = augment(images, labels, images, labels + 1, numbers, 2)
    flipped = ((pixels - images.flip(3) / 255).abs() < 1e-4).flatten(1).all(1)  # the weights are not quite 0 and 1
    partner = targets[:, 1] == 1
    assert 0.35 < partner.float().mean() < 0.6
    own_flip, partner_flip = numbers[:, 2] < 0.5, numbers[:, augment._image_draws + 2] < 0.5
    assert torch.equal(flipped[partner], partner_flip[partner])
    assert torch.equal(flipped[targets[:, 0] == 1], own_flip[targets[:, 0] == 1])
    assert 0.3 < (own_flip == partner_flip).float().mean() < 0.7


@pytest.mark.parametrize("mixing", [{"mixup": 0.0, "cutmix": 0.0}, {"mix_probability": 0.0}])
def test_no_mixing_needs_no_partners(mixing):
    augment = BatchAugmentation(AugmentationConfig(**mixing))
    assert not augment.mixes
    images = random_images(3)
    _, targets = augment(
        images, torch.tensor([0, 1, 2]), None, None, uniforms(0, 0, torch.arange(3), augment.draws), K
    )
    assert (targets.argmax(1) == torch.tensor([0, 1, 2])).all()


@pytest.mark.parametrize(
    ("off", "draws"),
    [
        ({}, 2 * 17 + 5),
        ({"mixup": 0.0, "cutmix": 0.0}, 17),
        ({"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}, 11),
        ({"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "randaugment_ops": 0}, 3),
    ],
)
def test_what_is_off_draws_no_numbers_and_moves_no_others(off, draws):
    augment = BatchAugmentation(AugmentationConfig(**off))
    assert augment.draws == draws
    images, labels, index = random_images(40), torch.arange(40) % K, torch.arange(40)
    few, many = (
        augment(images, labels, images.flip(0), labels.flip(0), uniforms(0, 0, index, count), K)
        for count in (draws, 2 * 17 + 5)
    )
    assert torch.equal(few[0], many[0]) and torch.equal(few[1], many[1])


@pytest.mark.parametrize(("C", "H", "W"), [(3, 32, 32), (1, 8, 8), (3, 17, 5), (3, 1, 3), (1, 2, 2)])
def test_output_is_valid(C, H, W):
    pixels, targets = run({"randaugment_probability": 1.0, "erasing": 1.0}, random_images(128, C, H, W))
    assert pixels.shape == (128, C, H, W)
    assert pixels.dtype == targets.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    torch.testing.assert_close(targets.sum(1), torch.ones(128))
    assert targets.min() >= 0.1 / K - 1e-6


@pytest.mark.parametrize(("C", "size"), [(3, 32), (1, 8), (3, 17)])
def test_same_sample_in_any_batch(C, size):
    images, labels = random_images(200, C, size, size), torch.arange(200) % K
    partners, partner_labels = images.roll(7, 0), labels.roll(7)
    augment = BatchAugmentation(AugmentationConfig(randaugment_probability=1.0))
    numbers = uniforms(3, 4, torch.arange(200), augment.draws)

    def batch(rows):
        return augment(images[rows], labels[rows], partners[rows], partner_labels[rows], numbers[rows], K)

    whole = batch(torch.arange(200))
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for rows in (*torch.arange(200).split(1)[:20], *torch.arange(200).split(37), shuffled):
        pixels, targets = batch(rows)
        assert torch.equal(pixels, whole[0][rows])
        assert torch.equal(targets, whole[1][rows])


def test_inputs_and_global_generators_are_left_alone():
    images = random_images(32)
    before, numpy_state, state = images.clone(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second = run({}, images), run({}, images)
    assert torch.equal(first[0], second[0])
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert not torch.equal(run({}, images, epoch=1)[0], first[0])
    assert not torch.equal(run({}, images, seed=1)[0], first[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    index = torch.arange(512)
    assert torch.equal(uniforms(1, 2, index.cuda(), 9).cpu(), uniforms(1, 2, index, 9))
    images = random_images(512, H=32, W=32)
    pixels, targets = run({}, images)
    augment = BatchAugmentation(AugmentationConfig())
    labels = (index % K).cuda()
    numbers = uniforms(0, 0, index, augment.draws)
    images = images.cuda()
    on_gpu = augment(images, labels, images.flip(0), labels.flip(0), numbers, K)
    torch.testing.assert_close(on_gpu[1].cpu(), targets)
    # Resampling differs in the last bit, which posterize or solarize can turn into a visible step.
    assert ((on_gpu[0].cpu() - pixels).abs() > 1.5 / 255).float().mean() < 1e-3
