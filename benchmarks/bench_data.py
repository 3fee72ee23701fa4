"""What the host does in a training step beside the model: data, augmentation, and the trainer around them. One run.

    python benchmarks/bench_data.py [--batch 256 512] [--preset mamba_tiny] [--images 20000] [--device cuda]

The GPU waits where the host's milliseconds of a step exceed the GPU's. `host`: until the call returns, the device idle
before it; `done`: until the device has done the work too. Medians. On a CPU both are the process's CPU time, which
other work on the machine hardly changes, and the pixels are part of it.

light: crop and flip. full: the modern recipe's RandAugment, erasing, Mixup and CutMix. one pixel: of images of a
single pixel, so that on a CPU too it is the calls that count. PIL: the same operations image by image in one process,
as a data set with transforms has them (crop, flip and RandAugment; no erasing, no mixing). step without the model: a
run of RSSTTrainer whose forward and backward are left out and whose gradients are given: the light batches of one
pixel, clipping, AdamW, the schedule, the callbacks.
"""

import argparse
import random
import statistics
import tempfile
import time

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from mamba_rsst import MambaForImageClassification, MambaRsstVisionConfig, RSSTConfig, RSSTTrainer
from mamba_rsst.training.augmentation import AugmentationConfig, BatchAugmentation, uniforms
from mamba_rsst.training.data import EpochSampler, ImageCollator, ImageTensors


clock = time.perf_counter if torch.cuda.is_available() else time.process_time
SETTINGS = {"light": dict(randaugment_ops=0, erasing=0.0, mixup=0.0, cutmix=0.0), "full": {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="mamba_tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    gpu = args.device == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.images} random images of 32x32, {where}, torch {torch.__version__}\n")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (args.images,), generator=generator)
    data = ImageTensors(images, labels).to(args.device)
    print(f"{'batch':>5}  {'part':<36} {'host ms':>8} {'done ms':>8} {'images/s':>10}")
    for batch in args.batch:
        for name, host, done in parts(data, images, batch, args.rounds):
            print(f"{batch:>5}  {name:<36} {host:>8.3f} {done:>8.3f} {1e3 * batch / done:>10,.0f}", flush=True)
        host = step_without_model(of_one_pixel(data), batch, args)
        print(f"{batch:>5}  {'step without the model, light':<36} {host:>8.3f} {'':>8} {1e3 * batch / host:>10,.0f}\n")


def parts(data, images, batch, rounds):
    """(name, host ms, done ms) of what makes up a batch."""
    loader = DataLoader(data, batch, sampler=EpochSampler(data), collate_fn=list, drop_last=True)
    start = clock()
    indices = list(loader)
    each = 1e3 * (clock() - start) / len(indices)
    yield "order and indices", each, each
    index = torch.tensor(indices[0])
    for name, settings in SETTINGS.items():
        augment = BatchAugmentation(AugmentationConfig(**settings))
        yield (
            f"random numbers and decisions, {name}",
            *timed(lambda augment=augment: augment.decide(uniforms(0, 0, index, augment.draws), 32, 32), rounds),
        )
    for name, settings in {"none": None, **SETTINGS}.items():
        collate = collator(data, settings)
        yield f"whole batch, {name}", *timed(lambda collate=collate: collate(indices[0]), rounds)
    for name, settings in SETTINGS.items():
        collate = collator(of_one_pixel(data), settings)
        yield f"whole batch, {name}, one pixel", *timed(lambda collate=collate: collate(indices[0]), rounds)
    for name, operations in (("light", 0), ("full", 2)):
        yield f"whole batch by PIL, {name}", *timed(lambda n=operations: by_pil(images, indices[0], n), rounds=3)


def of_one_pixel(data):
    return ImageTensors(data.images[:, :, :1, :1].contiguous(), data.labels)


def collator(data, settings):
    augment = None if settings is None else BatchAugmentation(AugmentationConfig(**settings))
    return ImageCollator(data, mean=[0.5] * 3, std=[0.25] * 3, num_classes=10, augmentation=augment)


def timed(function, rounds):
    """Medians in ms: until the call returns, and until the device is done."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    host, done = [], []
    for r in range(rounds + 3):
        synchronize()
        start = clock()
        function()
        middle = clock()
        synchronize()
        if r >= 3:
            host.append(1e3 * (middle - start))
            done.append(1e3 * (clock() - start))
    return statistics.median(host), statistics.median(done)


# ---- the naive peer ----
def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)


PIL_OPS = [
    lambda image, s: ImageOps.autocontrast(image),
    lambda image, s: ImageOps.equalize(image),
    lambda image, s: ImageOps.invert(image),
    lambda image, s: ImageOps.posterize(image, max(1, 4 - int(4 * abs(s)))),
    lambda image, s: ImageOps.solarize(image, 256 - int(256 * abs(s))),
    lambda image, s: image.point([min(255, i + int(110 * abs(s))) if i < 128 else i for i in range(256)] * 3),
    lambda image, s: ImageEnhance.Color(image).enhance(max(0.1, 1 + 0.9 * s)),
    lambda image, s: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + 0.9 * s)),
    lambda image, s: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + 0.9 * s)),
    lambda image, s: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + 0.9 * s)),
    lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
    lambda image, s: affine(image, 1, 0.3 * s, 0, 0, 1, 0),
    lambda image, s: affine(image, 1, 0, 0, 0.3 * s, 1, 0),
    lambda image, s: affine(image, 1, 0, 0.45 * image.width * s, 0, 1, 0),
    lambda image, s: affine(image, 1, 0, 0, 0, 1, 0.45 * image.height * s),
]


def by_pil(images, indices, operations):
    rows = []
    for i in indices:
        image = ImageOps.expand(Image.fromarray(images[i].permute(1, 2, 0).numpy()), 4)
        left, top = random.randint(0, 8), random.randint(0, 8)
        image = image.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        for _ in range(operations):
            if random.random() < 0.5:
                image = random.choice(PIL_OPS)(image, random.choice((-1, 1)) * min(1, random.gauss(0.9, 0.05)))
        rows.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    pixels = (torch.stack(rows) - 0.5) / 0.25
    return pixels.cuda() if torch.cuda.is_available() else pixels


# ---- the trainer around them ----
class WithoutModel(RSSTTrainer):
    """As with a replayed step: each parameter gets its gradient, and nothing is computed."""

    gradients = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.gradients is None:
            self.gradients = [(p, torch.full_like(p, 1e-3)) for p in model.parameters()]
            self.loss = torch.zeros((), device=self.args.device)
        for p, gradient in self.gradients:
            p.grad = gradient
        return self.loss


class Clock(TrainerCallback):
    """Milliseconds of each step, from its end to the end of the next."""

    def __init__(self):
        self.steps, self.last = [], None

    def on_step_end(self, args, state, control, **kwargs):
        now = clock()
        if self.last is not None:
            self.steps.append(1e3 * (now - self.last))
        self.last = now


def step_without_model(data, batch, args):
    model = MambaForImageClassification(MambaRsstVisionConfig.preset(args.preset, num_labels=10))
    with tempfile.TemporaryDirectory() as folder:
        config = RSSTConfig(
            output_dir=folder,
            method="dense",
            num_train_epochs=2,
            per_device_train_batch_size=batch,
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            weight_decay=0.05,
            save_strategy="no",
            report_to="none",
            logging_steps=10_000,
            disable_tqdm=True,
            log_level="error",
            use_cpu=args.device == "cpu",
        )
        ticks, collate = Clock(), collator(data, SETTINGS["light"])
        WithoutModel(model=model, args=config, train_dataset=data, data_collator=collate, callbacks=[ticks]).train()
    return statistics.median(ticks.steps)


if __name__ == "__main__":
    main()
