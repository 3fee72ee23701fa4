"""How fast a model runs and how much memory that takes: throughput, latency, peak memory, dense and pruned in turn.

`inputs` is a dict of keyword arguments of one forward, batch first, or a function that makes them for a model where
they depend on it (its cache). Tensors are moved to the model's device, floating ones to its dtype, outside of what is
timed. Every measurement runs in evaluation mode without gradients, and leaves each module in the mode it had.
"""

import ctypes
import inspect
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ._version import __version__
from .errors import one_line
from .evaluation import batch_size_of, inference, place_of, weight_bytes
from .training.compiling import compile_blocks_
from .training.graphed_step import capture


RUN_SECONDS = 0.05
"""A timed run repeats the forward until it lasts this long, so that the clock's grain does not matter."""
MEASURED_BATCH = {"cpu": {"pixel_values": 64, "input_ids": 4}, "cuda": {"pixel_values": 512, "input_ids": 32}}
"""Images or sequences at a time unless said otherwise, by device: enough to keep it busy."""

PEAK_MEMORY = "peak memory, bytes"
CACHES = ("cache", "cache_params", "past_key_values")
"""What a language model's forward may call its cache, the current name of transformers first."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Items (images, tokens, sequences) a second over the timed runs."""

    items_per_s: float
    """Median of the runs."""
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    batch_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds from the start of a forward to its end, one forward at a time."""

    ms: float
    """Median of the forwards."""
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    device: str


# ---- one measurement ----
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
    device, runs = place_of(model)[0], []
    with inference(model, inputs, autocast_dtype) as forward:
        repeats = _warm_up(forward, device, warmup, RUN_SECONDS)
        while len(runs) < min_runs or sum(runs) * repeats < min_seconds:
            runs.append(_seconds(forward, device, repeats))
    return _timing(runs, batch_size_of(inputs), 1, device)


def compare_throughput(
    models: dict,
    inputs: dict | Callable,
    *,
    items_each: int = 1,
    rounds: int = 10,
    run_seconds: float = RUN_SECONDS,
    warmup: int = 2,
    autocast_dtype: torch.dtype | None = None,
    graph: bool = False,
) -> dict[str, Timing]:
    """Time several models in turn, A B C A B C ..., so that the machine's drift hits all of them alike.

    models: {"dense": model, "cut": smaller}. Each of the `rounds` gives every model one run, which repeats its forward
    for about `run_seconds`. items_each: what one entry of the batch counts as, such as its tokens. graph: replay each
    forward as a CUDA graph, so that launching its kernels costs nothing. Returns {name: Timing} in the order given.
    """
    runs, batches = {name: [] for name in models}, {}
    with _ready(models, inputs, rounds, warmup, autocast_dtype, graph) as timed:
        repeats = {name: _warm_up(forward, device, 0, run_seconds) for name, (forward, device, _) in timed.items()}
        for _ in range(rounds):
            for name, (forward, device, batch) in timed.items():
                runs[name].append(_seconds(forward, device, repeats[name]))
                batches[name] = (batch, items_each, device)
    return {name: _timing(runs[name], *batches[name]) for name in models}


def compare_latency(
    models: dict,
    inputs: dict | Callable,
    *,
    rounds: int = 10,
    run_seconds: float = RUN_SECONDS,
    warmup: int = 2,
    autocast_dtype: torch.dtype | None = None,
    graph: bool = False,
) -> dict[str, Latency]:
    """Time single forwards, the device idle before and after each; models, turns and options as in compare_throughput.

    Between two forwards of a throughput run a GPU's queue hides what the host does; here it does not.
    """
    runs, devices = {name: [] for name in models}, {}
    with _ready(models, inputs, rounds, warmup, autocast_dtype, graph) as timed:
        repeats = {name: _warm_up(forward, device, 0, run_seconds) for name, (forward, device, _) in timed.items()}
        for _ in range(rounds):
            for name, (forward, device, _) in timed.items():
                runs[name] += [1e3 * _seconds(forward, device, 1) for _ in range(repeats[name])]
                devices[name] = str(device)
    return {
        name: Latency(ms=median, low=low, high=high, device=devices[name])
        for name, (low, median, high) in ((name, _quartiles(times)) for name, times in runs.items())
    }


def measure_peak_memory(model, inputs: dict | Callable, *, autocast_dtype: torch.dtype | None = None) -> int | None:
    """Bytes that inference needs: the weights, plus what one forward of `inputs` takes at its peak on top.

    The inputs and everything else in the process are left out. None where the peak cannot be read: see `peak_above`.
    """
    with inference(model, _inputs_for(model, inputs), autocast_dtype) as forward:
        forward()  # libraries allocate their workspaces at the first call and keep them
        peak = peak_above(forward, place_of(model)[0])
    return None if peak is None else weight_bytes(model) + peak


def peak_above(function: Callable, device: torch.device) -> int | None:
    """Bytes that a call of `function` takes at its peak, above what is held before it.

    CUDA: the allocator's own exact count. CPU (Linux): the process's peak resident memory less what it held before, so
    pages, rounded by the kernel, and only while no other thread allocates. None where neither can be read: not known,
    which is not 0.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu" and _reset_peak_resident():
        before = _resident_bytes("VmRSS")
        function()
        return max(_resident_bytes("VmHWM") - before, 0)
    return None


# ---- all of them ----
class OutOfMemory(ValueError):
    """A batch did not fit; the message says which."""


@dataclass(frozen=True)
class Workload:
    """One kind of forward, and what its speed is called."""

    speed: str
    """Such as "images/s"."""
    latency: str
    """Such as "latency, ms"."""
    items_each: int
    """Images or tokens in one entry of the batch."""
    inputs: dict | Callable


def benchmark(
    models: dict,
    *,
    device: torch.device | str = "cpu",
    batch_sizes: list[int] | None = None,
    seq_len: int = 256,
    rounds: int = 10,
    autocast_dtype: torch.dtype | None = None,
    compiled: bool = False,
    graph: bool = False,
) -> list[dict]:
    """Speed, latency and memory of models of one kind, taking turns on `device`, where they are moved.

    models: image classifiers or causal language models by name, the one to compare with first.
    batch_sizes: of throughput and memory; default `default_batch_size`. Latency is that of a batch of 1.
    seq_len: tokens of a language model's prompt. compiled: torch.compile each block, for good. graph: CUDA graphs.
    Memory is that of an ordinary forward; a CUDA graph keeps a copy of its own.

    Returns a row for each measurement and model: {measure, batch_size, model, value, low, high, times_better}. low and
    high are quartiles, None for memory; value is None where it cannot be measured; times_better is how many times
    faster, or smaller, than the first model. Raises ValueError for models of different kinds and settings that cannot
    be, OutOfMemory (a ValueError) naming the batch that did not fit.
    """
    device = torch.device(device)
    check_settings(batch_sizes=batch_sizes, seq_len=seq_len, rounds=rounds)
    _check_kinds(models)
    if graph and device.type != "cuda":
        raise ValueError("A CUDA graph needs a CUDA device.")
    turns = {"autocast_dtype": autocast_dtype, "rounds": rounds, "graph": graph}
    rows = []

    def add(measure, batch, results, less_is_better=False):
        base = next(iter(results.values()))[0]
        for name, (value, low, high) in results.items():
            better = None
            if value and base:
                better = base / value if less_is_better else value / base
            rows.append(
                {"measure": measure, "batch_size": batch, "model": name}
                | {"value": value, "low": low, "high": high, "times_better": better}
            )

    with _explained("The models do not fit into memory."):
        for model in models.values():
            model.to(device)
            if compiled:
                compile_blocks_(model)
    for batch in batch_sizes or [default_batch_size(next(iter(models.values())))]:
        with _explained(f"A batch of {batch} does not fit into memory; choose a smaller one.", compiled, graph):
            works = _workloads(models, batch, seq_len)
            # Memory first: what does not fit shows before the minutes of timing, and no graph holds any yet.
            peaks = {
                name: (measure_peak_memory(model, works[0].inputs, autocast_dtype=autocast_dtype), None, None)
                for name, model in models.items()
            }
            for work in works:
                timings = compare_throughput(models, work.inputs, items_each=work.items_each, **turns)
                add(work.speed, batch, {name: (t.items_per_s, t.low, t.high) for name, t in timings.items()})
            add(PEAK_MEMORY, batch, peaks, less_is_better=True)
    with _explained("A batch of 1 does not fit into memory.", compiled, graph):
        for work in _workloads(models, 1, seq_len):
            latencies = compare_latency(models, work.inputs, **turns)
            results = {name: (t.ms, t.low, t.high) for name, t in latencies.items()}
            add(work.latency, 1, results, less_is_better=True)
    return rows


def default_batch_size(model) -> int:
    """Images or sequences at a time that keep the model's device busy."""
    return MEASURED_BATCH.get(place_of(model)[0].type, MEASURED_BATCH["cpu"])[model.main_input_name]


def device_name(device: torch.device) -> str:
    """What a table calls the device: the GPU's name, or the CPU's threads and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of Python and of the packages that speed depends on."""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__, "mamba_rsst": __version__}
    return {"python": platform.python_version()} | packages


def check_settings(*, batch_sizes: list[int] | None = None, seq_len: int = 1, rounds: int = 1) -> None:
    """Raise ValueError for one that is below 1."""
    for name, value in (("batch size", min(batch_sizes or [1])), ("sequence length", seq_len), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"The {name} must be at least 1, got {value}.")


def _check_kinds(models) -> None:
    if not models:
        raise ValueError("There are no models to measure.")
    kinds = {name: _kind(model) for name, model in models.items()}
    if len(set(kinds.values())) > 1:
        said = ", ".join(f"{name!r} takes {kind}" for name, kind in kinds.items())
        raise ValueError(f"Models of different kinds cannot be compared: {said}.")


def _kind(model) -> str:
    """What a model takes, in words. Two models of one kind can be given the same inputs."""
    config = model.config
    if model.main_input_name == "pixel_values":
        return f"images of {config.num_channels}x{config.image_size}x{config.image_size}"
    return f"tokens of a vocabulary of {config.vocab_size}"


def _workloads(models, batch, seq_len) -> list[Workload]:
    """What to time at this batch size: images, or prefill and, where every model has a cache, decoding."""
    model = next(iter(models.values()))
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return [Workload("images/s", "latency, ms", 1, {"pixel_values": torch.randn(shape, generator=generator)})]
    ids = torch.randint(config.vocab_size, (batch, seq_len), generator=generator)

    def arguments(model) -> set:
        return set(inspect.signature(model.forward).parameters)

    def prefill(model):
        # As generate() begins: fill the cache, and compute the logits of the last token alone.
        wanted = {"use_cache": True, "logits_to_keep": 1}
        return {"input_ids": ids} | {name: wanted[name] for name in wanted.keys() & arguments(model)}

    def decode(model):
        cache = cache_name(model)
        with torch.inference_mode(), inference(model, prefill(model)) as forward:
            return {"input_ids": ids[:, -1:], cache: forward()[cache], "use_cache": True}

    works = [Workload("prefill, tokens/s", "prefill, ms", seq_len, prefill)]
    if all(cache_name(model) and "use_cache" in arguments(model) for model in models.values()):
        works.append(Workload("decode, tokens/s", "decode, ms a token", 1, decode))
    return works


def cache_name(model) -> str | None:
    """What a model's forward and its output call the cache; None for one without."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in arguments), None)


def prefill_inputs(model, batch: int, seq_len: int) -> dict | Callable:
    """Inputs of the forward that stands for a model's speed: a batch of images, or of prompts to be read in."""
    return _workloads({"model": model}, batch, seq_len)[0].inputs


@contextmanager
def _explained(too_large, compiled=False, graph=False):
    """Turn what torch says when something does not fit, or cannot be compiled or captured, into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = one_line(error, None)
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # The CPU's allocator raises a plain RuntimeError, and inductor wraps what it met.
        if full or any(words in text for words in ("out of memory", "allocate memory", "not enough memory")):
            raise OutOfMemory(too_large) from error
        if compiled or graph:
            how = " and ".join(["compiled"] * compiled + ["captured in a CUDA graph"] * graph)
            raise ValueError(f"The forward cannot be {how}: {text[:300]}") from error
        raise


# ---- running ----
def _inputs_for(model, inputs) -> dict:
    return inputs(model) if callable(inputs) else inputs


@contextmanager
def _ready(models, inputs, rounds, warmup, autocast_dtype, graph):
    """Yield {name: (forward, device, batch size)} of models that have been warmed up."""
    if not models or rounds < 1:
        raise ValueError(f"Nothing to time: {len(models)} models, `rounds` = {rounds}.")
    with ExitStack() as stack:
        ready = {}
        for name, model in models.items():
            own, device = _inputs_for(model, inputs), place_of(model)[0]
            forward = stack.enter_context(inference(model, own, autocast_dtype))
            for _ in range(warmup):
                forward()
            ready[name] = (capture(forward, device) if graph else forward, device, batch_size_of(own))
        yield ready


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


def _timing(runs: list[float], batch, items_each, device) -> Timing:
    low, median, high = _quartiles([batch * items_each / seconds for seconds in runs])
    return Timing(items_per_s=median, low=low, high=high, batch_size=batch, device=str(device))


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


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
