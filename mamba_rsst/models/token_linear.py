"""nn.Linear for models that also run token by token."""

import torch
from torch import Tensor, nn


# oneDNN's product, as torch.compile's CPU back end calls it; None where torch has no MKL to be replaced, or no oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
    _ONEDNN = None
_MOST_ROWS = 32
_LEAST_WEIGHTS = 1 << 17  # a call of oneDNN's costs some microseconds more


class TokenLinear(nn.Linear):
    """nn.Linear. With one token a sequence, fp32 on the CPU without gradients, the product is oneDNN's.

    Such a product is as fast as the weights come from memory, and MKL's, which torch calls for fp32, reads them on one
    core, and on AMD's with half the vector width: measured 1.5 to 3 times slower (benchmarks/bench_decode.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        one = x.dim() == 2 or (x.dim() == 3 and x.shape[1] == 1)
        if one and x.dtype == torch.float32 and x.device.type == "cpu" and self._pays(x):
            return _ONEDNN(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

    def _pays(self, x):
        return (
            _ONEDNN is not None
            and 0 < x.shape[0] <= _MOST_ROWS
            and self.weight.dtype == torch.float32
            and self.weight.numel() >= _LEAST_WEIGHTS
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()  # whose CPU back end takes this op for frozen weights only
        )


__all__ = ["TokenLinear"]
