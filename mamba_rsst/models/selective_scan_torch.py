"""The selective scan in pure torch: chunked over time, backward by recomputation. Any device, any float dtype.

Why it is fast. The state is laid out (…, N, E), so every inner loop runs contiguously over channels. Time is the
outermost axis of the work buffers, so a step of the recurrence is one `addcmul` on a contiguous slice. Work goes in
tiles of batch rows and chunks of steps whose buffers stay in the cache. The read-out C h and the gradients of B, C and
delta are batched matrix products. The forward keeps one state a chunk, and the backward recomputes the rest chunk by
chunk, so no (B, L, E, N) tensor ever exists.
"""

# Legend: G directions, B batch (Z = rows of one tile), L length, E d_inner, N d_state, n steps of one chunk
import math

import torch
import torch.nn.functional as F


# Elements of one step's state in a tile, and of a chunk of steps, at most. CPU: a chunk's buffers stay near the cores,
# and a step is long enough to be shared out over threads. Elsewhere: long enough to hide the launch of a kernel.
_STEP_ELEMENTS = {"cpu": 1 << 17}
_STEP_ELEMENTS_DEFAULT = 1 << 22
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_DEFAULT = 1 << 27
# Steps of a chunk. Fewer keep more states for the backward, more make larger buffers.
_LEAST_STEPS, _MOST_STEPS = 8, 128


def states_shape(G, B, L, E, N, device):
    """Shape of the saved chunk states."""
    return (G, _ceil_div(L, _chunk_steps(G, B, L, E, N, device)), B, N, E)


def scan_forward(u, delta, A, B, C, D, delta_bias, initial_state, delta_softplus, reverse, save):
    """u, delta (G,B,L,E); A (G,E,N); B, C (G,B,L,N). Returns y (G,B,L,E), last state (G,B,E,N), chunk states."""
    dtype = _compute_dtype(u)
    G, Z, L, E = u.shape
    N = A.shape[-1]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((G, Z, E, N), dtype=dtype, device=u.device)
    states = torch.empty(states_shape(G, Z, L, E, N, u.device) if save else (0,), dtype=dtype, device=u.device)
    steps = _chunk_steps(G, Z, L, E, N, u.device)
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        for tile in _tiles(G, Z, E, N, reverse, u.device):
            decay_rate = tile.by_direction(A, dtype).mul(log_base(u.device)).transpose(1, 2).contiguous()[:, None]
            skip, bias = (None if x is None else tile.by_direction(x, dtype)[:, None] for x in (D, delta_bias))
            buffers = torch.empty((2, steps, tile.G, tile.Z, N, E), dtype=dtype, device=u.device)
            h = tile.start(initial_state, dtype, (N, E), u.device)
            for k, (s, e) in enumerate(_chunks(L, steps)):
                n = e - s
                if save:
                    tile.states(states, k).copy_(h)
                x, b, c = (tile.load(v, s, e, dtype) for v in (u, B, C))
                dt = _step_size(tile.load(delta, s, e, dtype), bias, delta_softplus)
                decay, state = buffers[0, :n], buffers[1, :n]
                exp_(torch.mul(dt[:, :, :, None], decay_rate, out=decay))
                torch.mul((dt * x)[:, :, :, None], b[..., None], out=state)
                _recur_(state, decay, h)
                h.copy_(state[-1])
                out = _contract(c, state)
                tile.store(y, out if skip is None else out.addcmul_(x, skip), s, e)
            tile.rows_of(last).copy_(h.transpose(-1, -2))
    return y, last, states


def scan_backward(dy, dlast_state, u, delta, A, B, C, D, delta_bias, initial_state, states, delta_softplus, reverse):
    """Gradients of u, delta, A, B, C, D, delta_bias, initial_state, in that order and their dtypes; None if absent."""
    dtype = _compute_dtype(u)
    device = u.device
    G, Z, L, E = u.shape
    N = A.shape[-1]
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (u, delta, B, C))
    dA = torch.zeros((G, N, E), dtype=dtype, device=device)
    size = _chunk_steps(G, Z, L, E, N, device)
    dD, dbias = (None if x is None else torch.zeros((G, E), dtype=dtype, device=device) for x in (D, delta_bias))
    dstart = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for tile in _tiles(G, Z, E, N, reverse, device):
            At = tile.by_direction(A, dtype).transpose(1, 2).contiguous()[:, None]
            decay_rate = At * log_base(device)
            skip, bias = (None if x is None else tile.by_direction(x, dtype)[:, None] for x in (D, delta_bias))
            decays, grads = torch.empty((2, size, tile.G, tile.Z, N, E), dtype=dtype, device=device)
            history = torch.empty((size + 1, tile.G, tile.Z, N, E), dtype=dtype, device=device)
            dA_tile = torch.zeros((tile.G, tile.Z, N, E), dtype=dtype, device=device)
            carry = tile.start(dlast_state, dtype, (N, E), device)
            for k, (s, e) in reversed(list(enumerate(_chunks(L, size)))):
                n = e - s
                x, b, c, g = (tile.load(v, s, e, dtype) for v in (u, B, C, dy))
                raw = tile.load(delta, s, e, dtype)
                dt = _step_size(raw, bias, delta_softplus)
                dtx = dt * x
                # Forward again through this chunk, from its saved state: history[t] is the state before step t.
                decay, before, after = decays[:n], history[:n], history[1 : n + 1]
                history[0].copy_(tile.states(states, k))
                exp_(torch.mul(dt[:, :, :, None], decay_rate, out=decay))
                torch.mul(dtx[:, :, :, None], b[..., None], out=after)
                _recur_(after, decay, history[0])
                # dh_t = C_t dy_t + decay_{t+1} dh_{t+1}
                dh = torch.mul(c[..., None], g[:, :, :, None], out=grads[:n])
                dh[-1].add_(carry)
                steps, decay_steps = dh.unbind(0), decay.unbind(0)
                for t in range(n - 2, -1, -1):
                    torch.addcmul(steps[t], decay_steps[t + 1], steps[t + 1], out=steps[t])
                tile.store(dC, _contract_channels(g, after), s, e)
                tile.store(dB, _contract_channels(dtx, dh), s, e)
                ddtx = _contract(b, dh)
                dh.mul_(decay)
                carry.copy_(dh[0])
                dh.mul_(before)  # d loss / d (delta A) for every step, state and channel
                for t in range(n):
                    dA_tile.addcmul_(steps[t], dt[t][:, :, None])
                ddt = dh.mul_(At).sum(dim=-2).addcmul_(ddtx, x)
                if delta_softplus:
                    ddt.mul_(torch.sigmoid(raw if bias is None else raw + bias))
                if bias is not None:
                    tile.add(dbias, ddt.sum(dim=(0, 2)))
                dx = ddtx.mul_(dt)
                if skip is not None:
                    tile.add(dD, (g * x).sum(dim=(0, 2)))
                    dx.addcmul_(g, skip)
                tile.store(ddelta, ddt, s, e)
                tile.store(du, dx, s, e)
            tile.add(dA, dA_tile.sum(dim=1))
            if dstart is not None:
                tile.rows_of(dstart).copy_(carry.transpose(-1, -2))
    dA = dA.transpose(1, 2).to(A.dtype, copy=True).contiguous()
    dD, dbias = (None if g is None else g.to(x.dtype) for g, x in ((dD, D), (dbias, delta_bias)))
    return du, ddelta, dA, dB, dC, dD, dbias, dstart


class _Tile:
    """Some batch rows of one direction, or of all: reads them time-major, in the direction's own order of time."""

    def __init__(self, directions, rows, reverse):
        self.directions, self.rows, self.reverse = directions, rows, reverse
        self.G, self.Z = len(range(*directions.indices(1 << 30))), rows.stop - rows.start

    def _window(self, x, i, s, e):
        """The steps s..e of direction i, counted in its own order of time, as a view in natural order, and a flag."""
        g = self.directions.start + i
        backwards = bool((self.reverse >> g) & 1)
        L = x.shape[2]
        return x[g, self.rows, L - e : L - s] if backwards else x[g, self.rows, s:e], backwards

    def load(self, x, s, e, dtype):
        """(G,B,L,·) -> contiguous (n,G,Z,·), not to be written to."""
        if self.G == self.Z == 1 and x.dtype == dtype:  # one sequence is time-major as it lies
            view, backwards = self._window(x, 0, s, e)
            if not backwards:
                return view.transpose(0, 1)[:, None].contiguous()
        out = torch.empty((e - s, self.G, self.Z, x.shape[-1]), dtype=dtype, device=x.device)
        for i in range(self.G):
            view, backwards = self._window(x, i, s, e)
            out[:, i].copy_((view.flip(1) if backwards else view).transpose(0, 1))
        return out

    def store(self, x, values, s, e):
        """The reverse of `load`."""
        for i in range(self.G):
            view, backwards = self._window(x, i, s, e)
            part = values[:, i].transpose(0, 1)
            view.copy_(part.flip(1) if backwards else part)

    def start(self, state, dtype, shape, device):
        """A copy of a given state (G,B,E,N) as (G,Z,N,E), or zeros: the scan writes over it."""
        if state is None:
            return torch.zeros((self.G, self.Z, *shape), dtype=dtype, device=device)
        state = self.rows_of(state).transpose(-1, -2)
        return torch.empty(state.shape, dtype=dtype, device=device).copy_(state)

    def rows_of(self, x):
        return x[self.directions, self.rows]

    def states(self, states, k):
        return states[self.directions, k, self.rows]

    def by_direction(self, x, dtype):
        return x[self.directions].to(dtype)

    def add(self, total, part):
        total[self.directions].add_(part)


def _tiles(G, Z, E, N, reverse, device):
    """All directions and rows at once where they are small, else one direction and a few rows at a time."""
    rows = _tile_rows(G, Z, E, N, device)
    if rows == G * Z:
        yield _Tile(slice(0, G), slice(0, Z), reverse)
        return
    for g in range(G):
        for z in range(0, Z, rows):
            yield _Tile(slice(g, g + 1), slice(z, min(Z, z + rows)), reverse)


def _tile_rows(G, Z, E, N, device):
    """Sequences of a tile: those of all directions, or some of one."""
    limit = _STEP_ELEMENTS.get(device.type, _STEP_ELEMENTS_DEFAULT)
    if limit >= G * Z * E * N:
        return G * Z
    tiles = _ceil_div(Z * E * N, limit)
    return _ceil_div(Z, tiles)


def _chunk_steps(G, Z, L, E, N, device):
    """Steps of a chunk: as many as keep its buffers in the cache, alike in all chunks."""
    limit = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_DEFAULT)
    most = min(_MOST_STEPS, max(_LEAST_STEPS, limit // (_tile_rows(G, Z, E, N, device) * E * N)))
    return _ceil_div(L, _ceil_div(L, most))


def _chunks(L, steps):
    return [(s, min(L, s + steps)) for s in range(0, L, steps)]


def _ceil_div(a, b):
    return (a + b - 1) // b  # not math.ceil: sizes may be symbols under torch.compile


def _recur_(state, decay, h):
    """state_t <- decay_t state_{t-1} + state_t, starting from h; state (n, …) holds the inputs on entry."""
    for x, a in zip(state.unbind(0), decay.unbind(0)):
        torch.addcmul(x, a, h, out=x)
        h = x


def _contract(weights, state):
    """sum over N: weights (n,G,Z,N), state (n,G,Z,N,E) -> (n,G,Z,E)."""
    *lead, N, E = state.shape
    return torch.bmm(weights.reshape(-1, 1, N), state.reshape(-1, N, E)).view(*lead, E)


def _contract_channels(weights, state):
    """sum over E: weights (n,G,Z,E), state (n,G,Z,N,E) -> (n,G,Z,N)."""
    *lead, N, E = state.shape
    return torch.bmm(weights.reshape(-1, 1, E), state.reshape(-1, N, E).transpose(1, 2)).view(*lead, N)


def _step_size(raw, bias, softplus):
    raw = raw if bias is None else raw + bias
    return F.softplus(raw) if softplus else raw


def _compute_dtype(u):
    return torch.float64 if u.dtype == torch.float64 else torch.float32


# torch.exp2 is two to three times as fast as torch.exp where its kernel is vectorised (AVX2, AVX-512), else slower.
_EXP2_IS_FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def log_base(device):
    return math.log2(math.e) if device.type != "cpu" or _EXP2_IS_FAST else 1.0


def exp_(x):
    """exp of what was scaled by `log_base`, in place."""
    return torch.exp2(x, out=x) if x.device.type != "cpu" or _EXP2_IS_FAST else torch.exp(x, out=x)
