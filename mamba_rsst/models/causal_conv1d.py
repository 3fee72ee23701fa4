"""The mixer's causal depthwise convolution with its SiLU: one entry, in plain torch and as fused Triton kernels.

torch.compile makes of the plain form about nine small kernels a direction that are bound by index arithmetic; on an
H200 the kernels below take half the time forward and a quarter backward (benchmarks/bench_conv_gpu.py).
"""

# Legend: G directions, B batch, L length, E d_inner, K taps; a row is one step of one sequence
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .selective_scan import NAMESPACE
from .selective_scan_triton import on_device, unusable


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

ROWS, COLUMNS = 8, 128  # of the tile that a program works on at a time
PROGRAMS = 1024  # along the rows; each goes on to further tiles and keeps its own sums for the taps' gradients
OPTIONS = dict(num_warps=1)  # sums over a tile's rows stay inside a warp: with four they took three times as long


def causal_conv1d_silu(
    x: Tensor, taps: Tensor, bias: Tensor | None, reverse: tuple[bool, ...], past: Tensor | None = None
) -> Tensor:
    """silu(bias + sum_k taps[k] x[t - (K - 1) + k]) for each direction; one that is reversed looks ahead instead.

    x (B, L, E); taps (G, K, E); bias (G, E); `reverse` G bools -> (G, B, L, E) in x's dtype.
    past: (B, E, at least K - 1), what came before x; default zeros.
    Source: Gu & Dao 2023, arXiv:2312.00752, fig. 3; the reversed direction is Vim's (arXiv:2401.09417, alg. 1).
    """
    if past is not None:
        if any(reverse):
            raise ValueError("`past` belongs to the forward direction; a reversed one begins at the other end.")
        before = taps.shape[1] - 1
        x = torch.cat([past[..., past.shape[-1] - before :].transpose(1, 2).to(x.dtype), x], dim=1)
        return causal_conv1d_silu(x, taps, bias, reverse)[:, :, before:]
    if _fused(x):
        mask = sum(1 << g for g, backwards in enumerate(reverse) if backwards)
        return getattr(torch.ops, NAMESPACE).causal_conv1d_silu(x, taps, bias, mask)
    return torch.stack(
        [
            F.silu(_convolve(x, taps[g], None if bias is None else bias[g], backwards))
            for g, backwards in enumerate(reverse)
        ]
    )


def _fused(x):
    return x.dtype != torch.float64 and x.numel() > 0 and unusable(x.device.type) is None


def _convolve(x, taps, bias, backwards):
    """One direction, in x's dtype: (B, L, E)."""
    K, L = taps.shape[0], x.shape[1]
    if backwards:
        taps = taps.flip(0)
    padding = (0, K - 1) if backwards else (K - 1, 0)
    if x.device.type == "cpu":
        weight = taps.t()[:, None].to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv1d(F.pad(x.transpose(1, 2), padding), weight, bias, groups=len(weight)).transpose(1, 2)
    padded = F.pad(x, (0, 0, *padding))
    y = sum(padded[:, k : k + L] * taps[k] for k in range(K))
    return (y if bias is None else y + bias).to(x.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------------
def _jit(function):
    return function if triton is None else triton.jit(function, do_not_specialize=["rows", "length", "reverse"])


@_jit
def _shift(k, reverse, direction, K: tl.constexpr):
    """How many steps from its output the k-th tap looks."""
    back = K - 1 - k
    return tl.where((reverse >> direction) & 1 != 0, back, -back)


@_jit
def _tile(x, row, position, shift, rows, length, column, inside, x_row):
    """x at `shift` steps from each row, fp32; 0 beyond the ends of its sequence."""
    source = position + shift
    valid = (row < rows) & (source >= 0) & (source < length)
    offset = (row + shift).to(tl.int64)[:, None] * x_row + column[None, :]
    return tl.load(x + offset, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)


@_jit
def _before_silu(
    x, taps, bias, row, position, rows, length, channels, column, inside, x_row, reverse, direction,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + direction * channels + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        tap = tl.load(taps + (direction * K + k) * channels + column, mask=inside, other=0.0).to(tl.float32)
        shift = _shift(k, reverse, direction, K)
        total += _tile(x, row, position, shift, rows, length, column, inside, x_row) * tap[None, :]
    return total


@_jit
def _forward_kernel(
    x, taps, bias, u, rows, length, channels, x_row, reverse,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    direction = tl.program_id(2)
    u += direction * rows.to(tl.int64) * channels
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        y = _before_silu(
            x, taps, bias, row, row % length, rows, length, channels, column, inside, x_row, reverse, direction,
            K, HAS_BIAS, ROWS, COLUMNS,
        )  # fmt: skip
        y = y * tl.sigmoid(y)
        offset = row.to(tl.int64)[:, None] * channels + column[None, :]
        tl.store(u + offset, y, mask=(row < rows)[:, None] & inside[None, :])


@_jit
def _through_silu_kernel(
    du, x, taps, bias, dy, sums, rows, length, channels, x_row, reverse,
    K: tl.constexpr, SUMS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy, the gradient before the SiLU, and each program's sums of it times each tap's input, and of it alone."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    direction = tl.program_id(2)
    du += direction * rows.to(tl.int64) * channels
    dy += direction * rows.to(tl.int64) * channels
    which = tl.arange(0, SUMS)
    total = tl.zeros((SUMS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        position = row % length
        y = _before_silu(
            x, taps, bias, row, position, rows, length, channels, column, inside, x_row, reverse, direction,
            K, HAS_BIAS, ROWS, COLUMNS,
        )  # fmt: skip
        gate = tl.sigmoid(y)
        valid = (row < rows)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * channels + column[None, :]
        gradient = tl.load(du + offset, mask=valid, other=0.0).to(tl.float32) * gate * (1.0 + y * (1.0 - gate))
        tl.store(dy + offset, gradient, mask=valid)
        for k in tl.static_range(K):
            shift = _shift(k, reverse, direction, K)
            values = _tile(x, row, position, shift, rows, length, column, inside, x_row)
            total += tl.where((which == k)[:, None], tl.sum(gradient * values, axis=0)[None, :], 0.0)
        total += tl.where((which == K)[:, None], tl.sum(gradient, axis=0)[None, :], 0.0)
    sums += (tl.program_id(0) * tl.num_programs(2) + direction) * (K + 1) * channels
    tl.store(sums + which[:, None] * channels + column[None, :], total, mask=(which <= K)[:, None] & inside[None, :])


@_jit
def _input_kernel(
    dy, taps, dx, rows, length, channels, reverse,
    G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx: every output that read a step, through the tap by which it did."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        position = row % length
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for g in tl.static_range(G):
            source = dy + g * rows.to(tl.int64) * channels
            for k in tl.static_range(K):
                tap = tl.load(taps + (g * K + k) * channels + column, mask=inside, other=0.0).to(tl.float32)
                shift = -_shift(k, reverse, g, K)
                total += _tile(source, row, position, shift, rows, length, column, inside, channels) * tap[None, :]
        offset = row.to(tl.int64)[:, None] * channels + column[None, :]
        tl.store(dx + offset, total, mask=(row < rows)[:, None] & inside[None, :])


# ---- the op ---------------------------------------------------------------------------------------------------------
def _in_rows(x):
    """x with evenly spaced rows of contiguous channels, as a half of in_proj's output has them; and their spacing."""
    B, L, E = x.shape
    spacing = x.stride(1) if L > 1 else x.stride(0)  # the stride of an axis of one step says nothing
    if (E > 1 and x.stride(2) != 1) or (B > 1 and x.stride(0) != L * spacing):
        return x.contiguous(), E
    return x, spacing


def _launch(x, channels):
    rows = x.shape[0] * x.shape[1]
    programs = min(PROGRAMS, -(-rows // ROWS))
    return rows, (programs, -(-channels // COLUMNS))


@torch.library.custom_op(f"{NAMESPACE}::causal_conv1d_silu", mutates_args=())
def _conv_silu(x: Tensor, taps: Tensor, bias: Tensor | None, reverse: int) -> Tensor:
    G, K, E = taps.shape
    x, x_row = _in_rows(x)
    taps, bias = taps.contiguous(), None if bias is None else bias.contiguous()
    u = torch.empty((G, *x.shape), dtype=x.dtype, device=x.device)
    rows, grid = _launch(x, E)
    with on_device(x):
        _forward_kernel[(*grid, G)](
            x, taps, bias, u, rows, x.shape[1], E, x_row, reverse,
            K=K, HAS_BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
    return u


@_conv_silu.register_fake
def _(x, taps, bias, reverse):
    return x.new_empty((taps.shape[0], *x.shape))


@torch.library.custom_op(f"{NAMESPACE}::causal_conv1d_silu_backward", mutates_args=())
def _conv_silu_backward(
    du: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, reverse: int
) -> tuple[Tensor, Tensor, Tensor]:
    G, K, E = taps.shape
    x, x_row = _in_rows(x)
    du, taps, bias = du.contiguous(), taps.contiguous(), None if bias is None else bias.contiguous()
    rows, grid = _launch(x, E)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy = torch.empty_like(du)
    sums = torch.empty((grid[0], G, K + 1, E), dtype=torch.float32, device=x.device)
    with on_device(x):
        _through_silu_kernel[(*grid, G)](
            du, x, taps, bias, dy, sums, rows, x.shape[1], E, x_row, reverse,
            K=K, SUMS=1 << K.bit_length(), HAS_BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS,
        )  # fmt: skip
        _input_kernel[grid](
            dy, taps, dx, rows, x.shape[1], E, reverse, G=G, K=K, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS
        )  # fmt: skip
    sums = sums.sum(0)
    return dx, sums[:, :K].to(taps.dtype, copy=True), sums[:, K].to(taps.dtype, copy=True)


@_conv_silu_backward.register_fake
def _(du, x, taps, bias, reverse):
    return x.new_empty(x.shape), taps.new_empty(taps.shape), taps.new_empty((taps.shape[0], taps.shape[2]))


def _setup_context(ctx, inputs, output):
    x, taps, bias, ctx.reverse = inputs
    ctx.save_for_backward(x, taps, bias)


def _backward(ctx, du):
    x, taps, bias = ctx.saved_tensors
    op = getattr(torch.ops, NAMESPACE).causal_conv1d_silu_backward
    dx, dtaps, dbias = op(du, x, taps, bias, ctx.reverse)
    return dx, dtaps, None if bias is None else dbias.to(bias.dtype), None


_conv_silu.register_autograd(_backward, setup_context=_setup_context)


def _register_flops():
    """Tell torch.utils.flop_counter what a convolution costs: a multiply-accumulate a tap, output channel and step."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    op = getattr(torch.ops, NAMESPACE).causal_conv1d_silu
    if op not in flop_registry:
        register_flop_formula(op)(lambda x, taps, *args, **kwargs: 2 * math.prod(x) * taps[0] * taps[1])


_register_flops()
