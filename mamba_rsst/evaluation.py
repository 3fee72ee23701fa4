"""What a model costs (parameters, multiply-accumulates, time, memory) and how well it does (top-1), measured.

`inputs` is a dict of keyword arguments of one forward, batch first: `{"pixel_values": images}`. Tensors are moved to
the model's device, floating ones to its dtype, outside of what is timed. Every measurement runs in evaluation mode
without gradients, and leaves each module in the mode it had.
"""

import ctypes
import math
import statistics
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .pruning.importance import evaluation_mode


RUN_SECONDS = (
    0.05  # a timed run repeats the forward until it lasts this long, so that the clock's grain does not matter
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Items (images, sequences) a second over the timed runs."""

    items_per_s: float
    """Median of the runs."""
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    batch_size: int
    device: str


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
        _inference(model, inputs) as forward,
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
    return count_macs(model, inputs) // _batch_size(inputs)


class _CustomOpsWithoutFormula(TorchDispatchMode):
    """Collects the names of the ops run that are neither torch's own nor known to the flop counter."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in ("aten", "prim", "prims") and func.overloadpacket not in flop_registry:
            self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def measure_throughput(
    model,
    inputs: dict,
    *,
    min_seconds: float = 1.0,
    min_runs: int = 5,
    warmup: int = 2,
    autocast_dtype: torch.dtype | None = None,
) -> Timing:
    """Time forwards of `inputs` for at least `min_seconds` and `min_runs` runs, after `warmup` untimed forwards.

    To compare models use `compare_throughput`: a busy or throttled machine drifts between two calls of this function.
    """
    if min_runs < 1:
        raise ValueError(f"`min_runs` must be at least 1, got {min_runs}.")
    device, runs = _place(model)[0], []
    with _inference(model, inputs, autocast_dtype) as forward:
        repeats = _warm_up(forward, device, warmup, RUN_SECONDS)
        while len(runs) < min_runs or sum(runs) * repeats < min_seconds:
            runs.append(_seconds(forward, device, repeats))
    return _timing(runs, inputs, device)


def compare_throughput(
    models: dict,
    inputs: dict,
    *,
    rounds: int = 10,
    run_seconds: float = RUN_SECONDS,
    warmup: int = 2,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Timing]:
    """Time several models in turn, A B C A B C ..., so that the machine's drift hits all of them alike.

    models: {"dense": model, "cut": smaller}. Each of the `rounds` gives every model one run, which repeats its forward
    for about `run_seconds`. Returns {name: Timing} in the order given.
    """
    if not models or rounds < 1:
        raise ValueError(f"Nothing to time: {len(models)} models, `rounds` = {rounds}.")
    runs = {name: [] for name in models}
    with ExitStack() as stack:
        timed = {}
        for name, model in models.items():
            device, forward = _place(model)[0], stack.enter_context(_inference(model, inputs, autocast_dtype))
            timed[name] = (forward, device, _warm_up(forward, device, warmup, run_seconds))
        for _ in range(rounds):
            for name, run in timed.items():
                runs[name].append(_seconds(*run))
    return {name: _timing(runs[name], inputs, timed[name][1]) for name in models}


def measure_peak_memory(model, inputs: dict, *, autocast_dtype: torch.dtype | None = None) -> int | None:
    """Bytes that inference needs: the weights, plus what one forward of `inputs` takes at its peak on top.

    The inputs and everything else in the process are left out. CUDA: the allocator's own exact count. CPU (Linux): the
    process's peak resident memory less what it held before, so pages, rounded by the kernel, and only while no other
    thread allocates. None where neither can be read: not known, which is not 0.
    """
    device = _place(model)[0]
    with _inference(model, inputs, autocast_dtype) as forward:
        forward()  # libraries allocate their workspaces at the first call and keep them
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            forward()
            torch.cuda.synchronize(device)
            return weight_bytes(model) + torch.cuda.max_memory_allocated(device) - before
        if device.type == "cpu" and _reset_peak_resident():
            before = _resident_bytes("VmRSS")
            forward()
            return weight_bytes(model) + max(_resident_bytes("VmHWM") - before, 0)
    return None


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
    device, dtype = _place(model)
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
def _place(model) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    raise ValueError(f"{type(model).__name__} has no floating-point parameters.")


def _batch_size(inputs: dict) -> int:
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.dim() and len(value):
            return len(value)
    raise ValueError(f"`inputs` holds no batch: {sorted(inputs)} has no tensor with a first dimension above 0.")


@contextmanager
def _inference(model, inputs, autocast_dtype=None):
    """Yield `forward()`: one inference pass of `inputs`, placed where the model is."""
    _batch_size(inputs)
    device, dtype = _place(model)
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


# ---- the clock ----
def _seconds(forward, device, repeats) -> float:
    """Seconds a forward, over `repeats` of them back to back, the device idle before and after."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        forward()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _warm_up(forward, device, warmup, run_seconds) -> int:
    """Run untimed forwards; return how many fill a run."""
    for _ in range(warmup):
        forward()
    return max(1, math.ceil(run_seconds / _seconds(forward, device, 1)))


def _synchronise(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timing(runs: list[float], inputs, device) -> Timing:
    batch = _batch_size(inputs)
    rates = [batch / seconds for seconds in runs]
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
    return Timing(items_per_s=median, low=low, high=high, batch_size=batch, device=str(device))


# ---- resident memory, Linux ----
def _resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _reset_peak_resident() -> bool:
    """Give freed memory back to the system and start the peak afresh; False where that cannot be done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_bytes("VmHWM") - _resident_bytes("VmRSS") < 2**22
    except (OSError, AttributeError, TypeError, StopIteration):  # no glibc, no such file, not allowed, no such field
        return False
