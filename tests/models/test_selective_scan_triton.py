"""The Triton kernels against a float64 loop: in Triton's interpreter here, on the GPU where there is one.

The interpreter is chosen by an environment variable when triton is imported, so its cases run in a process of their
own: this very file as a program, which prints the errors of every case as JSON.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SOURCE = Path(__file__).parents[2] / "mamba_rsst" / "models" / "selective_scan_triton.py"
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
TOLERANCE = {"float32": 5e-6, "bfloat16": 5e-3, "float16": 6e-4}  # y, du, ... are rounded once to u.dtype

# All sizes differ, so that no axis hides. G, B, L, E, N, reverse mask; then what departs from `errors`' defaults.
CASES = {
    "one step, one channel, one state": ((1, 1, 1, 1, 1, 0), {}),
    "one whole chunk": ((1, 1, 8, 7, 4, 0), {}),
    "two directions, odd length": ((2, 1, 17, 7, 5, 0b10), {}),
    "two blocks of channels, bare": ((1, 2, 9, 70, 3, 1), {"options": False, "last": False}),
    "no softplus, both backwards": ((2, 1, 9, 3, 2, 0b11), {"softplus": False}),
    "large time steps, two groups of states": ((2, 1, 9, 3, 20, 1), {"shift": 5.0}),
    "tiny time steps": ((1, 1, 11, 5, 3, 0), {"shift": -14.0}),
    "bfloat16": ((2, 1, 10, 3, 4, 1), {"dtype": "bfloat16"}),
    "float16, a block with one channel": ((1, 1, 10, 65, 4, 1), {"dtype": "float16"}),
    "one input, two directions; strides": ((2, 2, 5, 6, 3, 0b10), {"strides": True}),
    "segments": ((2, 1, 29, 7, 4, 0b01), {"segmented": True}),
    "segments, two groups of states, bare": (
        (1, 1, 19, 2, 20, 1),
        {"segmented": True, "options": False, "last": False},
    ),
}
GPU_CASES = {
    "CIFAR": ((2, 3, 65, 384, 16, 0b10), {}),
    "CIFAR, bfloat16": ((2, 3, 65, 384, 16, 0b10), {"dtype": "bfloat16"}),
    "pruned": ((2, 2, 100, 230, 7, 0b01), {}),
    "many states": ((1, 2, 9, 112, 256, 0), {}),
    "long": ((1, 1, 1030, 64, 16, 0), {}),
    "long, backwards, bfloat16": ((2, 1, 517, 112, 16, 0b11), {"dtype": "bfloat16", "shift": 2.0}),
}


def load_kernels():
    spec = importlib.util.spec_from_file_location("selective_scan_triton", SOURCE)  # as remote code: one flat file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(u, delta, A, B, C, D, delta_bias, initial_state, softplus, reverse):
    ys, lasts = [], []
    for g in range(u.shape[0]):
        order = (lambda x: x.flip(1)) if reverse >> g & 1 else (lambda x: x)
        x, dt, b, c = (order(v[g]) for v in (u, delta, B, C))
        dt = dt if delta_bias is None else dt + delta_bias[g]
        dt = torch.nn.functional.softplus(dt, threshold=50) if softplus else dt
        h = x.new_zeros(x.shape[0], *A.shape[1:]) if initial_state is None else initial_state[g]
        steps = []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A[g]) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            steps.append((h * c[:, t, None]).sum(-1) + (0 if D is None else D[g] * x[:, t]))
        ys.append(order(torch.stack(steps, 1)))
        lasts.append(h)
    return torch.stack(ys), torch.stack(lasts)


def errors(
    kernels,
    sizes,
    device="cpu",
    dtype="float32",
    softplus=True,
    shift=-2.0,
    options=True,
    last=True,
    strides=False,
    segmented=False,
):
    """Relative errors of the outputs and of every gradient."""
    G, Z, L, E, N, reverse = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    u = draw(Z, L, E).expand(G, Z, L, E) if strides else draw(G, Z, L, E)
    delta = draw(G, Z, E, L).transpose(2, 3) if strides else draw(G, Z, L, E)
    B, C = (draw(Z, G, L, N).transpose(0, 1) for _ in range(2))
    delta = delta + shift if softplus else delta.abs() * 0.1
    A = -torch.arange(1.0, N + 1) * (1 + 0.1 * draw(G, E, N).clamp(-3, 3))
    extras = [draw(G, E), 0.1 * draw(G, E).abs(), draw(G, Z, E, N)] if options else [None] * 3
    dtype = getattr(torch, dtype)
    inputs = [x.to(device, dtype) for x in (u, delta)] + [A.to(device)] + [x.to(device, dtype) for x in (B, C)]
    inputs += [None if x is None else x.to(device) for x in extras]
    dy = draw(G, Z, L, E).to(device, dtype)
    dlast = draw(G, Z, E, N).to(device) if last else None

    chosen = kernels.SHORTEST_SEGMENT
    kernels.SHORTEST_SEGMENT = 1 if segmented else chosen
    try:
        y, last_state, states = kernels.scan_forward(*inputs, softplus, reverse, True)
        y_alone, _, none = kernels.scan_forward(*inputs, softplus, reverse, False)
        grads = kernels.scan_backward(dy, dlast, *inputs, states, softplus, reverse)
    finally:
        kernels.SHORTEST_SEGMENT = chosen
    assert torch.equal(y, y_alone) and none.numel() == 0
    assert states.shape == kernels.states_shape(G, Z, L, E, N) and states.dtype == torch.float32
    assert y.dtype == dtype and last_state.dtype == torch.float32
    assert all((g is None) == (x is None) for g, x in zip(grads, inputs))
    assert all(g.is_contiguous() and g.dtype == x.dtype for g, x in zip(grads, inputs) if x is not None)

    exact = [None if x is None else x.double().contiguous().requires_grad_() for x in inputs]
    y_exact, last_exact = reference(*exact, softplus, reverse)
    loss = (y_exact * dy.double()).sum() + (0 if dlast is None else (last_exact * dlast.double()).sum())
    exact_grads = torch.autograd.grad(loss, [x for x in exact if x is not None])
    names = [name for name, x in zip(NAMES, exact) if x is not None]
    pairs = {"y": (y, y_exact), "last_state": (last_state, last_exact)}
    pairs |= {f"d{n}": p for n, p in zip(names, zip((g for g in grads if g is not None), exact_grads))}
    assert all(a.shape == b.shape for a, b in pairs.values())
    return {n: ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for n, (a, b) in pairs.items()}


def assert_small(found, dtype="float32"):
    too_large = {name: error for name, error in found.items() if not error < TOLERANCE[dtype]}
    assert not too_large


def in_new_process(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    return in_new_process(__file__, TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", CASES)
def test_interpreter_matches_float64(interpreted, case):
    assert_small(interpreted[case], CASES[case][1].get("dtype", "float32"))


def test_imports_and_explains_itself_without_triton():
    program = f"""
import importlib.util, json, sys
sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location("kernels", {str(SOURCE)!r})
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
print(json.dumps([kernels.unusable("cuda"), kernels.states_shape(2, 3, 9, 7, 5)]))
"""
    reason, shape = in_new_process("-c", program)
    assert "triton" in reason
    assert shape == [2, 3, 2, 2, 7, 4]


def test_unusable_on_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cpu" in load_kernels().unusable("cpu")


@pytest.mark.parametrize("programs", (1, 24, 192, 1024, 5000))
@pytest.mark.parametrize("length", (1, 65, 130, 2048, 100_003))
def test_segments_cover_time_exactly_once(programs, length):
    kernels = load_kernels()
    segments, segment_chunks = kernels._segments(programs, length)
    chunks = -(-length // kernels.CHUNK)
    assert (segments - 1) * segment_chunks < chunks <= segments * segment_chunks
    assert segments == 1 or segment_chunks >= kernels.SHORTEST_SEGMENT


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*CASES, *GPU_CASES])
def test_gpu_matches_float64(case):
    pytest.importorskip("triton")
    sizes, changes = {**CASES, **GPU_CASES}[case]
    assert_small(errors(load_kernels(), sizes, device="cuda", **changes), changes.get("dtype", "float32"))


@pytest.mark.gpu
@needs_gpu
def test_gpu_gives_the_same_bits_twice_and_beyond_2_to_the_31():
    """The last sequences of a batch of 2.2e9 elements against the same two alone. Takes about 30 GB."""
    pytest.importorskip("triton")
    if torch.cuda.mem_get_info()[0] < 50e9:
        pytest.skip("needs 50 GB of free GPU memory")
    kernels = load_kernels()
    G, Z, L, E, N = 1, 16500, 65, 2048, 4
    u, delta = (torch.randn(G, Z, L, E, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    B = torch.randn(G, Z, L, N, device="cuda", dtype=torch.bfloat16)
    A = -torch.rand(G, E, N, device="cuda") - 0.5

    def run(sequences):
        inputs = (u[:, sequences], delta[:, sequences], A, B[:, sequences], B[:, sequences], None, None, None)
        y, last_state, states = kernels.scan_forward(*inputs, True, 1, True)
        du, ddelta, dA, dB, dC, *_ = kernels.scan_backward(y, None, *inputs, states, True, 1)
        return dA, [x[:, -2:].clone() for x in (y, last_state, du, ddelta, dB, dC)]

    dA, whole = run(slice(None))
    dA_again, again = run(slice(None))
    _, alone = run(slice(-2, None))
    assert torch.equal(dA, dA_again)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, again, alone))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({case: errors(load_kernels(), sizes, **changes) for case, (sizes, changes) in CASES.items()}))
