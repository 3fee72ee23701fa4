"""CUDA graphs of what repeats: recorded once, then replayed, so that launching the kernels costs nothing."""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GraphedStep:
    """Replays `step`, one forward and backward of fixed shapes, as a CUDA graph.

    step: inputs, a dict of tensors -> detached loss; adds the gradients of `parameters` to their `.grad`. It may ask
    the device for nothing (no `.item()`, no copy from the CPU): PyTorch's rules for capturing, see
    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

    Called like `step`. The first `WARMUP` calls of any shapes run as they are (they compile and tune), and the shapes
    that first come once more are recorded. From then on inputs of those shapes are replayed; others, such as an
    epoch's last, smaller batch, run as they are. The parameters may change in place between calls, but must not be
    replaced: make a new GraphedStep then.
    Raises RuntimeError where the step cannot be captured.
    """

    WARMUP = 2

    def __init__(self, step: Callable[[dict], Tensor], parameters: list[nn.Parameter]):
        self.step = step
        self.parameters = [p for p in parameters if p.requires_grad]
        self._calls = Counter()  # by shapes
        self._recorded = None
        self._graph = None
        self._inputs: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        for name, x in inputs.items():
            if not isinstance(x, Tensor):
                raise ValueError(f"A recorded step takes tensors alone; {name!r} is a {type(x).__name__}.")
        shapes = tuple((name, x.shape, x.dtype) for name, x in sorted(inputs.items()))
        if self._recorded is None and self._calls[shapes] >= self.WARMUP:
            self._record(inputs)
            self._recorded = shapes
        self._calls[shapes] += 1
        if self._recorded is None:
            return self._run_beside(inputs)
        if shapes != self._recorded:
            return self.step(inputs)
        for p, gradient in zip(self.parameters, self._gradients):
            if gradient is not None and p.grad is gradient:  # an earlier micro-batch's: the replay will write over it
                p.grad = gradient.clone()
        for name, x in self._inputs.items():
            x.copy_(inputs[name])
        self._replay()
        self._hand_over()
        return self._loss.clone()

    def _run_beside(self, inputs):
        return _beside(lambda: self.step(inputs))

    def _record(self, inputs):
        before = [p.grad for p in self.parameters]  # of earlier micro-batches
        for p in self.parameters:
            p.grad = None  # so that the backward writes its own tensors instead of adding to these
        self._inputs = {name: x.clone() for name, x in inputs.items()}
        try:
            self._capture()
        except RuntimeError as error:
            raise RuntimeError(f"The training step cannot be recorded as a CUDA graph: {error}") from error
        self._gradients = [p.grad for p in self.parameters]
        for p, gradient in zip(self.parameters, before):
            p.grad = gradient

    def _capture(self):
        with _recording() as self._graph:
            self._loss = self.step(self._inputs)

    def _replay(self):
        self._graph.replay()

    def _hand_over(self):
        """Give the parameters the gradients of the replay: as they are, or added to those of earlier micro-batches."""
        sums, parts = [], []
        for p, gradient in zip(self.parameters, self._gradients):
            if gradient is None:
                continue
            if p.grad is None:
                p.grad = gradient
            else:
                sums.append(p.grad)
                parts.append(gradient)
        if sums:
            torch._foreach_add_(sums, parts)


def capture(function: Callable, device: torch.device | str = "cuda", warmup: int = 3, pool=None) -> Callable:
    """`function` as a CUDA graph; returns its replay, which works on the same tensors each time.

    Captured after `warmup` calls on a stream of its own, which compile kernels and fill libraries' workspaces.
    """

    def warm_up():
        for _ in range(warmup):
            function()

    with torch.cuda.device(device):
        _beside(warm_up)
        with _recording(pool) as graph:
            function()

    def replay(kept_alive=function):  # the tensors that the graph reads hang on the function
        graph.replay()

    return replay


def _beside(function: Callable):
    """`function()`, on a stream of its own, as what is to be captured has to be warmed up."""
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = function()
    here.wait_stream(stream)
    return result


@contextmanager
def _recording(pool=None):
    """Yields the graph that what runs inside is captured into."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a loader's thread may pin memory
        yield graph
