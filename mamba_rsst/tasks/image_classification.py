"""The task image-classification."""

import torch
from transformers import ViTImageProcessorPil

from .. import speed
from ..hub import load_model
from ..models import PRESETS, MambaForImageClassification, MambaRsstVisionConfig
from ..training.augmentation import BatchAugmentation
from ..training.data import ImageCollator, ImageData, ImageDataConfig, ImageTensors, load_image_data
from .base import Task, Workload, calibration_batches


class ImageClassification(Task):
    name = "image-classification"
    model_class = MambaForImageClassification
    config_class = MambaRsstVisionConfig
    presets = PRESETS
    data_config = ImageDataConfig
    augments = True
    metrics = ("accuracy",)
    speed = "images_per_s"

    def load_data(self, recipe) -> ImageData:
        config = self._config(recipe)
        return load_image_data(recipe.data, image_size=config.image_size, num_channels=config.num_channels)

    def _config(self, recipe) -> MambaRsstVisionConfig:
        if recipe.model.path is None:
            return MambaRsstVisionConfig.preset(recipe.model.preset, **recipe.model.overrides)
        config = load_model(recipe.model.path).config
        if not isinstance(config, MambaRsstVisionConfig):
            raise ValueError(f"{recipe.model.path!r} is a {config.model_type!r} model, not an image classifier.")
        return config

    def start_model(self, recipe, data):
        if recipe.model.path is not None:
            model = load_model(recipe.model.path)
            if model.config.num_labels != len(data.id2label):
                known = model.config.num_labels
                raise ValueError(f"{recipe.model.path!r} knows {known} classes, the data has {len(data.id2label)}.")
            return model
        config = self._config(recipe)
        config.id2label = data.id2label
        config.label2id = {name: i for i, name in data.id2label.items()}
        return MambaForImageClassification(config)

    def prepare(self, recipe, args, model, data):
        if args.label_smoothing_factor:
            raise ValueError(
                "`training.label_smoothing_factor` does not go with images; set augmentation.label_smoothing."
            )
        size, padding = model.config.image_size, recipe.augmentation.crop_padding if recipe.augmentation else 0
        if padding > size:
            raise ValueError(f"`augmentation.crop_padding` must be at most the image's size, {size}; got {padding}.")
        train = data.train.to(args.device)
        common = {"mean": data.mean, "std": data.std, "num_classes": len(data.id2label)}
        augmentation = BatchAugmentation(recipe.augmentation) if recipe.augmentation else None
        plain = ImageTensors(train.images, train.labels)
        calibrates = recipe.pruning is not None
        return {
            "train_dataset": train,
            "eval_dataset": data.eval.to(args.device),
            "data_collator": ImageCollator(train, augmentation=augmentation, seed=args.seed, **common),
            "eval_data_collator": ImageCollator(data.eval, **common),
            "calibration": calibration_batches(args, plain, ImageCollator(plain, **common)) if calibrates else None,
            "processing_class": _image_processor(model.config, data),
            "compute_metrics": _accuracy,
        }

    def workload(self, model, recipe) -> Workload:
        size = (model.config.num_channels, model.config.image_size, model.config.image_size)
        batch = speed.default_batch_size(model)
        images = torch.randn(batch, *size, device=model.device)
        return Workload(
            speed_inputs={"pixel_values": images},
            items_each=1,
            macs_inputs={"pixel_values": images[:1]},
            macs_items=1,
            notes={"batch_size": batch},
        )


def _accuracy(prediction) -> dict:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _image_processor(config, data: ImageData):
    size = {"height": config.image_size, "width": config.image_size}
    return ViTImageProcessorPil(size=size, image_mean=data.mean, image_std=data.std)
