"""The convolution with its SiLU against a loop in float64: plain, in Triton's interpreter, and on a GPU.

The interpreter is chosen by an environment variable when triton is imported, so its cases run in a process of their
own: this very file as a program, which prints the errors of every case as JSON.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}

# B, L, E, K and the directions, all sizes different; then what departs from `errors`' defaults.
CASES = {
    "both ways, a half of a wider tensor": ((2, 17, 5, 4, (False, True)), {"wide": True}),
    "one step": ((3, 1, 2, 4, (True, False)), {}),
    "shorter than the taps": ((2, 3, 7, 5, (False,)), {}),
    "two blocks of channels, backwards, no bias": ((3, 2, 130, 3, (True,)), {"bias": False}),
    "several tiles of rows": ((3, 23, 6, 2, (True, True)), {"wide": True}),
    "one step, other strides": ((3, 1, 5, 4, (False, True)), {"turned": True}),
    "other strides": ((3, 4, 5, 2, (False, True)), {"turned": True}),
    "one tap": ((2, 4, 3, 1, (False, True)), {}),
    "with a past": ((2, 5, 3, 4, (False,)), {"past": 6}),
    "bfloat16": ((2, 19, 9, 4, (False, True)), {"dtype": "bfloat16", "wide": True}),
    "float16": ((2, 19, 9, 4, (False, True)), {"dtype": "float16"}),
}
GPU_CASES = CASES | {
    "CIFAR": ((3, 65, 384, 4, (False, True)), {"dtype": "bfloat16", "wide": True}),
    "pruned": ((2, 100, 230, 4, (True, False)), {}),
    "long": ((1, 5000, 112, 4, (False,)), {"wide": True}),
}


def loop(x, taps, bias, reverse, past):
    """The definition, one step and tap at a time."""
    (B, L, E), K = x.shape, taps.shape[1]
    outs = []
    for g, backwards in enumerate(reverse):
        line = x.flip(1) if backwards else x
        before = x.new_zeros(B, K - 1, E)
        if past is not None:
            before = past[..., past.shape[-1] - (K - 1) :].transpose(1, 2)
        line = torch.cat([before, line], 1)
        steps = [sum(line[:, t + k] * taps[g, k] for k in range(K)) for t in range(L)]
        y = torch.stack(steps, 1)
        y = y if bias is None else y + bias[g]
        y = y / (1 + torch.exp(-y))
        outs.append(y.flip(1) if backwards else y)
    return torch.stack(outs)


def errors(function, sizes, device="cpu", dtype="float32", wide=False, bias=True, past=None, turned=False):
    """Relative errors of the output and of every gradient."""
    B, L, E, K, reverse = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    dtype = getattr(torch, dtype)
    leaf = draw(B, L, 2 * E if wide else E).to(device, dtype).requires_grad_()
    small = torch.float64 if dtype == torch.float64 else torch.float32
    taps = draw(len(reverse), K, E).to(device, small).requires_grad_()
    b = draw(len(reverse), E).to(device, small).requires_grad_() if bias else None
    before = None if past is None else draw(B, E, past).to(device, dtype)
    leaves = [x for x in (leaf, taps, b) if x is not None]
    given = leaf[..., :E]
    if turned:  # laid out (B, E, L)
        given = leaf.transpose(1, 2).contiguous().transpose(1, 2)
    u = function(given, taps, b, reverse, before)
    assert u.shape == (len(reverse), B, L, E) and u.dtype == dtype
    du = draw(*u.shape).to(device, dtype)
    grads = torch.autograd.grad(u, leaves, du)
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, leaves))

    exact = [x.detach().double().requires_grad_() for x in leaves]
    before = None if past is None else before.double()
    wanted = loop(exact[0][..., :E], exact[1], exact[2] if bias else None, reverse, before)
    exact_grads = torch.autograd.grad(wanted, exact, du.double())
    pairs = zip(("u", "dx", "dtaps", "dbias"), (u, *grads), (wanted, *exact_grads))
    return {n: ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for n, a, b in pairs}


def assert_small(found, dtype):
    too_large = {name: error for name, error in found.items() if not error < TOLERANCE[dtype]}
    assert not too_large


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_interpreter_matches_float64(interpreted, case):
    assert_small(interpreted[case], CASES[case][1].get("dtype", "float32"))


@pytest.mark.parametrize("case", CASES)
def test_plain_torch_matches_float64(case):
    from mamba_rsst.models.causal_conv1d import causal_conv1d_silu

    sizes, options = CASES[case]
    options = {"dtype": "float64"} | options
    assert_small(errors(causal_conv1d_silu, sizes, **options), options["dtype"])


class _Elsewhere(torch.Tensor):
    """A CPU tensor that says it is not."""

    @property
    def device(self):
        return torch.device("meta")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_plain_form_for_accelerators(length, backwards):
    """The shifted products, which run where Triton is not installed."""
    from mamba_rsst.models.causal_conv1d import _convolve

    x, taps, bias = torch.randn(2, length, 5), torch.randn(4, 5), torch.randn(5)
    for b in (bias, None):
        out = torch.Tensor(_convolve(_Elsewhere(x), taps, b, backwards))
        torch.testing.assert_close(out, _convolve(x, taps, b, backwards))


def test_flops_are_those_of_the_plain_form(monkeypatch):
    from mamba_rsst.models import causal_conv1d

    x, taps = torch.randn(2, 9, 5), torch.randn(2, 4, 5)
    with FlopCounterMode(display=False) as plain:
        causal_conv1d.causal_conv1d_silu(x, taps, None, (False, True))
    formula = flop_registry[torch.ops.mamba_rsst.causal_conv1d_silu]
    assert formula(x, taps, None, 2, out_val=x) == plain.get_total_flops() == 2 * 2 * 2 * 9 * 5 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu_matches_float64(case):
    from mamba_rsst.models.causal_conv1d import causal_conv1d_silu

    sizes, options = GPU_CASES[case]
    assert_small(errors(causal_conv1d_silu, sizes, device="cuda", **options), options.get("dtype", "float32"))


@pytest.mark.gpu
def test_gpu_compiles_without_breaks():
    from mamba_rsst.models.causal_conv1d import causal_conv1d_silu

    compiled = torch.compile(causal_conv1d_silu, fullgraph=True)
    assert_small(errors(compiled, *GPU_CASES["CIFAR"][:1], device="cuda", **GPU_CASES["CIFAR"][1]), "bfloat16")


if __name__ == "__main__":
    from mamba_rsst.models import causal_conv1d as module

    assert module._fused(torch.ones(1))
    print(json.dumps({name: errors(module.causal_conv1d_silu, *case[:1], **case[1]) for name, case in CASES.items()}))
