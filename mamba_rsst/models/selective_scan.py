"""The selective scan: one entry, `selective_scan`, in front of several back ends, and the sequential reference."""

# Legend: G directions, B batch, L length, E d_inner, N d_state
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Each name by itself: transformers finds the files a Hub copy needs by lines of the form "from .file import name".
from .selective_scan_mamba_ssm import scan_backward as mamba_ssm_backward
from .selective_scan_mamba_ssm import scan_forward as mamba_ssm_forward
from .selective_scan_mamba_ssm import states_shape as mamba_ssm_states_shape
from .selective_scan_mamba_ssm import unusable as mamba_ssm_unusable
from .selective_scan_torch import scan_backward as torch_backward
from .selective_scan_torch import scan_forward as torch_forward
from .selective_scan_torch import states_shape as torch_states_shape
from .selective_scan_triton import scan_backward as triton_backward
from .selective_scan_triton import scan_forward as triton_forward
from .selective_scan_triton import states_shape as triton_states_shape
from .selective_scan_triton import unusable as triton_unusable


class Backend(NamedTuple):
    """forward and backward as in selective_scan_torch.py, and the shape of what the one saves for the other."""

    scan_forward: Callable
    scan_backward: Callable
    states_shape: Callable


_BACKENDS = {
    "torch": Backend(torch_forward, torch_backward, torch_states_shape),
    "triton": Backend(triton_forward, triton_backward, triton_states_shape),
    "mamba_ssm": Backend(mamba_ssm_forward, mamba_ssm_backward, mamba_ssm_states_shape),
}
IMPLEMENTATIONS = ("auto", "reference", *_BACKENDS)
"""`reference`: a loop over time. `torch`: chunked pure torch, any device. `triton`: fused kernels for CUDA.
`mamba_ssm`: that package's CUDA kernels, where installed: no initial state, no gradient through the last one."""

ENVIRONMENT_VARIABLE = "MAMBA_RSST_SCAN"

# Of the custom ops: "mamba_rsst", and another for each copy of this file that the Hub's remote code brings along. To
# register a name again would take the op away from under those who hold it: compiled models, and the older copy.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0].removesuffix(".models"), flags=re.ASCII)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool | tuple[bool, ...] = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = C_t h_t + D u_t  (eq. 2 of arXiv:2312.00752).

    One direction: u, delta (B, L, E); A (E, N), negative; B, C (B, L, N); D, delta_bias (E,); initial_state (B, E, N);
    `reverse` a bool. Several directions in one call: a leading axis G on every one of them, `reverse` G bools; a
    reversed direction runs from the last step to the first, on inputs in their natural order.

    u, delta, B, C may be fp32, bf16, fp16 or fp64; the state and all sums are fp32 (fp64 for fp64 inputs).
    Returns y in u's shape and dtype, and with `return_last_state` the state after the last step taken, (…, B, E, N).

    implementation: one of `IMPLEMENTATIONS`; the environment variable MAMBA_RSST_SCAN overrides "auto".
    Raises ValueError for shapes that do not fit together, an empty batch or length, an unknown implementation, or one
    that cannot run here.
    """
    several = u.dim() == 4
    directions = tuple(reverse) if isinstance(reverse, (tuple, list)) else (bool(reverse),)
    if not several:
        u, delta, A, B, C = (x.unsqueeze(0) for x in (u, delta, A, B, C))
        D, delta_bias, initial_state = (None if x is None else x.unsqueeze(0) for x in (D, delta_bias, initial_state))
    _check(u, delta, A, B, C, D, delta_bias, initial_state, directions)
    inputs = (u, delta, A, B, C, D, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    name = resolve_implementation(
        implementation,
        u.device,
        u.dtype,
        sizes=(*u.shape, A.shape[-1]),
        initial_state=initial_state is not None,
        last_state_gradient=save and return_last_state,
    )
    if name == "reference":
        y, last = selective_scan_ref(u, delta, A, B, C, D, delta_bias, delta_softplus, directions, initial_state)
    else:
        mask = sum(1 << g for g, backwards in enumerate(directions) if backwards)
        y, last, _ = _op(name)(*inputs, delta_softplus, mask, save)
    if not several:
        y, last = y[0], last[0]
    return (y, last) if return_last_state else y


def resolve_implementation(
    implementation: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    sizes: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1),
    initial_state: bool = False,
    last_state_gradient: bool = False,
) -> str:
    """The back end that runs: the one asked for, or for "auto" the fastest that computes the call right on `device`.

    The call: the dtype of u, (G, B, L, E, N) `sizes`, whether it has an initial state, and whether a gradient may come
    back through the last one.
    """
    asked = implementation
    if implementation == "auto":
        implementation = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        asked = f"{ENVIRONMENT_VARIABLE}={implementation}"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown selective scan {asked!r}; choose from {list(IMPLEMENTATIONS)}.")
    if implementation == "auto":
        if dtype == torch.float64:  # The kernels compute in fp32, which would waste what fp64 is asked for.
            return "torch"
        if triton_unusable(device.type) is None:
            return "triton"
        # Whether a gradient does come back shows only when it is too late for another choice.
        if not last_state_gradient and mamba_ssm_unusable(device.type, dtype, sizes, initial_state) is None:
            return "mamba_ssm"
        return "torch"
    reason = None
    if implementation == "triton":
        reason = triton_unusable(device.type)
    if implementation == "mamba_ssm":
        reason = mamba_ssm_unusable(device.type, dtype, sizes, initial_state)
    if reason:
        raise ValueError(f"The selective scan {asked!r} cannot run here: {reason}")
    return implementation


def selective_scan_ref(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, initial_state=None):
    """The definition, one step at a time; arguments as `selective_scan` with axis G in front. Returns (y, state)."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    ys, states = [], []
    for g, backwards in enumerate(reverse):
        x, dt, b, c = (v[g].to(dtype) for v in (u, delta, B, C))
        dt = dt if delta_bias is None else dt + delta_bias[g].to(dtype)
        dt = F.softplus(dt) if delta_softplus else dt
        h = x.new_zeros(x.shape[0], *A.shape[1:]) if initial_state is None else initial_state[g].to(dtype)
        steps = [None] * x.shape[1]
        for t in reversed(range(len(steps))) if backwards else range(len(steps)):
            decay = torch.exp(dt[:, t, :, None] * A[g].to(dtype))
            h = decay * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
            steps[t] = (h * c[:, t, None, :]).sum(-1)
        y = torch.stack(steps, dim=1)
        ys.append(y if D is None else y + D[g].to(dtype) * x)
        states.append(h)
    return torch.stack(ys).to(u.dtype), torch.stack(states)


def _check(u, delta, A, B, C, D, delta_bias, initial_state, directions):
    if u.dim() != 4:
        raise ValueError(f"`u` must be (B, L, E) or (G, B, L, E), got {tuple(u.shape)}.")
    G, Z, L, E = u.shape
    N = A.shape[-1]
    shapes = {
        "delta": (delta, (G, Z, L, E)),
        "A": (A, (G, E, N)),
        "B": (B, (G, Z, L, N)),
        "C": (C, (G, Z, L, N)),
        "D": (D, (G, E)),
        "delta_bias": (delta_bias, (G, E)),
        "initial_state": (initial_state, (G, Z, E, N)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, which does not fit u: expected {shape}.")
    if Z == 0 or L == 0 or E == 0 or N == 0:
        raise ValueError(
            f"The selective scan needs at least one sequence, step, channel and state; u is {tuple(u.shape)}."
        )
    if len(directions) != G:
        raise ValueError(f"`reverse` names {len(directions)} direction(s) but the inputs hold {G}.")


def _register(name, backend):
    """Make `backend` a custom op with a gradient, so that torch.compile and autograd see one opaque, typed call."""

    @torch.library.custom_op(f"{NAMESPACE}::selective_scan_{name}", mutates_args=())
    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        delta_softplus: bool,
        reverse: int,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backend.scan_forward(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse, save)

    @scan.register_fake
    def _(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse, save):
        G, Z, L, E = u.shape
        N = A.shape[-1]
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        shape = backend.states_shape(G, Z, L, E, N, u.device) if save else (0,)
        return (
            u.new_empty((G, Z, L, E)),
            u.new_empty((G, Z, E, N), dtype=dtype),
            u.new_empty(shape, dtype=dtype),
        )

    @torch.library.custom_op(f"{NAMESPACE}::selective_scan_{name}_backward", mutates_args=())
    def scan_backward(
        dy: Tensor,
        dlast_state: Tensor | None,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        states: Tensor,
        delta_softplus: bool,
        reverse: int,
    ) -> list[Tensor]:
        grads = backend.scan_backward(
            dy, dlast_state, u, delta, A, B, C, D, delta_bias, initial_state, states, delta_softplus, reverse
        )
        return [g for g in grads if g is not None]

    @scan_backward.register_fake
    def _(dy, dlast_state, u, delta, A, B, C, D, delta_bias, initial_state, states, delta_softplus, reverse):
        # Inputs may be expanded views (one input, two directions); their gradients are dense.
        inputs = (u, delta, A, B, C, D, delta_bias, initial_state)
        return [x.new_empty(x.shape) for x in inputs if x is not None]

    def setup_context(ctx, inputs, output):
        *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
        ctx.present = [x is not None for x in tensors]
        ctx.save_for_backward(*tensors, output[2])
        ctx.set_materialize_grads(False)

    def backward(ctx, dy, dlast_state, _):
        *tensors, states = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
        grads = iter(_op(f"{name}_backward")(dy, dlast_state, *tensors, states, ctx.delta_softplus, ctx.reverse))
        return (*(next(grads) if present else None for present in ctx.present), None, None, None)

    scan.register_autograd(backward, setup_context=setup_context)


def _op(name):
    """The registered op, looked up whenever it is called: transformers may run a changed copy of this file again."""
    return getattr(getattr(torch.ops, NAMESPACE), f"selective_scan_{name}")


for _name, _backend in _BACKENDS.items():
    _register(_name, _backend)


def _register_flops():
    """Tell torch.utils.flop_counter what a scan costs.

    Four multiply-accumulates a state and step (delta A, decay h + input, delta B u, C h) and two a channel and step
    (delta u, D u); the exponential is not counted. FLOPs are twice that, as the counter's convention is.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def forward_flops(u, delta, A, *args, **kwargs):
        G, Z, L, E = u
        return 2 * G * Z * L * E * (4 * A[-1] + 2)

    for name in _BACKENDS:
        if _op(name) not in flop_registry:
            register_flop_formula(_op(name))(forward_flops)


_register_flops()
