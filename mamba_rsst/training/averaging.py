"""An exponential moving average of the weights: evaluated, and in the end kept, in the place of the last weights."""

import contextlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback


class WeightAverage(TrainerCallback):
    """After step t of a stage: average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)).

    The warm-up of d is that of TensorFlow's ExponentialMovingAverage and of diffusers' EMAModel: without it the
    weights that the stage began with would weigh decay^t, most of the average of a short run.

    It averages what is trained; a model of this package has no buffers that training changes. Averages are kept in
    fp32 at least, since in bf16 small steps are rounded away. Nothing is copied from the device, and the parameters
    are only ever changed in place, so that recorded and compiled steps stay valid.
    """

    FILE = "averages.safetensors"
    """In every checkpoint of a stage that averages. The plain weights, which training goes on from, lie beside it."""

    def __init__(self, decay: float):
        self.decay = decay
        self.stop()

    def start(self, model, checkpoint: str | None = None) -> None:
        """Average from the model's weights on, or where `checkpoint` is given from the averages in it."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._parameters = list(named), list(named.values())
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self._parameters]
        self._averages = [p.detach().to(dtype, copy=True).contiguous() for p, dtype in zip(self._parameters, wide)]
        self._narrow = any(p.dtype != average.dtype for p, average in zip(self._parameters, self._averages))
        if checkpoint is not None:
            self.load(checkpoint)

    def stop(self) -> None:
        """Forget the averages, and with them the parameters."""
        self._names, self._parameters, self._averages, self._narrow = [], [], [], False

    def save(self, folder: str) -> None:
        if self._averages:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(dict(zip(self._names, self._averages)), Path(folder) / self.FILE)

    def load(self, folder: str) -> None:
        saved = load_file(Path(folder) / self.FILE)
        torch._foreach_copy_(self._averages, [saved[name].to(self._averages[0].device) for name in self._names])

    @contextlib.contextmanager
    def in_place(self):
        """Inside, the model has the averaged weights; afterwards its own again, to the bit. Nothing if not started."""
        if not self._averages:
            yield
            return
        own = [p.detach().clone() for p in self._parameters]
        self._set(self._averages)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values) -> None:
        torch._foreach_copy_(self._parameters, values)

    # ---- Trainer's events, while a stage that averages runs --------------------------------------------------------

    def on_step_end(self, args, state, control, **kwargs):
        if self._averages:
            t, weights = state.global_step, self._parameters
            if self._narrow:
                weights = [p.detach().to(average.dtype) for p, average in zip(weights, self._averages)]
            update = get_ema_multi_avg_fn(min(self.decay, (1 + t) / (10 + t)))
            update(self._averages, weights, None)

    def on_train_end(self, args, state, control, **kwargs):
        """The average becomes the model; with `load_best_model_at_end`, the average of the best checkpoint."""
        if self._averages:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self.load(state.best_model_checkpoint)
            self._set(self._averages)
            self.stop()
