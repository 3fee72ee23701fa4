"""nn.Linear whose products on the CPU go through oneDNN where that is the faster library."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# oneDNN's product, as torch.compile's CPU back end calls it; None where torch has no MKL to be replaced, or no oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
    _ONEDNN = None
_PLAIN = (Tensor, nn.Parameter)
# A call of oneDNN's costs some microseconds more. It pays with this many weights, whose reading a few rows wait for,
_LEAST_WEIGHTS = 1 << 17
_LEAST_PRODUCTS = 1 << 20  # or with this many multiply-accumulates.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; in fp32 on the CPU, without gradients and eager, larger products are oneDNN's.

    MKL's, which torch calls for fp32, use half the vector width of AMD's cores and read the weights of a single row on
    one core: measured 1.5 to 3 times slower there (benchmarks/bench_decode.py).
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_pays(x, weight):
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _onednn_pays(x, weight):
    return (
        _ONEDNN is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN  # a subclass (quantised, sharded) has a product of its own
        and weight.dtype == torch.float32
        and x.dim() > 1
        and x.numel() > 0
        and (weight.numel() >= _LEAST_WEIGHTS or x.numel() * weight.shape[0] >= _LEAST_PRODUCTS)  # rows * in * out
        and not torch.is_autocast_enabled("cpu")
    )


def _register_flops():
    """Tell torch.utils.flop_counter what oneDNN's product costs: two FLOPs a multiply-accumulate, as F.linear's."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if _ONEDNN is not None and _ONEDNN not in flop_registry:  # an earlier copy of this file may have done so
        register_flop_formula(_ONEDNN)(lambda x, weight, *args, **kwargs: 2 * math.prod(x) * weight[0])


_register_flops()


class CpuLinear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


__all__ = ["CpuLinear", "linear"]
