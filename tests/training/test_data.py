import copy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from mamba_rsst.training.augmentation import AugmentationConfig, BatchAugmentation, uniforms
from mamba_rsst.training.data import EpochSampler, ImageCollator, ImageDataConfig, ImageTensors, load_image_data


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("path", "", "non-empty string, got ''"),
        ("path", None, "non-empty string, got None"),
        ("train_split", " ", "non-empty string"),
        ("eval_split", 3, "non-empty string, got 3"),
        ("name", "", "non-empty string or None"),
        ("image_column", 1, "non-empty string or None"),
        ("label_column", "", "non-empty string or None"),
        ("max_train_samples", 0, "at least 1"),
        ("max_train_samples", 2.0, "at least 1"),
        ("max_eval_samples", -1, "at least 1"),
        ("max_eval_samples", True, "at least 1"),
        ("resize", "yes", "true or false"),
        ("mean", [0.5, 0.5], "1 or 3 numbers"),
        ("mean", [0.5, 0.5, 120.0], "1 or 3 numbers"),
        ("mean", 0.5, "1 or 3 numbers"),
        ("std", [0.0], "1 or 3 numbers"),
        ("std", ["0.2"], "1 or 3 numbers"),
    ],
)
def test_config_refuses(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` must .*{message}"):
        ImageDataConfig(**{name: value})


def test_config_refuses_one_column_for_both():
    with pytest.raises(ValueError, match="are both 'x'"):
        ImageDataConfig(image_column="x", label_column="x")


# ------------------------------------------------------------------------------------------------------------- digits


def load(image_size, num_channels=3, **settings):
    return load_image_data(ImageDataConfig(**settings), image_size=image_size, num_channels=num_channels)


def test_digits():
    loaded = load(8)
    assert loaded.train.images.shape == (1437, 3, 8, 8)
    assert loaded.eval.images.shape == (360, 3, 8, 8)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.train.labels.dtype == torch.int64
    assert loaded.id2label == {i: str(i) for i in range(10)}
    assert loaded.train.images.max() == 255
    assert torch.equal(loaded.train.images[:, 0], loaded.train.images[:, 2])
    for part in (loaded.train, loaded.eval):
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert (share - 0.1).abs().max() < 0.01
    source = pytest.importorskip("sklearn.datasets").load_digits()
    want = sorted(
        (np.rint(x * 255 / 16).astype(int).ravel().tolist(), y) for x, y in zip(source.images, source.target)
    )
    both = [
        (image[0].flatten().tolist(), label.item())
        for part in (loaded.train, loaded.eval)
        for image, label in zip(part.images, part.labels)
    ]
    assert sorted(both) == want
    again = load(8, max_train_samples=50)
    assert torch.equal(again.train.images, loaded.train.images[:50])


def test_digits_in_gray_and_resized():
    gray = load(8, num_channels=1)
    assert gray.train.images.shape == (1437, 1, 8, 8)
    assert len(gray.mean) == len(gray.std) == 1
    assert load(12, resize=True, max_train_samples=30).train.images.shape == (30, 3, 12, 12)
    with pytest.raises(ValueError, match="8x8, the model takes 12x12; `data.resize=true`"):
        load(12)


def test_digits_statistics():
    loaded = load(8)
    pixels = loaded.train.images.double() / 255
    np.testing.assert_allclose(loaded.mean, pixels.mean((0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(loaded.std, pixels.std((0, 2, 3), correction=0), atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ sampling


def tensors(count=50, C=3, size=8, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, C, size, size), dtype=torch.uint8, generator=generator)
    return ImageTensors(images, torch.arange(count) % classes)


def test_image_tensors():
    part = tensors()
    assert len(part) == 50
    assert part[17] == 17
    assert part.to("cpu") is part
    assert part.epoch == 0
    part.set_epoch(4)
    assert part.epoch == 4


def test_epoch_sampler():
    part = tensors()
    sampler = EpochSampler(part, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert first != list(range(50))
    assert list(sampler) == first
    assert len(sampler) == 50
    sampler.set_epoch(1)
    assert part.epoch == sampler.epoch == 1
    second = list(sampler)
    assert sorted(second) == list(range(50))
    assert second != first
    assert list(EpochSampler(tensors(), seed=4)) != first
    part.set_epoch(0)
    assert list(sampler) == first
    assert all(type(i) is int for i in first)


def test_epoch_sampler_of_a_part_tells_the_whole():
    """Whose epoch the augmentation reads."""
    whole = tensors()
    part = Subset(Subset(whole, range(40)), range(30))
    sampler = EpochSampler(part, seed=3)
    first = list(sampler)
    sampler.set_epoch(2)
    assert whole.epoch == sampler.epoch == 2 and list(sampler) != first and sorted(sampler) == list(range(30))


def test_epoch_sampler_of_a_data_set_that_shows_no_epoch():
    class Silent(list):
        def set_epoch(self, epoch):
            self.told = epoch

    sampler = EpochSampler(Silent(range(20)))
    first = list(sampler)
    sampler.set_epoch(1)
    assert sampler.dataset.told == sampler.epoch == 1 and list(sampler) != first


def test_epoch_sampler_of_a_plain_data_set():
    sampler = EpochSampler(list(range(20)), seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sampler.epoch == 1
    assert list(sampler) != first


def test_sampler_leaves_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(EpochSampler(tensors(), seed=0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


# ------------------------------------------------------------------------------------------------------------ collator

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def collator(part, augmentation=None, seed=0):
    if augmentation is not None:
        augmentation = BatchAugmentation(AugmentationConfig(**augmentation))
    return ImageCollator(part, mean=MEAN, std=STD, num_classes=5, augmentation=augmentation, seed=seed)


def test_collator_without_augmentation():
    part = tensors()
    batch = collator(part)([3, 40, 3])
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [3, 0, 3]
    expected = (part.images[[3, 40, 3]].double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(batch["pixel_values"].double(), expected, rtol=0, atol=1e-6)


def test_collator_with_everything_off():
    off = dict.fromkeys(("crop_padding", "randaugment_ops"), 0) | dict.fromkeys(("flip", "erasing"), 0.0)
    part = tensors()
    batch = collator(part, off | {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.2})([7, 1])
    assert torch.equal(batch["pixel_values"], collator(part)([7, 1])["pixel_values"])
    torch.testing.assert_close(batch["labels"], torch.eye(5)[[2, 1]] * 0.8 + 0.04)


def test_collator_with_augmentation():
    part = tensors()
    batch = collator(part, {})(list(range(20)))
    assert batch["pixel_values"].shape == (20, 3, 8, 8)
    assert batch["labels"].shape == (20, 5)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(20))
    assert not torch.equal(batch["pixel_values"], collator(part)(list(range(20)))["pixel_values"])


def test_collator_hands_each_sample_its_numbers_and_its_partner():
    part = tensors()
    part.set_epoch(2)
    augment = BatchAugmentation(AugmentationConfig())
    index = torch.tensor([4, 44, 9])
    numbers = uniforms(6, 2, index, 1 + augment.draws)
    partner = (numbers[:, 0] * 50).long()
    assert len({*partner.tolist(), *index.tolist()}) == 6
    chosen = part.images[index], part.labels[index], part.images[partner], part.labels[partner]
    pixels, targets = augment(*chosen, numbers[:, 1:], 5)
    batch = collator(part, {}, seed=6)(index.tolist())
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(batch["pixel_values"] * std + mean, pixels, rtol=0, atol=1e-5)
    assert torch.equal(batch["labels"], targets)


def test_partners_come_from_the_whole_data_set():
    part = tensors(count=40, classes=40)
    augment = BatchAugmentation(AugmentationConfig(mixup=100, cutmix=0, label_smoothing=0.0))
    collate = ImageCollator(part, mean=MEAN, std=STD, num_classes=40, augmentation=augment)
    partners = set()
    for epoch in range(60):
        part.set_epoch(epoch)
        targets = collate([0, 1])["labels"]
        partners |= set(targets.nonzero()[:, 1].tolist())
    assert len(partners) > 34  # of 40, 120 draws


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50])
def test_batches_do_not_depend_on_their_size(batch_size):
    part = tensors()
    collate = collator(part, {"randaugment_probability": 1.0})
    whole = collate(list(range(50)))
    for start in range(0, 50, batch_size):
        batch = collate(list(range(start, min(50, start + batch_size))))
        for key, value in batch.items():
            assert torch.equal(value, whole[key][start : start + batch_size])


def test_batches_depend_on_seed_and_epoch_only():
    part = tensors()
    indices = list(range(30))
    state = torch.get_rng_state()
    first = collator(part, {})(indices)["pixel_values"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    assert torch.equal(collator(part, {})(indices)["pixel_values"], first)
    assert not torch.equal(collator(part, {}, seed=1)(indices)["pixel_values"], first)
    part.set_epoch(1)
    other = collator(part, {})(indices)["pixel_values"]
    assert (other != first).flatten(1).any(1).float().mean() > 0.9
    part.set_epoch(0)
    assert torch.equal(collator(part, {})(indices)["pixel_values"], first)


# ----------------------------------------------------------------------------------------- under accelerate's wrappers


def loader(part, batch_size, processes=1, rank=0, epoch=0, skip=0):
    """What Trainer makes of a DataLoader: sharded over the processes, fast-forwarded on resuming."""
    accelerate = pytest.importorskip("accelerate.data_loader")
    plain = DataLoader(part, batch_size, sampler=EpochSampler(part, seed=5), collate_fn=collator(part, {}))
    prepared = accelerate.prepare_data_loader(plain, num_processes=processes, process_index=rank)
    if skip:
        prepared = accelerate.skip_first_batches(prepared, skip)
    prepared.set_epoch(epoch)
    return prepared


def test_one_and_two_processes_see_the_same_samples():
    expected = list(loader(tensors(), 10, epoch=2))
    shards = [list(loader(tensors(), 5, 2, rank, epoch=2)) for rank in range(2)]
    assert len(expected) == len(shards[0]) == 5
    for whole, *halves in zip(expected, *shards):
        for key, value in whole.items():
            assert torch.equal(torch.cat([half[key] for half in halves]), value)


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_epoch_continues_where_it_stopped(processes):
    expected = list(loader(tensors(), 5, processes, epoch=3))
    resumed = list(loader(tensors(), 5, processes, epoch=3, skip=2))
    assert len(resumed) == len(expected) - 2 > 1
    for before, after in zip(expected[2:], resumed):
        assert torch.equal(before["pixel_values"], after["pixel_values"])
        assert torch.equal(before["labels"], after["labels"])


def test_epochs_follow_each_other_without_being_told():
    prepared = loader(tensors(), 25)
    epochs = [torch.cat([batch["pixel_values"] for batch in prepared]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader(tensors(), 25, epoch=1)]), epochs[1])


def test_a_copy_shares_the_memory_but_not_the_epoch():
    part = tensors()
    other = copy.copy(part)
    other.set_epoch(9)
    assert part.epoch == 0
    assert other.images.data_ptr() == part.images.data_ptr()
