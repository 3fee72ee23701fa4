"""The selective scan by the CUDA kernels of the package mamba_ssm, where that package is installed.

Its compiled module `selective_scan_cuda` takes one direction at a time, forward in time and channels first: u, delta
(B, E, L); B, C (B, 1, N, L). What we hold is (B, L, E) and may run backwards, so every call copies its inputs there
and its results back, flipped for a reversed direction. The kernels keep the state in fp32. They add up the gradients
of A, B, C, D and the bias by atomics: the last bits differ from run to run. They start from a zero state and do not
differentiate the last one.

The package is looked for when it is first needed; without it the module still imports, and `unusable` says why it
cannot run.
"""

# Legend: G directions, B batch, L length, E d_inner, N d_state
import math
from functools import cache, reduce

import torch


CHUNK = 2048  # time steps between two saved states; the kernels' own choice
_MOST_STATES = 256
_ALIGNMENT = 16  # bytes that the kernels load at once


@cache
def _load():
    """(the compiled module or None, why it is not there or None)"""
    try:
        import selective_scan_cuda
    except ModuleNotFoundError:
        return None, "the package `mamba_ssm` is not installed."
    except (ImportError, OSError) as error:  # as when it was built for another torch
        return None, f"the kernels of `mamba_ssm` do not load: {error}"
    return selective_scan_cuda, None


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import that fails
def _why_not_loaded():
    return _load()[1]


def unusable(device_type: str, dtype: torch.dtype, sizes: tuple[int, ...], initial_state: bool) -> str | None:
    """Why the kernels cannot run a call with u of that dtype and (G, B, L, E, N) `sizes`, or None when they can."""
    if device_type != "cuda":
        return f"the kernels of `mamba_ssm` run on CUDA devices, not on {device_type!r}."
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels of `mamba_ssm` compute in float32, which is not enough for {dtype}."
    if initial_state:
        return "the kernels of `mamba_ssm` start from a zero state, so they cannot take `initial_state`."
    _, Z, L, E, N = sizes
    if N > _MOST_STATES:
        return f"the kernels of `mamba_ssm` hold at most {_MOST_STATES} states a channel, not {N}."
    if max(Z * L * E, math.prod(states_shape(1, Z, L, E, N))) >= 2**31:
        return "the kernels of `mamba_ssm` count in 32 bits, and this batch has more elements than that."
    return _why_not_loaded()


def states_shape(G, B, L, E, N, device=None):
    """Shape of the saved chunk states: for each state the product of all decays up to there, then the state itself."""
    return (G, B, E, (L + CHUNK - 1) // CHUNK, 2 * N)


@torch.no_grad()
def scan_forward(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse, save):
    """u, delta (G,B,L,E); A (G,E,N); B, C (G,B,L,N). Returns y (G,B,L,E), last state (G,B,E,N), chunk states."""
    kernels, _ = _load()
    G, Z, L, E = u.shape
    N = A.shape[-1]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((G, Z, E, N), dtype=torch.float32, device=u.device)
    states = torch.empty(states_shape(G, Z, L, E, N) if save else (0,), dtype=torch.float32, device=u.device)
    for g in range(G):
        backwards = bool((reverse >> g) & 1)
        inputs = _direction(g, backwards, u, delta, A, B, C, D, delta_bias)
        out, chunk_states = kernels.fwd(*inputs, delta_softplus)
        y[g].copy_(_channels_last(out, backwards))
        last[g].copy_(chunk_states[:, :, -1, 1::2])
        if save:
            states[g].copy_(chunk_states)
    return y, last, states


@torch.no_grad()
def scan_backward(dy, dlast_state, u, delta, A, B, C, D, delta_bias, initial_state, states, delta_softplus, reverse):
    """Gradients of u, delta, A, B, C, D, delta_bias, in that order and their dtypes, then None; None if absent."""
    if dlast_state is not None:
        raise ValueError(
            "The selective scan 'mamba_ssm' has no gradient through the last state: detach it, or choose 'triton' or "
            "'torch'."
        )
    kernels, _ = _load()
    tensors = (u, delta, A, B, C, D, delta_bias)
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
    du, ddelta, dA, dB, dC, dD, dbias = grads
    for g in range(u.shape[0]):
        backwards = bool((reverse >> g) & 1)
        inputs = _direction(g, backwards, *tensors)
        dout = _channels_first(dy[g], backwards, inputs[0].dtype)
        # The kernels' options here: `out` and `dz` belong to a gate that we do not pass; nothing to compute again.
        found = kernels.bwd(*inputs, dout, states[g], None, None, delta_softplus, False)
        for whole, part in zip((du, ddelta), found[0:2]):
            whole[g].copy_(_channels_last(part, backwards))
        for whole, part in zip((dB, dC), found[3:5]):
            whole[g].copy_(_channels_last(part[:, 0], backwards))
        for whole, part in zip((dA, dD, dbias), (found[2], *found[5:7])):
            if whole is not None:
                whole[g].copy_(part)
    return *grads, None


def _direction(g, backwards, u, delta, A, B, C, D, delta_bias):
    """What the kernels take for direction g: u, delta, A, B, C, D, no gate, delta_bias."""
    # They read u, delta, B and C in one dtype.
    dtype = reduce(torch.promote_types, (x.dtype for x in (u, delta, B, C)))
    dtype = torch.float32 if dtype == torch.float64 else dtype
    u, delta, B, C = (_channels_first(x[g], backwards, dtype) for x in (u, delta, B, C))
    A, D, delta_bias = (None if x is None else x[g].float().contiguous() for x in (A, D, delta_bias))
    return u, delta, A, B[:, None], C[:, None], D, None, delta_bias


def _channels_first(x, backwards, dtype):
    """(B,L,·) -> contiguous (B,·,L), in the order in which the steps are taken."""
    x = x.to(dtype).transpose(1, 2)
    x = (x.flip(2) if backwards else x).contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _channels_last(x, backwards):
    """The reverse of `_channels_first`, not contiguous."""
    return (x.flip(2) if backwards else x).transpose(1, 2)
