"""The back end on mamba_ssm's kernels: here on a stand-in for its compiled module, on a GPU on the module itself.

The stand-in has the module's signatures, refuses what the module refuses, and computes in float64.
"""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mamba_rsst.models import selective_scan
from mamba_rsst.models import selective_scan_mamba_ssm as backend


scan_module = importlib.import_module("mamba_rsst.models.selective_scan")  # the package's attribute is the function
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
SIZES = (1, 2, 17, 5, 3)  # G, B, L, E, N
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # everything is rounded once


class StandIn:
    """fwd and bwd of mamba_ssm 2.3's `selective_scan_cuda`, with `chunk` steps between two saved states."""

    def __init__(self, chunk):
        self.chunk = chunk
        self.calls = []

    def check(self, u, delta, A, B, C, D, z, delta_bias):
        Z, E, L = u.shape
        N = A.shape[1]
        assert delta.shape == u.shape and A.shape == (E, N) and B.shape == C.shape == (Z, 1, N, L)
        assert u.dtype == delta.dtype == B.dtype == C.dtype and u.dtype in TOLERANCE
        assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (u, delta, B, C))  # vector loads
        assert z is None
        for x in (A, D, delta_bias):
            assert x is None or (x.dtype == torch.float32 and x.is_contiguous())
        assert all(x is None or x.shape == (E,) for x in (D, delta_bias))

    def states(self, u, delta, A, B, delta_bias, softplus):
        """float64: raw time step, time step (Z,E,L), decays and states (Z,E,N,L)."""
        raw = delta.double() if delta_bias is None else delta.double() + delta_bias.double()[:, None]
        dt = F.softplus(raw) if softplus else raw
        decay = torch.exp(dt[:, :, None] * A.double()[..., None])
        inputs = (dt * u.double())[:, :, None] * B.double()
        h, hs = torch.zeros_like(inputs[..., 0]), []
        for t in range(u.shape[2]):
            h = decay[..., t] * h + inputs[..., t]
            hs.append(h)
        return raw, dt, decay, torch.stack(hs, -1)

    def saved(self, decay, hs):
        ends = [min(s + self.chunk, hs.shape[-1]) - 1 for s in range(0, hs.shape[-1], self.chunk)]
        pairs = torch.stack([decay.cumprod(-1)[..., ends], hs[..., ends]], -1)  # (Z, E, N, chunks, 2)
        return pairs.transpose(2, 3).flatten(3).float().contiguous()

    def fwd(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        self.calls.append("fwd")
        self.check(u, delta, A, B, C, D, z, delta_bias)
        _, _, decay, hs = self.states(u, delta, A, B, delta_bias, delta_softplus)
        y = (hs * C.double()).sum(2)
        y = y if D is None else y + D.double()[:, None] * u.double()
        return [torch.empty_like(delta).copy_(y), self.saved(decay, hs)]

    def bwd(self, u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        self.calls.append("bwd")
        self.check(u, delta, A, B, C, D, z, delta_bias)
        assert dout.dtype == u.dtype and dout.shape == u.shape and dout.is_contiguous()
        assert out is None and dz is None and recompute_out_z is False
        raw, dt, decay, hs = self.states(u, delta, A, B, delta_bias, delta_softplus)
        assert x.is_contiguous() and torch.equal(x, self.saved(decay, hs)), "what the forward saved"
        u64, A64, B64, g = u.double(), A.double()[..., None], B.double(), dout.double()
        dh = C.double() * g[:, :, None]
        for t in range(u.shape[2] - 2, -1, -1):
            dh[..., t] += decay[..., t + 1] * dh[..., t + 1]
        through_decay = dh * decay * F.pad(hs, (1, 0))[..., :-1]
        ddtx = (dh * B64).sum(2)
        ddt = ddtx * u64 + (through_decay * A64).sum(2)
        draw = ddt * torch.sigmoid(raw) if delta_softplus else ddt
        du = ddtx * dt + (0 if D is None else g * D.double()[:, None])
        dA = (through_decay * dt[:, :, None]).sum((0, 3))
        dB, dC = ((dh * (dt * u64)[:, :, None]).sum(1, keepdim=True), (hs * g[:, :, None]).sum(1, keepdim=True))
        dD = None if D is None else (g * u64).sum((0, 2)).float()
        dbias = None if delta_bias is None else draw.sum((0, 2)).float()
        return [*(v.to(u.dtype) for v in (du, draw)), dA.float(), *(v.to(u.dtype) for v in (dB, dC)), dD, dbias]


@pytest.fixture(autouse=True)
def forgotten():
    backend._load.cache_clear()
    yield
    backend._load.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in that the back end finds, and takes CPU tensors for CUDA ones."""
    stand_in = StandIn(chunk=8)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", stand_in)
    monkeypatch.setattr(backend, "CHUNK", stand_in.chunk)
    monkeypatch.setattr(scan_module, "mamba_ssm_unusable", lambda device_type, *call: backend.unusable("cuda", *call))
    return stand_in


def make_inputs(sizes=(2, 2, 17, 5, 3), dtype=torch.float32, device="cpu", absent=(), softplus=True):
    G, Z, L, E, N = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    delta = normal(G, Z, L, E)
    bias = normal(G, E)
    inputs = {
        "u": normal(G, Z, L, E).to(dtype),
        "delta": (delta - 1 if softplus else 0.1 * delta.abs()).to(dtype),
        "A": -torch.exp(0.5 * normal(G, E, N)),
        "B": normal(G, Z, L, N).to(dtype),
        "C": normal(G, Z, L, N).to(dtype),
        "D": normal(G, E),
        "delta_bias": bias if softplus else 0.1 * bias.abs(),
    }
    return {k: None if k in absent else v.to(device).requires_grad_() for k, v in inputs.items()}


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)).item()


def compare(inputs, reverse, tolerance, softplus=True, scan=selective_scan):
    """y, the last state and every gradient through y, against the loop over time in float64."""
    present = {k: v for k, v in inputs.items() if v is not None}
    exact = {k: v.detach().double().requires_grad_() for k, v in present.items()}
    options = dict(delta_softplus=softplus, reverse=reverse, return_last_state=True)
    y, last = scan(**present, **options, implementation="mamba_ssm")
    expected, expected_last = selective_scan(**exact, **options, implementation="reference")
    assert y.shape == expected.shape and y.dtype == inputs["u"].dtype and y.is_contiguous()
    assert last.shape == expected_last.shape and last.dtype == torch.float32
    dy = torch.randn_like(y).mT.contiguous().mT
    grads = torch.autograd.grad(y, list(present.values()), dy)
    wanted = torch.autograd.grad(expected, list(exact.values()), dy.double())
    found = {"y": relative(y, expected), "last state": relative(last, expected_last)}
    for (name, x), grad, want in zip(present.items(), grads, wanted):
        assert grad.shape == x.shape and grad.dtype == x.dtype, name
        found[f"gradient of {name}"] = relative(grad, want)
    assert not {name: error for name, error in found.items() if not error < tolerance}
    return found


@pytest.mark.parametrize("length", [1, 8, 9, 20])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True), (True, False, True)])
def test_directions(kernels, reverse, length):
    compare(make_inputs((len(reverse), 2, length, 5, 3)), reverse, TOLERANCE[torch.float32])
    assert kernels.calls == ["fwd"] * len(reverse) + ["bwd"] * len(reverse)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 1, 9, 1, 4), (2, 3, 9, 4, 1)])
def test_single_batch_channel_or_state(kernels, sizes):
    compare(make_inputs(sizes), (True, False)[: sizes[0]], TOLERANCE[torch.float32])


@pytest.mark.parametrize("backwards", [False, True])
def test_without_the_axis_of_directions(kernels, backwards):
    inputs = {k: v[0].detach().requires_grad_() for k, v in make_inputs().items()}
    compare(inputs, backwards, TOLERANCE[torch.float32])


@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("D", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_inputs(kernels, absent, softplus):
    compare(make_inputs(absent=absent, softplus=softplus), (False, True), TOLERANCE[torch.float32], softplus)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(kernels, dtype):
    compare(make_inputs(dtype=dtype), (True, False), TOLERANCE[dtype])


def test_mixed_dtypes_are_read_in_the_wider_one(kernels):
    """As under autocast: a time step in fp32 beside activations in bf16 is not rounded."""
    inputs = make_inputs(dtype=torch.bfloat16)
    for name, dtype in {"delta": torch.float32, "B": torch.float16, "C": torch.float64}.items():
        inputs[name] = make_inputs()[name].detach().to(dtype).requires_grad_()
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    found = compare(inputs, (False, True), TOLERANCE[torch.bfloat16])
    assert found["last state"] < 1e-6 and found["gradient of delta"] < TOLERANCE[torch.bfloat16]


def test_expanded_and_misaligned_inputs(kernels):
    """One input for both directions, without a copy; and memory at an address that vector loads cannot read."""
    inputs = make_inputs((2, 2, 8, 1, 3))  # one channel: channels first is the same memory
    inputs["u"] = inputs["u"][0].detach().expand(2, 2, 8, 1).requires_grad_()
    for name in ("delta", "B"):
        x = inputs[name].detach()
        memory = torch.empty(x.numel() + 1)[1:]
        inputs[name] = memory.view(x.shape).copy_(x).requires_grad_()
    compare(inputs, (False, True), TOLERANCE[torch.float32])


@pytest.mark.parametrize("reverse", [(True,), (False, True)])
def test_compiled(kernels, reverse):
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")

    def scan(**inputs):  # the last state of a compiled call has a gradient of zeros: leave it out of the graph
        y = compiled(**{**inputs, "return_last_state": False})
        return y, selective_scan(**inputs)[1].detach()

    compare(make_inputs((len(reverse), 2, 9, 5, 3)), reverse, TOLERANCE[torch.float32], scan=scan)


@pytest.mark.parametrize("absent", [(), ("D", "delta_bias")])
def test_custom_op_is_well_formed(kernels, absent):
    inputs = make_inputs((2, 2, 9, 4, 3), absent=absent)
    tensors = [*inputs.values(), None]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.mamba_rsst.selective_scan_mamba_ssm.default
    torch.library.opcheck(op, (*tensors, True, 2, True), test_utils=tests)
    detached = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(op, (*detached, True, 2, False), test_utils=tests)
    y, _, states = op(*detached, True, 2, True)
    backward = torch.ops.mamba_rsst.selective_scan_mamba_ssm_backward.default
    torch.library.opcheck(backward, (y, None, *detached, states, True, 2), test_utils=tests)


def test_states_are_saved_for_a_backward_pass_alone(kernels):
    inputs = [x.detach() for x in make_inputs((2, 2, 17, 5, 3)).values()]
    op = torch.ops.mamba_rsst.selective_scan_mamba_ssm
    assert op(*inputs, None, True, 0, False)[2].numel() == 0
    assert op(*inputs, None, True, 0, True)[2].shape == backend.states_shape(2, 2, 17, 5, 3) == (2, 2, 5, 3, 6)


def test_no_gradient_through_the_last_state(kernels):
    """Rather an error than what the kernels would give, which is none; asked for or not, the state itself is there."""
    inputs = make_inputs((1, 2, 9, 5, 3))
    options = dict(delta_softplus=True, reverse=(True,), return_last_state=True, implementation="mamba_ssm")
    y, last = selective_scan(**inputs, **options)
    with pytest.raises(ValueError, match="'mamba_ssm' has no gradient through the last state: detach it, or choose"):
        (y.sum() + last.sum()).backward()
    y, last = selective_scan(**inputs, **options)
    (y.sum() + last.detach().sum()).backward()
    assert inputs["u"].grad is not None


TOO_MANY = "count in 32 bits, and this batch has more elements than that."
CALL = dict(device_type="cuda", dtype=torch.float32, sizes=SIZES, initial_state=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.float16, "sizes": (2, 1, 5000, 3, 256)}, None),
        ({"device_type": "cpu"}, "run on CUDA devices, not on 'cpu'."),
        ({"dtype": torch.float64}, "compute in float32, which is not enough for torch.float64."),
        ({"initial_state": True}, "start from a zero state, so they cannot take `initial_state`."),
        ({"sizes": (1, 2, 17, 5, 257)}, "hold at most 256 states a channel, not 257."),
        ({"sizes": (1, 1 << 11, 1 << 10, 1 << 10, 1)}, TOO_MANY),
        ({"sizes": (1, 1 << 12, 1, 1 << 11, 128)}, TOO_MANY),
    ],
)
def test_what_the_kernels_cannot_run(monkeypatch, change, message):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SimpleNamespace())
    reason = backend.unusable(**{**CALL, **change})
    assert reason == (message and f"the kernels of `mamba_ssm` {message}")


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)  # an import of it fails
    assert backend.unusable(**CALL) == "the package `mamba_ssm` is not installed."


def test_installed_for_another_torch(monkeypatch, tmp_path):
    (tmp_path / "selective_scan_cuda.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert backend.unusable(**CALL) == "the kernels of `mamba_ssm` do not load: undefined symbol: _ZN3c10"


@pytest.mark.parametrize("installed", [True, False])
def test_whether_it_is_installed_can_be_traced(monkeypatch, installed):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SimpleNamespace() if installed else None)

    def function(x):
        return x if backend.unusable("cuda", x.dtype, (1, 1, *x.shape, 2), False) is None else -x

    x = torch.ones(3, 4)
    torch._dynamo.reset()  # what it found once, it takes as a constant
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x if installed else -x)


def test_a_forced_choice_says_why_not(monkeypatch):
    inputs = make_inputs()
    message = r"The selective scan {} cannot run here: the kernels of `mamba_ssm` run on CUDA devices, not on 'cpu'\."
    with pytest.raises(ValueError, match=message.format("'mamba_ssm'")):
        selective_scan(**inputs, reverse=(False, True), implementation="mamba_ssm")
    monkeypatch.setenv("MAMBA_RSST_SCAN", "mamba_ssm")
    with pytest.raises(ValueError, match=message.format("'MAMBA_RSST_SCAN=mamba_ssm'")):
        selective_scan(**inputs, reverse=(False, True))


@pytest.mark.parametrize("change", [{"initial_state": torch.zeros(2, 2, 5, 3)}, {"dtype": torch.float64}])
def test_a_forced_choice_looks_at_the_call(kernels, change):
    dtype = change.get("dtype", torch.float32)
    inputs = make_inputs(dtype=dtype)
    with pytest.raises(ValueError, match="'mamba_ssm' cannot run here: .*(initial_state|float64)"):
        selective_scan(
            **inputs,
            reverse=(False, True),
            initial_state=change.get("initial_state"),
            implementation="mamba_ssm",
        )
    assert not kernels.calls


@pytest.mark.parametrize(
    "triton, installed, call, chosen",
    [
        (True, True, {}, "triton"),
        (True, False, {}, "triton"),
        (True, True, {"dtype": torch.float64}, "torch"),
        (False, True, {}, "mamba_ssm"),
        (False, False, {}, "torch"),
        (False, True, {"dtype": torch.float64}, "torch"),
        (False, True, {"initial_state": True}, "torch"),
        (False, True, {"sizes": (1, 2, 17, 5, 300)}, "torch"),
        (False, True, {"last_state_gradient": True}, "torch"),
    ],
)
def test_the_automatic_choice(monkeypatch, triton, installed, call, chosen):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SimpleNamespace() if installed else None)
    monkeypatch.setattr(scan_module, "triton_unusable", lambda device_type: None if triton else "not here.")
    assert scan_module.resolve_implementation("auto", torch.device("cuda"), **call) == chosen


def test_the_automatic_choice_describes_the_call(kernels, monkeypatch):
    """What `selective_scan` tells of a call, seen from which back end runs."""
    monkeypatch.setattr(scan_module, "triton_unusable", lambda device_type: "not here.")
    inputs = make_inputs((1, 2, 9, 5, 3))
    options = dict(reverse=(True,), delta_softplus=True)
    cases = {
        "plain": ({}, 1),
        "last state": ({"return_last_state": True}, 0),
        "initial state": ({"initial_state": torch.zeros(1, 2, 5, 3)}, 0),
    }
    for name, (change, calls) in cases.items():
        kernels.calls.clear()
        selective_scan(**inputs, **options, **change)
        assert len(kernels.calls) == calls, name
    with torch.no_grad():
        selective_scan(**inputs, **options, return_last_state=True)
    assert len(kernels.calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "sizes, reverse, dtype, absent",
    [
        ((2, 3, 65, 24, 16), (False, True), torch.float32, ()),
        ((2, 3, 128, 24, 16), (False, True), torch.bfloat16, ()),  # a length that is read in vectors
        ((1, 2, 197, 7, 5), (True,), torch.float16, ()),
        ((1, 2, 300, 7, 5), (False,), torch.float32, ("D", "delta_bias")),
        ((3, 1, 9, 5, 256), (True, False, True), torch.float32, ()),
        ((2, 1, 2100, 8, 16), (True, False), torch.float32, ()),  # two chunks
        ((1, 1, 4096, 8, 16), (True,), torch.bfloat16, ()),
    ],
)
def test_gpu_matches_float64(sizes, reverse, dtype, absent):
    pytest.importorskip("selective_scan_cuda", reason="needs mamba_ssm")
    # Built with fast approximations of exp and log: further from the truth in fp32 than ours.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    compare(make_inputs(sizes, dtype, "cuda", absent), reverse, tolerance)
