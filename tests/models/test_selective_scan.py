import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mamba_rsst.models import selective_scan
from mamba_rsst.models import selective_scan_torch as backend
from mamba_rsst.models.selective_scan_triton import unusable


scan_module = importlib.import_module("mamba_rsst.models.selective_scan")  # the package's attribute is the function
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
LENGTHS = (1, 17, 31, 32, 33, 64, 100)


def closed_form(u, delta, A, B, C, D=None, delta_bias=None, initial_state=None, softplus=True, reverse=False):
    """One direction without a recurrence: y_t = sum over s <= t of C_t exp(A (S_t - S_s)) delta_s B_s u_s + C_t
    exp(A S_t) h_0 + D u_t, with S the running sum of delta. All in fp64. Returns y and the last state."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    if reverse:
        u, delta, B, C = (x.flip(1) for x in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.double()
    if softplus:
        delta = torch.log1p(torch.exp(-delta.abs())) + delta.clamp(min=0)
    S = delta.cumsum(1)
    past = torch.ones(u.shape[1], u.shape[1], device=u.device).tril().bool()[None, :, :, None]
    gap = (S[:, :, None] - S[:, None]).masked_fill(~past, 0.0)
    decay = torch.exp(gap[..., None] * A) * past[..., None]
    h = torch.einsum("btsen,bse,bsn->bten", decay, delta * u, B)
    if initial_state is not None:
        h = h + torch.exp(S[..., None] * A) * initial_state.double()[:, None]
    y = torch.einsum("bten,btn->bte", h, C)
    if D is not None:
        y = y + D.double() * u
    return (y.flip(1) if reverse else y), h[:, -1]


def make_inputs(batch=2, length=17, channels=11, states=7, directions=None, dtype=torch.float64, seed=0):
    """name -> tensor with gradient; `directions` adds the leading axis."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if directions is None else (directions,)

    def normal(*shape):
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) - 1.0,
        "A": -torch.exp(0.5 * normal(channels, states)),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, states),
    }
    small = ("u", "delta", "B", "C")  # the others stay fp32 when activations are bf16
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {k: v.to(dtype if k in small else wide).requires_grad_() for k, v in inputs.items()}


def expected_of(inputs, softplus=True, reverse=False):
    """(y, last state) by the closed form, for one direction or several."""
    if inputs["u"].dim() == 3:
        return closed_form(**inputs, softplus=softplus, reverse=reverse)
    parts = [
        closed_form(**{k: v[g] for k, v in inputs.items()}, softplus=softplus, reverse=backwards)
        for g, backwards in enumerate(reverse)
    ]
    return torch.stack([y for y, _ in parts]), torch.stack([h for _, h in parts])


def assert_near(actual, expected, tolerance, what=""):
    """Largest error over the largest expected value."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-6)
    assert torch.isfinite(actual).all() and error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance}"


def compare(inputs, tolerance, softplus=True, reverse=False, **kwargs):
    """Outputs and every gradient, through y and through the last state, against the closed form."""
    inputs = {k: v for k, v in inputs.items() if v is not None}
    options = dict(delta_softplus=softplus, reverse=reverse, return_last_state=True, **kwargs)
    y, last = selective_scan(**inputs, **options)
    expected_y, expected_last = expected_of(inputs, softplus, reverse)
    assert y.shape == inputs["u"].shape and y.dtype == inputs["u"].dtype
    assert last.shape == expected_last.shape
    assert_near(y, expected_y, tolerance, "y")
    assert_near(last, expected_last, tolerance, "last state")
    wy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    wl = torch.randn(last.shape, dtype=torch.float64).to(last.dtype)
    grads = torch.autograd.grad(
        (y * wy).sum(dtype=torch.float64) + (last * wl).sum(dtype=torch.float64), inputs.values()
    )
    loss = (expected_y * wy.double()).sum() + (expected_last * wl.double()).sum()
    for (name, x), grad, expected in zip(inputs.items(), grads, torch.autograd.grad(loss, inputs.values())):
        assert grad.shape == x.shape and grad.dtype == x.dtype, name
        assert_near(grad, expected, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("length", LENGTHS)
def test_one_direction(length, implementation):
    compare(make_inputs(length=length), 1e-10, implementation=implementation)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(1, 33, 1, 1), (1, 33, 5, 7), (3, 33, 1, 7), (3, 33, 5, 1), (1, 1, 1, 1)])
def test_single_batch_channel_or_state(shape, implementation):
    compare(make_inputs(*shape), 1e-10, implementation=implementation)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("length", [1, 33, 70])
@pytest.mark.parametrize("reverse", [(False, True), (True, False), (True, True), (False,), (True, False, True)])
def test_directions(reverse, length, implementation):
    compare(make_inputs(length=length, directions=len(reverse)), 1e-10, reverse=reverse, implementation=implementation)


def test_reversed_alone():
    compare(make_inputs(length=40), 1e-10, reverse=True)


@pytest.mark.parametrize("reverse", [(False, True), (True, False, True)])
@pytest.mark.parametrize("limit, tiles", [(1, "rows"), (2 * 77, "rows"), (5 * 77, "direction"), (1 << 20, "all")])
def test_tiles(monkeypatch, limit, tiles, reverse):
    """All at once, one direction at a time, and a few rows of it at a time, the last tile shorter than the others."""
    monkeypatch.setitem(backend._STEP_ELEMENTS, "cpu", limit)
    seen = [(t.G, t.Z) for t in backend._tiles(len(reverse), 5, 11, 7, 0, torch.device("cpu"))]
    wanted = {"rows": {1: [(1, 1)] * 5, 154: [(1, 2), (1, 2), (1, 1)]}.get(limit), "direction": [(1, 5)]}
    assert seen == ([(len(reverse), 5)] if tiles == "all" else wanted[tiles] * len(reverse))
    compare(make_inputs(batch=5, length=37, directions=len(reverse)), 1e-10, reverse=reverse, implementation="torch")


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunk_borders(monkeypatch, chunk):
    monkeypatch.setattr(backend, "_LEAST_STEPS", chunk)
    monkeypatch.setattr(backend, "_MOST_STEPS", chunk)
    for length in (1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1):
        compare(make_inputs(length=length, directions=2), 1e-10, reverse=(False, True), implementation="torch")


@pytest.mark.parametrize("absent", [("D",), ("delta_bias",), ("initial_state",), ("D", "delta_bias", "initial_state")])
@pytest.mark.parametrize("directions", [None, 2])
def test_optional_inputs(absent, directions):
    inputs = make_inputs(length=35, directions=directions)
    inputs.update(dict.fromkeys(absent))
    compare(inputs, 1e-10, reverse=False if directions is None else (False, True))


def test_without_softplus():
    inputs = make_inputs(length=35)
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    inputs["delta_bias"] = inputs["delta_bias"].detach().abs().requires_grad_()
    compare(inputs, 1e-10, softplus=False)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float32, 1e-5),
        # Inputs are exact in both; the outputs and the gradients of u, delta, B and C are rounded once.
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-11),
    ],
)
@pytest.mark.parametrize("length", [17, 100])
def test_dtypes(dtype, tolerance, length):
    inputs = make_inputs(length=length, directions=2, dtype=dtype)
    y, last = selective_scan(**inputs, delta_softplus=True, reverse=(False, True), return_last_state=True)
    assert last.dtype == torch.float32
    assert_near(last, expected_of(inputs, reverse=(False, True))[1], 1e-5, "state is fp32 throughout")
    compare(inputs, tolerance, reverse=(False, True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_large_time_steps(dtype, tolerance):
    inputs = make_inputs(length=70, directions=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    delta = 10 * torch.rand(inputs["delta"].shape, generator=generator)
    inputs["delta"] = delta.to(dtype).requires_grad_()
    inputs["A"] = (-torch.arange(1.0, 8.0) * 4).expand(2, 11, 7).clone().requires_grad_()
    compare(inputs, tolerance, reverse=(False, True))


@pytest.mark.parametrize("value", [-60.0, 60.0])
def test_softplus_at_its_ends(value):
    inputs = make_inputs(length=9, dtype=torch.float32)
    inputs["delta"] = torch.full_like(inputs["delta"], value).requires_grad_()
    compare(inputs, 1e-5)


@pytest.mark.parametrize("shape", [(2, 9, 4, 3), (2, 9, 1, 3), (2, 9, 4, 1)])
def test_inputs_stay_as_they_are(shape):
    inputs = make_inputs(*shape)
    before = {k: v.detach().clone() for k, v in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, implementation="torch")
    dy, dlast = torch.ones_like(y), torch.ones_like(last)
    torch.autograd.grad((y, last), inputs.values(), (dy, dlast))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name
    assert (dy == 1).all() and (dlast == 1).all()


def test_two_steps_by_hand():
    one = torch.ones(1, 1, 1)
    u, delta = torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[0.5], [0.25]]])
    A, B, C = torch.tensor([[-1.0]]), torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [10.0]]])
    y, last = selective_scan(u, delta, A, B, C, torch.tensor([4.0]), initial_state=one, return_last_state=True)
    h1 = torch.exp(torch.tensor(-0.5)) + 0.5 * 1 * 2
    h2 = torch.exp(torch.tensor(-0.25)) * h1 + 0.25 * 2 * 3
    torch.testing.assert_close(y.flatten(), torch.stack([h1 + 8, 10 * h2 + 12]))
    torch.testing.assert_close(last.flatten(), h2[None])


def test_the_past_alone_reaches_a_step():
    inputs = make_inputs(length=40, directions=2)
    changed = {**inputs, "u": inputs["u"].detach().clone()}
    changed["u"][:, :, 20] += 1
    options = dict(delta_softplus=True, reverse=(False, True))
    moved = (selective_scan(**inputs, **options) - selective_scan(**changed, **options)).abs().amax(dim=(1, 3)) > 0
    steps = torch.arange(40)
    assert torch.equal(moved, torch.stack([steps >= 20, steps <= 20]))


def test_state_handed_on_continues_the_scan():
    inputs = make_inputs(length=50)
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    parts, state = [], inputs["initial_state"]
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        cut = {k: inputs[k][:, part] for k in ("u", "delta", "B", "C")}
        y, state = selective_scan(
            **{**inputs, **cut, "initial_state": state}, delta_softplus=True, return_last_state=True
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


def test_expanded_inputs():
    """One input for both directions, without a copy: stride 0. Its gradient is the sum of the directions'."""
    inputs = make_inputs(length=40, directions=2)
    base = {k: inputs[k][0].detach().requires_grad_() for k in ("u", "delta", "B", "C")}
    expanded = {k: v.unsqueeze(0).expand(2, *v.shape) for k, v in base.items()}
    options = dict(delta_softplus=True, reverse=(False, True))
    for scan in (selective_scan, torch.compile(selective_scan, fullgraph=True, backend="aot_eager")):
        y = scan(**{**inputs, **expanded}, **options)
        weights = torch.randn_like(y)
        grads = torch.autograd.grad((y * weights).sum(), base.values())
        expected, _ = expected_of({**inputs, **expanded}, reverse=(False, True))
        assert_near(y, expected, 1e-10)
        for grad, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), base.values())):
            assert_near(grad, wanted, 1e-10)


def test_inputs_and_gradients_in_any_layout():
    """Transposed views as inputs, and an expanded gradient, as `sum` gives one."""
    inputs = make_inputs(length=40)
    views = {k: inputs[k].detach().transpose(1, 2).contiguous().transpose(1, 2) for k in ("u", "delta", "B", "C")}
    views = {**inputs, **{k: v.requires_grad_() for k, v in views.items()}}
    grads = torch.autograd.grad(selective_scan(**views, delta_softplus=True).sum(), views.values())
    expected = torch.autograd.grad(expected_of(inputs)[0].sum(), inputs.values())
    for name, grad, wanted in zip(inputs, grads, expected):
        assert_near(grad, wanted, 1e-10, name)


def test_gradient_of_the_last_state_alone():
    inputs = make_inputs(length=40, directions=2)
    options = dict(delta_softplus=True, reverse=(False, True), return_last_state=True)
    grads = torch.autograd.grad(selective_scan(**inputs, **options)[1].sum(), inputs.values())
    loss = expected_of(inputs, reverse=(False, True))[1].sum()
    expected = torch.autograd.grad(loss, inputs.values(), allow_unused=True)
    for name, grad, wanted in zip(inputs, grads, expected):
        assert_near(grad, torch.zeros_like(grad) if wanted is None else wanted, 1e-10, name)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_input_alone(name):
    inputs = {k: v.detach() for k, v in make_inputs(length=12).items()}
    inputs[name].requires_grad_()
    (grad,) = torch.autograd.grad(selective_scan(**inputs, delta_softplus=True).square().sum(), [inputs[name]])
    (expected,) = torch.autograd.grad(expected_of(inputs)[0].square().sum(), [inputs[name]])
    assert_near(grad, expected, 1e-10)


def test_gradcheck():
    inputs = make_inputs(batch=1, length=5, channels=2, states=3, directions=2)

    def function(*tensors):
        options = dict(delta_softplus=True, reverse=(False, True), return_last_state=True)
        return selective_scan(**dict(zip(NAMES, tensors)), **options)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("reverse", [False, (False, True)])
def test_compiled_and_checkpointed_give_the_same(reverse):
    inputs = make_inputs(length=40, directions=len(reverse) if reverse else None, dtype=torch.float32)

    def function(*tensors):
        return selective_scan(**dict(zip(NAMES, tensors)), delta_softplus=True, reverse=reverse).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = function(*inputs.values())
    grads = torch.autograd.grad(plain.sum(), inputs.values())
    for run in (
        lambda *x: checkpoint(function, *x, use_reentrant=False),
        compiled,
        lambda *x: checkpoint(compiled, *x, use_reentrant=False),
    ):
        y = run(*inputs.values())
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs.values()), grads)


def test_autocast_leaves_the_scan_alone():
    inputs = make_inputs(length=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        compare(inputs, 1e-5)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it holds."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_memory_is_linear_in_the_states_of_a_chunk():
    """Neither what the forward saves nor anything that either pass makes is as large as (B, L, E, N)."""
    B, L, E, N = 2, 2048, 16, 16
    inputs = make_inputs(B, L, E, N, dtype=torch.float32)
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = selective_scan(**inputs, delta_softplus=True, implementation="torch")
    own = sum({x.data_ptr(): x.numel() for x in inputs.values()}.values())
    assert 0 < sum(saved.values()) - own <= B * L * E * N / 16
    assert y.grad_fn is not None

    arrays = [x.detach().unsqueeze(0) for x in inputs.values()]
    with Largest() as forward:
        y, last, states = backend.scan_forward(*arrays, True, 0, True)
    with Largest() as backward:
        backend.scan_backward(y, last, *arrays, states, True, 0)
    assert 0 < forward.elements <= B * L * E * N / 4
    assert 0 < backward.elements <= B * L * E * N / 4


def test_nothing_is_saved_without_gradients():
    arrays = [x.detach().unsqueeze(0) for x in make_inputs().values()]
    op = torch.ops.mamba_rsst.selective_scan_torch
    assert op(*arrays, True, 0, False)[2].numel() == 0
    assert op(*arrays, True, 0, True)[2].shape == backend.states_shape(1, 2, 17, 11, 7, torch.device("cpu"))


@pytest.mark.parametrize(
    "sizes, steps", [((1, 1, 1024, 1536, 16), 41), ((2, 1, 65, 384, 16), 65), ((1, 32, 65, 384, 16), 10)]
)
def test_chunks_are_as_long_as_the_cache_allows_and_alike(sizes, steps):
    cpu = torch.device("cpu")
    assert backend._chunk_steps(*sizes, cpu) == steps
    assert backend.states_shape(*sizes, cpu)[1] == -(-sizes[2] // steps)


def test_one_sequence_is_read_where_it_lies():
    x = torch.randn(1, 1, 9, 5)
    tile = next(backend._tiles(1, 1, 5, 3, 0, x.device))
    assert tile.load(x, 2, 6, x.dtype).data_ptr() == x[0, 0, 2].data_ptr()
    torch.testing.assert_close(tile.load(x, 2, 6, x.dtype)[:, 0, 0], x[0, 0, 2:6])


def test_states_are_saved_for_a_backward_pass_alone(monkeypatch):
    saved = []
    op = scan_module._op("torch")
    monkeypatch.setattr(scan_module, "_op", lambda name: lambda *args: saved.append(args[-1]) or op(*args))
    inputs = make_inputs()
    selective_scan(**inputs)
    with torch.no_grad():
        selective_scan(**inputs)
    selective_scan(**{k: v.detach() for k, v in inputs.items()})
    assert saved == [True, False, False]


@pytest.mark.parametrize("present", [NAMES, NAMES[:5]])
@pytest.mark.parametrize("directions, reverse", [(1, 0), (2, 2)])
@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded"])
def test_custom_op_is_well_formed(layout, present, directions, reverse):
    """torch's own checks of the schema, the registered gradient, and shapes and strides under tracing."""
    inputs = make_inputs(length=9, channels=4, states=3, directions=directions, dtype=torch.float32)
    for name in ("u", "delta", "B", "C"):
        x = inputs[name].detach()
        x = {"dense": x, "transposed": x.mT.contiguous().mT, "expanded": x[:1].expand_as(x)}[layout]
        inputs[name] = x.requires_grad_()
    tensors = [inputs[k] if k in present else None for k in NAMES]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.mamba_rsst.selective_scan_torch.default
    torch.library.opcheck(op, (*tensors, True, reverse, True), test_utils=tests)
    detached = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(op, (*detached, True, reverse, False), test_utils=tests)
    y, last, states = op(*detached, True, reverse, True)
    backward = torch.ops.mamba_rsst.selective_scan_torch_backward.default
    for dlast in (last, None):
        torch.library.opcheck(backward, (y, dlast, *detached, states, True, reverse), test_utils=tests)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"u": (2, 17)}, r"`u` must be \(B, L, E\) or \(G, B, L, E\), got"),
        (
            {"delta": (2, 16, 11)},
            r"`delta` has shape \(1, 2, 16, 11\), which does not fit u: expected \(1, 2, 17, 11\)",
        ),
        ({"delta": (1, 17, 11)}, "`delta` has shape"),
        ({"A": (10, 7)}, "`A` has shape"),
        ({"B": (2, 17, 6)}, "`B` has shape"),
        ({"C": (2, 7, 17)}, "`C` has shape"),
        ({"D": (10,)}, "`D` has shape"),
        ({"delta_bias": (1,)}, "`delta_bias` has shape"),
        ({"initial_state": (2, 7, 11)}, "`initial_state` has shape"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    inputs = make_inputs()
    inputs.update({k: torch.zeros(shape, dtype=torch.float64) for k, shape in change.items()})
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


@pytest.mark.parametrize("shape", [(0, 17, 11, 7), (2, 0, 11, 7), (2, 17, 0, 7), (2, 17, 11, 0)])
def test_nothing_to_scan(shape):
    with pytest.raises(ValueError, match="at least one sequence, step, channel and state; u is"):
        selective_scan(**make_inputs(*shape))


@pytest.mark.parametrize("directions, reverse", [(2, False), (2, (True,)), (None, (False, True))])
def test_directions_that_do_not_fit(directions, reverse):
    with pytest.raises(ValueError, match=r"`reverse` names \d direction\(s\) but the inputs hold \d"):
        selective_scan(**make_inputs(directions=directions), reverse=reverse)


def test_unknown_implementation():
    choices = r"\['auto', 'reference', 'torch', 'triton', 'mamba_ssm'\]"
    with pytest.raises(ValueError, match=f"'fast'; choose from {choices}"):
        selective_scan(**make_inputs(), implementation="fast")


def test_environment_variable(monkeypatch):
    """It replaces "auto" alone; a wrong value is named, with the choices."""
    calls = []
    reference = scan_module.selective_scan_ref
    monkeypatch.setattr(scan_module, "selective_scan_ref", lambda *args: calls.append(1) or reference(*args))
    monkeypatch.setenv("MAMBA_RSST_SCAN", "reference")
    selective_scan(**make_inputs())
    assert len(calls) == 1
    selective_scan(**make_inputs(), implementation="torch")
    assert len(calls) == 1
    monkeypatch.setenv("MAMBA_RSST_SCAN", "fast")
    with pytest.raises(ValueError, match="MAMBA_RSST_SCAN=fast.*'auto', 'reference', 'torch', 'triton', 'mamba_ssm'"):
        selective_scan(**make_inputs())
    selective_scan(**make_inputs(), implementation="torch")


@pytest.mark.skipif(unusable("cpu") is None, reason="triton's interpreter runs the kernels on the CPU")
def test_triton_on_the_cpu_says_why_not(monkeypatch):
    with pytest.raises(ValueError, match="'triton' cannot run here: .*(CUDA|not installed)"):
        selective_scan(**make_inputs(), implementation="triton")
    monkeypatch.setenv("MAMBA_RSST_SCAN", "triton")
    with pytest.raises(ValueError, match="MAMBA_RSST_SCAN=triton' cannot run here: "):
        selective_scan(**make_inputs())
