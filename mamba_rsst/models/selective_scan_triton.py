"""The selective scan on NVIDIA GPUs, forward and backward, as fused Triton kernels.

One program is one warp: it walks through time for `TILE_E` channels of one sequence and direction. Softplus, the bias
of the time step and the skip are computed on the way; a direction that runs backwards in time only indexes backwards.

- Forward: `_forward_kernel` writes y and, for the backward pass, the state that enters every chunk of `CHUNK` steps.
- Backward: `_backward_kernel` goes from the last chunk to the first, recomputes the states of one chunk from the saved
  one, then carries the adjoint through it. Sums over channels (dB, dC) are taken inside the warp and then over partial
  buffers, never by atomics, so that every run gives the same result.
- Few long sequences give too few programs to fill a GPU. Then time is split into segments: `_segment_kernel` runs each
  of them from a zero state, `_combine_kernel` chains their ends, and the kernels above start every segment where it
  should start.

Only torch and triton are needed; without triton the module still imports, and `unusable` says why it cannot run.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

# Legend: G directions, B batch, L length, E d_inner, N d_state
# Inside the kernels, N is padded to whole tiles; a "tile" is (tile_n, TILE_E), a few states of a program's channels.
CHUNK = 8  # time steps between two saved states; `_sum_channels` folds just as many rows
LANES = 32
TILE_E = 64  # two channels a lane: loads of B and C, and sums over lanes, serve both
QUAD = 4  # the kernels' own buffers of states are (..., N / QUAD, E, QUAD): 16 bytes a lane, whole lines a warp
FORWARD_TILE_N = 4
BACKWARD_TILE_N = 2  # a chunk of a tile, states and decays, stays in registers
FORWARD_OPTIONS = dict(num_warps=1, maxnreg=128, enable_fp_fusion=True)
BACKWARD_OPTIONS = dict(num_warps=1, enable_fp_fusion=True)
GROUP_N = 16  # states that a forward program keeps in registers; a larger N is shared by several programs
FULL = 2048  # programs that fill a GPU (about 16 warps on each of 132 multiprocessors)
SHORTEST_SEGMENT = 8  # chunks

# The same, as kernels may read them.
_CHUNK, _LANES, _TILE_E, _QUAD = (tl.constexpr(size) for size in (CHUNK, LANES, TILE_E, QUAD))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SIZES = [  # run-time integers on whose values no kernel is specialized
    *("batch", "length", "channels", "segments", "segment_chunks", "reverse", "parts", "size"),
    *(f"{tensor}_{axis}" for tensor in ("u", "delta", "dy") for axis in "gbl"),
]


def _jit(function):
    return function if triton is None else triton.jit(function, do_not_specialize=SIZES)


def unusable(device_type: str) -> str | None:
    """Why these kernels cannot run on that type of device, or None when they can."""
    if triton is None:
        return "the package `triton` is not installed."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device_type!r}."
    if not torch.cuda.is_available():
        return "torch finds no CUDA device."
    if torch.version.hip is not None:
        return "the Triton kernels are written for warps of 32 lanes, which AMD GPUs do not have."
    return None


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@_jit
def _softplus(x):
    """max(x, 0) + log(1 + e^-|x|), exact to 2e-7 relative also where it is tiny: log1p(e) = e * polynomial(e)."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = e * 0.00512610212 - 0.0290740646
    p = p * e + 0.0775160866
    p = p * e - 0.136022476
    p = p * e + 0.190768807
    p = p * e - 0.24835399
    p = p * e + 0.333181217
    p = p * e - 0.49999445
    p = p * e + 0.999999966
    return p * e + tl.maximum(x, 0.0)


@_jit
def _sigmoid_of_softplus(s):
    """The derivative of softplus from its value, 1 - e^-s; a polynomial where the subtraction would cancel."""
    p = s * 0.00751360622 - 0.0414906541
    p = p * s + 0.166651082
    p = p * s - 0.499999515
    p = p * s + 0.999999998
    return tl.where(s < 0.25, p * s, 1.0 - tl.exp2(-s * LOG2E))


@_jit
def _step_size(raw, bias, SOFTPLUS: tl.constexpr):
    x = raw.to(tl.float32) + bias
    return _softplus(x) if SOFTPLUS else x


@_jit
def _time(position, length, backwards):
    """Index in memory of the step taken at `position`."""
    return tl.where(backwards, length - 1 - position, position).to(tl.int64)


@_jit
def _shift(i, position, length, backwards):
    """How far in memory the step i steps after `position` is from the one at `position`; at most the last step."""
    ahead = tl.minimum(i, length - 1 - position)
    return tl.where(backwards, -ahead, ahead)


@_jit
def _locate(channels, batch, segments, reverse, G: tl.constexpr, EVEN: tl.constexpr):
    """What this program works on: channels (clamped, with a mask of those to write), direction, sequence, ..."""
    blocks = tl.cdiv(channels, _TILE_E)
    rest = tl.program_id(0)
    block = rest % blocks
    rest = rest // blocks
    g = rest % G
    rest = rest // G
    b = rest % batch
    segment = rest // batch % segments
    group = rest // batch // segments
    # The contiguity of channels is hidden on purpose: wide loads would not match the layout of the tiles.
    e = block * _TILE_E + tl.max_contiguous(tl.arange(0, _TILE_E), 1)
    written = tl.full((_TILE_E,), True, tl.int1)
    if not EVEN:
        written = e < channels
        e = tl.minimum(e, channels - 1)
    return block, e, written, g.to(tl.int64), b.to(tl.int64), segment, group, ((reverse >> g) & 1) != 0


@_jit
def _private(j, e, channels, TILE_N: tl.constexpr):
    """Offsets of tile j in the layout (N / QUAD, E, QUAD) of the kernels' own buffers."""
    n = j * TILE_N + tl.arange(0, TILE_N)[:, None]
    return n // _QUAD * channels * _QUAD + e[None, :] * _QUAD + n % _QUAD


@_jit
def _natural(j, e, N: tl.constexpr, TILE_N: tl.constexpr):
    """Offsets of tile j in the layout (E, N) of A and of states that go in or out."""
    return e[None, :] * N + j * TILE_N + tl.arange(0, TILE_N)[:, None]


@_jit
def _fold(x0, x1, bit: tl.constexpr):
    """Halve two rows over the lanes: lanes without `bit` get the pair sums of x0, lanes with it those of x1."""
    lane = tl.broadcast_to(tl.arange(0, _LANES)[None, :], (x0.shape[0], _LANES))
    upper = (lane & bit) != 0
    kept = tl.where(upper, x1, x0)
    sent = tl.where(upper, x0, x1)
    return kept + tl.gather(sent, lane ^ bit, axis=1)


@_jit
def _sum_channels(rows):
    """Sum CHUNK rows, each (TILE_N, LANES), over the lanes: a butterfly that folds the rows into one as it goes.

    9 shuffles a state instead of 40. Returns (TILE_N, LANES), where lane l has the sum of row `_row_of_lane`.
    """
    x0, x1 = _fold(rows[0], rows[1], 16), _fold(rows[2], rows[3], 16)
    x2, x3 = _fold(rows[4], rows[5], 16), _fold(rows[6], rows[7], 16)
    x = _fold(_fold(x0, x1, 8), _fold(x2, x3, 8), 4)
    lane = tl.broadcast_to(tl.arange(0, _LANES)[None, :], (x.shape[0], _LANES))
    x += tl.gather(x, lane ^ 2, axis=1)
    x += tl.gather(x, lane ^ 1, axis=1)
    return x


@_jit
def _row_of_lane():
    lane = tl.arange(0, _LANES)
    return (lane // 16 % 2) + 2 * (lane // 8 % 2) + 4 * (lane // 4 % 2)


@_jit
def _add_channels_of_lane(x):
    """(TILE_N, _TILE_E) -> (TILE_N, _LANES): no lane needs another's data."""
    return tl.sum(tl.reshape(x, (x.shape[0], _TILE_E // _LANES, _LANES)), axis=1)


@_jit
def _forward_kernel(
    u, delta, A, B, C, D, delta_bias, start, y, last_state, states,
    u_g, u_b, u_l, delta_g, delta_b, delta_l, batch, length, channels, segments, segment_chunks, reverse,
    G: tl.constexpr, N: tl.constexpr, TILE_N: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_START: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y, checkpoints and the last state, for TILES tiles of states. start: (G, B, segments, E, N)."""
    block, e, written, g, b, segment, group, backwards = _locate(channels, batch, segments, reverse, G, EVEN)
    sequence = g * batch + b
    begin = segment * segment_chunks * _CHUNK
    stop = tl.minimum(begin + segment_chunks * _CHUNK, length)
    t = _time(begin, length, backwards)
    direction = tl.where(backwards, -1, 1)
    u += g * u_g + b * u_b + t * u_l
    delta += g * delta_g + b * delta_b + t * delta_l
    B += (sequence * length + t) * N + group * TILES * TILE_N
    C += (sequence * length + t) * N + group * TILES * TILE_N
    y += (((group * G + g) * batch + b) * length + t) * channels
    state_size = channels.to(tl.int64) * N
    states += sequence * tl.cdiv(length, _CHUNK) * state_size
    n = tl.arange(0, TILE_N)[:, None]

    bias = tl.load(delta_bias + g * channels + e) if HAS_BIAS else 0.0
    if HAS_D:
        skip = tl.load(D + g * channels + e) * (group == 0)
    rates, hs = (), ()
    for j in tl.static_range(TILES):
        natural = _natural(group * TILES + j, e, N, TILE_N)
        rates = rates + (tl.load(A + g * channels * N + natural) * LOG2E,)
        if HAS_START:
            hs = hs + (tl.load(start + (sequence * segments + segment) * state_size + natural),)
        else:
            hs = hs + (tl.zeros((TILE_N, _TILE_E), tl.float32),)

    next_u, next_delta = tl.load(u + e), tl.load(delta + e)
    for count in range(0, stop - begin):
        position = begin + count
        if SAVE:  # known at compile time, unlike the next  # noqa: SIM102
            if position % _CHUNK == 0:
                for j in tl.static_range(TILES):
                    tile = _private(group * TILES + j, e, channels, TILE_N)
                    tl.store(states + position // _CHUNK * state_size + tile, hs[j], mask=written[None, :])
        x = next_u.to(tl.float32)
        dt = _step_size(next_delta, bias, SOFTPLUS)
        ahead = tl.where(position + 1 < stop, direction, 0)  # the next step's inputs are fetched during this one
        u += ahead * u_l
        delta += ahead * delta_l
        next_u, next_delta = tl.load(u + e), tl.load(delta + e)
        inflow = dt * x
        total = skip * x if HAS_D else tl.zeros((_TILE_E,), tl.float32)
        new = ()
        for j in tl.static_range(TILES):
            h = tl.exp2(dt[None, :] * rates[j]) * hs[j] + inflow[None, :] * tl.load(B + j * TILE_N + n)
            total += tl.sum(h * tl.load(C + j * TILE_N + n), axis=0)
            new = new + (h,)
        hs = new
        tl.store(y + e, total.to(y.dtype.element_ty), mask=written)
        B += direction * N
        C += direction * N
        y += direction * channels

    if segment == segments - 1:
        for j in tl.static_range(TILES):
            natural = _natural(group * TILES + j, e, N, TILE_N)
            tl.store(last_state + sequence * state_size + natural, hs[j], mask=written[None, :])


@_jit
def _backward_kernel(
    dy, u, delta, A, B, C, D, delta_bias, states, start,
    du, ddelta, dBC, dA, dD, dbias, adjoint,
    dy_g, dy_b, dy_l, u_g, u_b, u_l, delta_g, delta_b, delta_l,
    batch, length, channels, segments, segment_chunks, reverse,
    G: tl.constexpr, N: tl.constexpr, TILE_N: tl.constexpr, EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """All gradients, from the adjoints q_t = exp(delta_{t+1} A) dLoss/dh_{t+1} that enter a step from the future.

    start: (G, B, segments, E, N), the adjoint that enters each segment. adjoint, dA: (G, B, segments, private states);
    they carry q and the sum for dA from chunk to chunk, so that adjoint ends as that of the state before the segment.
    dBC: (2, blocks of channels, G, B, L, N). dD, dbias: (G, B, segments, E).
    """
    block, e, written, g, b, segment, group, backwards = _locate(channels, batch, segments, reverse, G, EVEN)
    chunks = tl.cdiv(length, _CHUNK)
    sequence = g * batch + b
    part = sequence * segments + segment
    dy += g * dy_g + b * dy_b
    u += g * u_g + b * u_b
    delta += g * delta_g + b * delta_b
    A += g * channels * N
    B += sequence * length * N
    C += sequence * length * N
    state_size = channels.to(tl.int64) * N
    states += sequence * chunks * state_size
    du += sequence * length * channels
    ddelta += sequence * length * channels
    dB = dBC + (block * G * batch + sequence) * length * N
    dC = dB + tl.cdiv(channels, _TILE_E).to(tl.int64) * G * batch * length * N
    adjoint += part * state_size
    dA += part * state_size
    n = tl.arange(0, TILE_N)[:, None]

    bias = tl.load(delta_bias + g * channels + e) if HAS_BIAS else 0.0
    if HAS_D:
        skip = tl.load(D + g * channels + e)
    dD_sum = tl.zeros((_TILE_E,), tl.float32)
    dbias_sum = tl.zeros((_TILE_E,), tl.float32)
    for j in range(0, N // TILE_N):
        if HAS_START:
            q = tl.load(start + part * state_size + _natural(j, e, N, TILE_N))
        else:
            q = tl.zeros((TILE_N, _TILE_E), tl.float32)
        tl.store(adjoint + _private(j, e, channels, TILE_N), q, mask=written[None, :])
        tl.store(dA + _private(j, e, channels, TILE_N), tl.zeros((TILE_N, _TILE_E), tl.float32), mask=written[None, :])

    first = segment * segment_chunks
    end = tl.minimum(first + segment_chunks, chunks)
    saved = tl.load(states + (end - 1) * state_size + _private(0, e, channels, TILE_N))
    for count in range(0, end - first):
        tl.debug_barrier()  # the carried tiles are written before they are read again
        chunk = end - 1 - count
        position = chunk * _CHUNK
        t = _time(position, length, backwards)
        dts, inflows, dys, by_rate, by_input = (), (), (), (), ()
        for i in tl.static_range(_CHUNK):
            shift = _shift(i, position, length, backwards)
            inside = position + i < length
            dt = _step_size(tl.load(delta + t * delta_l + shift * delta_l + e), bias, SOFTPLUS)
            dt = tl.where(inside, dt, 0.0)  # beyond the end, the state stays as it is
            mask = tl.where(inside, written, False)  # what sums over channels reads is 0 outside
            x = tl.load(u + t * u_l + shift * u_l + e, mask=mask, other=0.0).to(tl.float32)
            dts = dts + (dt,)
            inflows = inflows + (dt * x,)
            dys = dys + (tl.load(dy + t * dy_l + shift * dy_l + e, mask=mask, other=0.0).to(tl.float32),)
            by_rate = by_rate + (tl.zeros((_TILE_E,), tl.float32),)
            by_input = by_input + (tl.zeros((_TILE_E,), tl.float32),)

        for j in range(0, N // TILE_N):
            tiled = _private(j, e, channels, TILE_N)
            rate = tl.load(A + _natural(j, e, N, TILE_N)) * LOG2E
            h = saved  # and the next tile's is fetched meanwhile
            last = j + 1 == N // TILE_N
            next_chunk = tl.maximum(tl.where(last, chunk - 1, chunk), first)
            next_tile = _private(tl.where(last, 0, j + 1), e, channels, TILE_N)
            saved = tl.load(states + next_chunk * state_size + next_tile)
            q = tl.load(adjoint + tiled)
            dA_sum = tl.load(dA + tiled)
            decays, entering, rows = (), (), ()
            for i in tl.static_range(_CHUNK):
                shift = _shift(i, position, length, backwards)
                decay = tl.exp2(dts[i][None, :] * rate)
                entering = entering + (h,)
                decays = decays + (decay,)
                h = decay * h + inflows[i][None, :] * tl.load(B + t * N + shift * N + j * TILE_N + n)
                rows = rows + (_add_channels_of_lane(dys[i][None, :] * h),)
            dC_rows = _sum_channels(rows)

            rows, new_by_rate, new_by_input = (), (), ()
            for i in tl.static_range(_CHUNK - 1, -1, -1):
                shift = _shift(i, position, length, backwards)
                dh = dys[i][None, :] * tl.load(C + t * N + shift * N + j * TILE_N + n) + q
                rows = rows + (_add_channels_of_lane(dh * inflows[i][None, :]),)
                q = dh * decays[i]
                dlog_decay = q * entering[i]  # dLoss / d(delta A)
                dA_sum += dlog_decay * dts[i][None, :]
                new_by_rate = (by_rate[i] + tl.sum(dlog_decay * rate, axis=0),) + new_by_rate
                new_by_input = (
                    by_input[i] + tl.sum(dh * tl.load(B + t * N + shift * N + j * TILE_N + n), axis=0),
                ) + new_by_input
            dB_rows = _sum_channels(rows)
            by_rate, by_input = new_by_rate, new_by_input
            tl.store(adjoint + tiled, q, mask=written[None, :])
            tl.store(dA + tiled, dA_sum, mask=written[None, :])

            lane = tl.arange(0, _LANES)
            row = position + _row_of_lane()
            stored = tl.where(lane % (_LANES // _CHUNK) == 0, row, length) < length
            offset = _time(row, length, backwards)[None, :] * N + j * TILE_N + n
            tl.store(dC + offset, dC_rows, mask=stored[None, :])
            row = position + _CHUNK - 1 - _row_of_lane()
            stored = tl.where(lane % (_LANES // _CHUNK) == 0, row, length) < length
            offset = _time(row, length, backwards)[None, :] * N + j * TILE_N + n
            tl.store(dB + offset, dB_rows, mask=stored[None, :])

        for i in tl.static_range(_CHUNK):
            shift = _shift(i, position, length, backwards)
            inside = position + i < length
            mask = tl.where(inside, written, False)
            x = tl.load(u + t * u_l + shift * u_l + e, mask=mask, other=0.0).to(tl.float32)
            ddt = by_rate[i] * LN2 + by_input[i] * x
            if SOFTPLUS:
                ddt = ddt * _sigmoid_of_softplus(dts[i])
            dx = by_input[i] * dts[i]
            if HAS_D:
                dx += dys[i] * skip
            dbias_sum += tl.where(inside, ddt, 0.0)
            dD_sum += dys[i] * x
            tl.store(ddelta + t * channels + shift * channels + e, ddt.to(ddelta.dtype.element_ty), mask=mask)
            tl.store(du + t * channels + shift * channels + e, dx.to(du.dtype.element_ty), mask=mask)

    tl.store(dD + part * channels + e, dD_sum, mask=written)
    tl.store(dbias + part * channels + e, dbias_sum, mask=written)


@_jit
def _segment_kernel(
    x, delta, A, M, delta_bias, ends, totals,
    u_g, u_b, u_l, delta_g, delta_b, delta_l, batch, length, channels, segments, segment_chunks, reverse,
    G: tl.constexpr, N: tl.constexpr, TILE_N: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """What leaves each segment if zero enters it, and the sum of its time steps.

    Forward, with x = u and M = B: the state after its last step; all segments but the last. ADJOINT, with x = dy and
    M = C: the adjoint before its first step; all segments but the first.
    """
    block, e, written, g, b, segment, group, backwards = _locate(channels, batch, segments - 1, reverse, G, EVEN)
    segment += ADJOINT
    sequence = g * batch + b
    part = sequence * segments + segment
    begin = segment * segment_chunks * _CHUNK
    stop = tl.minimum(begin + segment_chunks * _CHUNK, length)
    t = _time(stop - 1 if ADJOINT else begin, length, backwards)
    direction = tl.where(backwards, -1, 1)
    if ADJOINT:
        direction = -direction
    x += g * u_g + b * u_b + t * u_l
    delta += g * delta_g + b * delta_b + t * delta_l
    M += (sequence * length + t) * N + group * TILES * TILE_N
    n = tl.arange(0, TILE_N)[:, None]
    bias = tl.load(delta_bias + g * channels + e) if HAS_BIAS else 0.0
    rates, hs = (), ()
    for j in tl.static_range(TILES):
        rates = rates + (tl.load(A + g * channels * N + _natural(group * TILES + j, e, N, TILE_N)) * LOG2E,)
        hs = hs + (tl.zeros((TILE_N, _TILE_E), tl.float32),)
    total = tl.zeros((_TILE_E,), tl.float32)

    next_x, next_delta = tl.load(x + e), tl.load(delta + e)
    for count in range(0, stop - begin):
        position = begin + count
        inflow = next_x.to(tl.float32)
        dt = _step_size(next_delta, bias, SOFTPLUS)
        ahead = tl.where(position + 1 < stop, direction, 0)
        x += ahead * u_l
        delta += ahead * delta_l
        next_x, next_delta = tl.load(x + e), tl.load(delta + e)
        total += dt
        if not ADJOINT:
            inflow = inflow * dt
        new = ()
        for j in tl.static_range(TILES):
            decay = tl.exp2(dt[None, :] * rates[j])
            inflow_tile = inflow[None, :] * tl.load(M + j * TILE_N + n)
            if ADJOINT:
                new = new + (decay * (hs[j] + inflow_tile),)
            else:
                new = new + (decay * hs[j] + inflow_tile,)
        hs = new
        M += direction * N

    for j in tl.static_range(TILES):
        natural = _natural(group * TILES + j, e, N, TILE_N)
        tl.store(ends + part * channels * N + natural, hs[j], mask=written[None, :])
    tl.store(totals + part * channels + e, total, mask=tl.where(group == 0, written, False))


@_jit
def _combine_kernel(
    ends, totals, A, outer, batch, segments, size,
    G: tl.constexpr, N: tl.constexpr, HAS_OUTER: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace what leaves each segment by what enters it, in place. size = E * N; outer: what enters the whole."""
    blocks = tl.cdiv(size, BLOCK)  # a state has fewer than 2^31 elements, all segments together may not
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    size = size.to(tl.int64)
    ends += sequence * segments * size
    totals += sequence * segments * (size // N)
    rate = tl.load(A + sequence // batch * size + index, mask=mask, other=0.0) * LOG2E
    if HAS_OUTER:
        carry = tl.load(outer + sequence * size + index, mask=mask, other=0.0)
    else:
        carry = tl.zeros((BLOCK,), tl.float32)
    for count in range(0, segments):
        segment = segments - 1 - count if ADJOINT else count
        more = tl.where(count + 1 < segments, mask, False)  # nothing is stored of the segment that nothing follows
        end = tl.load(ends + segment * size + index, mask=more, other=0.0)
        total = tl.load(totals + segment * (size // N) + index // N, mask=more, other=0.0)
        tl.store(ends + segment * size + index, carry, mask=mask)
        carry = tl.exp2(rate * total) * carry + end


@_jit
def _sum_parts_kernel(dBC, dB, dC, parts, size, BLOCK: tl.constexpr):
    """dB and dC from the sums over blocks of channels. dBC: (2, parts, size)."""
    which = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    size = size.to(tl.int64)
    dBC += which * parts * size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(dBC + part * size + index, mask=mask, other=0.0)
    if which == 0:
        tl.store(dB + index, total.to(dB.dtype.element_ty), mask=mask)
    else:
        tl.store(dC + index, total.to(dC.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Entry points
# --------------------------------------------------------------------------------------------------------------------


def states_shape(G, B, L, E, N, device=None):
    """Shape of the saved states, fp32: the one before each chunk, in tiles."""
    return (G, B, _cdiv(L, CHUNK), _padded(N) // QUAD, E, QUAD)


def scan_forward(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse, save):
    """u, delta (G,B,L,E); A (G,E,N); B, C (G,B,L,N). Returns y (G,B,L,E), last state (G,B,E,N), chunk states."""
    G, batch, L, E = u.shape
    N = A.shape[-1]
    u, delta = _unit_stride(u), _unit_stride(delta)
    A, B, C, initial_state = (_dense(x, pad=_padded(N) - N) for x in (A, B, C, initial_state))
    D, delta_bias = _dense(D), _dense(delta_bias)
    padded = A.shape[-1]
    groups = _cdiv(padded, GROUP_N)
    fp32 = dict(dtype=torch.float32, device=u.device)
    y = torch.empty((groups, G, batch, L, E), device=u.device, dtype=u.dtype if groups == 1 else torch.float32)
    last_state = torch.empty((G, batch, E, padded), **fp32)
    states = torch.empty(states_shape(G, batch, L, E, N) if save else (0,), **fp32)
    common = dict(G=G, N=padded, EVEN=E % TILE_E == 0, SOFTPLUS=delta_softplus, HAS_BIAS=delta_bias is not None)

    sequences = groups * G * batch * _cdiv(E, TILE_E)
    segments, segment_chunks = _segments(sequences, L)
    start = initial_state
    if segments > 1:
        start = _segment_starts(
            u, delta, A, B, delta_bias, initial_state, segments, segment_chunks, reverse, common, adjoint=False
        )
    with on_device(u):
        _forward_kernel[(sequences * segments,)](
            u, delta, A, B, C, D, delta_bias, start, y, last_state, states,
            *u.stride()[:3], *delta.stride()[:3], batch, L, E, segments, segment_chunks, reverse,
            **common, TILE_N=FORWARD_TILE_N, TILES=padded // groups // FORWARD_TILE_N,
            HAS_D=D is not None, HAS_START=start is not None, SAVE=save, **FORWARD_OPTIONS,
        )  # fmt: skip
    y = y[0] if groups == 1 else y.sum(0).to(u.dtype)
    return y, last_state if padded == N else last_state[..., :N].contiguous(), states


def scan_backward(dy, dlast_state, u, delta, A, B, C, D, delta_bias, initial_state, states, delta_softplus, reverse):
    """Gradients of u, delta, A, B, C, D, delta_bias, initial_state, in their dtypes; None for those not given."""
    inputs = dict(A=A, B=B, C=C, D=D, delta_bias=delta_bias, initial_state=initial_state)
    G, batch, L, E = u.shape
    N = A.shape[-1]
    dy, u, delta = _unit_stride(dy), _unit_stride(u), _unit_stride(delta)
    A, B, C, dlast_state = (_dense(x, pad=_padded(N) - N) for x in (A, B, C, dlast_state))
    D, delta_bias = _dense(D), _dense(delta_bias)
    padded = A.shape[-1]
    blocks = _cdiv(E, TILE_E)
    common = dict(G=G, N=padded, EVEN=E % TILE_E == 0, SOFTPLUS=delta_softplus, HAS_BIAS=delta_bias is not None)

    segments, segment_chunks = _segments(G * batch * blocks, L)
    start = dlast_state
    if segments > 1:
        start = _segment_starts(
            dy, delta, A, C, delta_bias, dlast_state, segments, segment_chunks, reverse, common, adjoint=True
        )
    fp32 = dict(dtype=torch.float32, device=u.device)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    ddelta = torch.empty(delta.shape, dtype=delta.dtype, device=u.device)
    dBC = torch.empty((2, blocks, *B.shape), **fp32)
    adjoint = torch.empty((G, batch, segments, padded // QUAD, E, QUAD), **fp32)
    dA = torch.empty_like(adjoint)
    dD = torch.empty((G, batch, segments, E), **fp32)
    dbias = torch.empty_like(dD)
    dB, dC = (torch.empty(x.shape, dtype=inputs[name].dtype, device=u.device) for name, x in (("B", B), ("C", C)))
    with on_device(u):
        _backward_kernel[(G * batch * blocks * segments,)](
            dy, u, delta, A, B, C, D, delta_bias, states, start,
            du, ddelta, dBC, dA, dD, dbias, adjoint,
            *dy.stride()[:3], *u.stride()[:3], *delta.stride()[:3], batch, L, E, segments, segment_chunks, reverse,
            **common, TILE_N=BACKWARD_TILE_N, HAS_D=D is not None, HAS_START=start is not None, **BACKWARD_OPTIONS,
        )  # fmt: skip
        _sum_parts_kernel[(_cdiv(dB.numel(), 256), 2)](dBC, dB, dC, blocks, dB.numel(), BLOCK=256, num_warps=2)
    grads = dict(
        A=_untile(dA.sum((1, 2))),
        B=dB,
        C=dC,
        D=dD.sum((1, 2)),
        delta_bias=dbias.sum((1, 2)),
        initial_state=_untile(adjoint[:, :, 0]),
    )
    for name in ("A", "B", "C", "initial_state"):
        if padded != N:
            grads[name] = grads[name][..., :N]
    return du, ddelta, *(None if x is None else grads[name].contiguous().to(x.dtype) for name, x in inputs.items())


def _segment_starts(x, delta, A, M, delta_bias, outer, segments, segment_chunks, reverse, common, adjoint):
    """(G, B, segments, E, N): the states, or the adjoints, that enter the segments."""
    G, batch, L, E = x.shape
    N = A.shape[-1]
    groups = _cdiv(N, GROUP_N)
    starts = torch.empty((G, batch, segments, E, N), dtype=torch.float32, device=x.device)
    totals = torch.empty((G, batch, segments, E), dtype=torch.float32, device=x.device)
    with on_device(x):
        _segment_kernel[(groups * G * batch * _cdiv(E, TILE_E) * (segments - 1),)](
            x, delta, A, M, delta_bias, starts, totals,
            *x.stride()[:3], *delta.stride()[:3], batch, L, E, segments, segment_chunks, reverse,
            **common, TILE_N=FORWARD_TILE_N, TILES=N // groups // FORWARD_TILE_N, ADJOINT=adjoint, **FORWARD_OPTIONS,
        )  # fmt: skip
        _combine_kernel[(G * batch * _cdiv(E * N, 128),)](
            starts, totals, A, outer, batch, segments, E * N,
            G=G, N=N, HAS_OUTER=outer is not None, ADJOINT=adjoint, BLOCK=128, num_warps=4,
        )  # fmt: skip
    return starts


def _segments(programs, length):
    """Into how many segments of how many chunks time is split, for that many programs a segment."""
    chunks = _cdiv(length, CHUNK)
    wanted = 1 if 2 * programs > FULL else _cdiv(FULL, programs)
    segment_chunks = _cdiv(chunks, max(1, min(wanted, chunks // SHORTEST_SEGMENT)))
    return _cdiv(chunks, segment_chunks), segment_chunks


def _padded(N):
    """N rounded up to whole tiles, and to whole groups when there are several."""
    unit = FORWARD_TILE_N if N <= GROUP_N else GROUP_N
    return _cdiv(N, unit) * unit


def _untile(x):
    """(..., N / QUAD, E, QUAD) -> (..., E, N)"""
    return x.transpose(-3, -2).flatten(-2)


def _dense(x, pad=0):
    """fp32 and contiguous, with zeros after the last axis."""
    if x is None:
        return None
    x = x.float().contiguous()
    return F.pad(x, (0, pad)) if pad else x


def _unit_stride(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x):
    """Kernels start on the current device, which must be that of their tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _cdiv(a, b):
    return -(-a // b)
