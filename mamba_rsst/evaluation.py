"""What a model has (parameters, bytes), what a forward takes (multiply-accumulates) and how well it does (top-1).

`inputs` is a dict of keyword arguments of one forward, batch first: `{"pixel_values": images}`. Tensors are moved to
the model's device, floating ones to its dtype. Everything runs in evaluation mode without gradients, and leaves each
module in the mode it had. Time and memory are in speed.py.
"""

import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .models import MambaForCausalLM, MambaRsstConfig
from .pruning.importance import evaluation_mode


def count_parameters(model) -> int:
    """Number of parameters; a tensor that several modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model) -> int:
    """Bytes of parameters and buffers; a tensor that several modules share counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def count_macs(model, inputs: dict) -> int:
    """Multiply-accumulates of ONE forward of `inputs`: the whole batch, half of what torch's flop counter finds.

    Counts matrix products, convolutions, attention, and custom ops that registered a formula (the selective scan).
    Elementwise work (norms, activations, gates, residual sums) is not counted. A custom op without a formula counts as
    nothing, so it is named in a warning.
    """
    unknown = _CustomOpsWithoutFormula()
    # The counter has no formula for the CPU's fused attention; the plain products come to the same number.
    with (
        inference(model, inputs) as forward,
        sdpa_kernel(SDPBackend.MATH),
        unknown,
        FlopCounterMode(display=False) as counter,
    ):
        forward()
    if unknown.names:
        warnings.warn(f"No flop formula for {sorted(unknown.names)}: the MACs leave them out.", stacklevel=2)
    return counter.get_total_flops() // 2


def count_macs_per_item(model, inputs: dict) -> int:
    """`count_macs` divided by the batch size: what one image or one sequence costs."""
    return count_macs(model, inputs) // batch_size_of(inputs)


def language_model_costs(config: MambaRsstConfig, dtype: torch.dtype) -> dict[str, int]:
    """What a language model of these widths has and takes, without its weights: {parameters, macs_per_token,
    state_bytes}.

    parameters: tied embeddings count once.  macs_per_token: as `count_macs`, the head included.
    state_bytes: what generation keeps of one sequence, whatever its length; the scan's state is fp32 in any dtype.
    """
    with torch.device("meta"):
        model = MambaForCausalLM(config).to(dtype).eval()
    # Fake tensors have no data either, yet are "on the CPU": meta ones would take the accelerators' way, whose
    # convolution is elementwise work and not counted.
    with FakeTensorMode(), torch.no_grad():
        weights = {name: torch.empty(tensor.shape, dtype=dtype) for name, tensor in model.named_parameters()}
        call = (model, weights, torch.zeros(1, 1, dtype=torch.long), {"use_cache": True})
        with FlopCounterMode(display=False) as counter:
            layers = torch.func.functional_call(*call).cache.layers
    states = [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]
    return {
        "parameters": count_parameters(model),
        "macs_per_token": counter.get_total_flops() // 2,
        "state_bytes": sum(state.numel() * state.element_size() for state in states),
    }


class _CustomOpsWithoutFormula(TorchDispatchMode):
    """Collects the names of the ops run that are neither torch's own nor known to the flop counter."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in ("aten", "prim", "prims") and func.overloadpacket not in flop_registry:
            self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def evaluate_images(
    model,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    mean,
    std,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict:
    """Top-1 accuracy (a fraction) and mean cross-entropy of an image classifier: {accuracy, loss, num_samples}.

    images: (M, C, H, W), uint8.  labels: (M,).  mean, std: one number a channel, of pixels scaled to [0, 1].
    Pixels are normalised in fp32 and given in the model's dtype; the loss is taken in fp32. `device` moves the model
    there; without it the model is used where it is.
    """
    _check_images(model.config, images, labels, mean, std)
    if device is not None:
        model.to(device)
    device, dtype = place_of(model)
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=device).view(1, -1, 1, 1) for v in (mean, std))
    starts = range(0, len(images), batch_size)
    if progress:
        from rich.progress import track

        starts = track(starts, description="Evaluating")

    correct = torch.zeros((), dtype=torch.long, device=device)  # summed on the device: one synchronisation, at the end
    loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with evaluation_mode(model):
        for start in starts:
            pixels = images[start : start + batch_size].to(device, non_blocking=True)
            target = labels[start : start + batch_size].to(device, torch.long, non_blocking=True)
            logits = model(pixel_values=((pixels.float() / 255 - mean) / std).to(dtype)).logits.float()
            loss += F.cross_entropy(logits, target, reduction="sum")
            correct += (logits.argmax(-1) == target).sum()
    return {"accuracy": correct.item() / len(images), "loss": loss.item() / len(images), "num_samples": len(images)}


def _check_images(config, images, labels, mean, std):
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"`images` must be uint8 (M, C, H, W), got {images.dtype} of shape {tuple(images.shape)}.")
    if len(images) == 0:
        raise ValueError("There are no images to evaluate.")
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images need {len(images)} labels, got shape {tuple(labels.shape)}.")
    size = config.image_size
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if tuple(images.shape[2:]) != size:
        height, width = images.shape[2:]
        raise ValueError(f"The images are {height}x{width} but the model takes {size[0]}x{size[1]}.")
    channels = images.shape[1]
    if channels != getattr(config, "num_channels", channels):
        raise ValueError(f"The images have {channels} channels but the model takes {config.num_channels}.")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"The images have {channels} channels, `mean` {len(mean)} numbers and `std` {len(std)}.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= config.num_labels:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"Label {wrong} is outside the model's {config.num_labels} classes.")


# ---- running a model ----
def place_of(model) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter. Raises ValueError for a model without one."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    raise ValueError(f"{type(model).__name__} has no floating-point parameters.")


def batch_size_of(inputs: dict) -> int:
    """First dimension of the first tensor that has one. Raises ValueError where there is none."""
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.dim() and len(value):
            return len(value)
    raise ValueError(f"`inputs` holds no batch: {sorted(inputs)} has no tensor with a first dimension above 0.")


@contextmanager
def inference(model, inputs: dict, autocast_dtype: torch.dtype | None = None):
    """Yield `forward()`: one inference pass of `inputs`, placed where the model is."""
    batch_size_of(inputs)
    device, dtype = place_of(model)
    placed = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }

    def forward():
        with torch.inference_mode(), torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            return model(**placed)

    with evaluation_mode(model):
        yield forward
