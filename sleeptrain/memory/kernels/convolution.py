"""The kernels of ``short_convolution`` (``memory/convolution.py``); ``fused_convolution.py`` joins them.

    y_t = sum_w taps_w x_{t - (W - 1) + w};  s = y sigmoid(y);  out = s rsqrt(|s|^2 + eps) length
    d_y from d_out, with y and s computed again;  d_taps_w = sum_t d_y_t x_{t - (W - 1) + w}
    d_x_p = sum_w taps_w d_y_{p + (W - 1) - w}        also of the tail, whose positions p are below 0

Shape letters: B batch, T tokens, C channels, W taps. A program has ROWS tokens of one head, or of a tile of
channels where heads are not normalised. ``channel`` is its first one, ``width`` how many it has.
"""

import triton
import triton.language as tl

from sleeptrain.memory.convolution import SQUARES_EPS
from sleeptrain.memory.kernels.activations import sigmoid, silu_slope
from sleeptrain.memory.kernels.matrix import at, load, store

EPS = tl.constexpr(SQUARES_EPS)


@triton.jit
def convolution_kernel(
    x, taps, tail, valid,  # in: [B, T, C]; [C, W], [B, T, C, W] or None; [B, W-1, C] or None; [B, T] or None
    out,  # as x
    T, C, WIDTH, length,
    NORMALISED: tl.constexpr, W: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = SiLU(y), each head brought to ``length``."""
    batch, first, channel, width = _place(T, C, WIDTH, ROWS)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    y = _convolve(x, taps, tail, valid, batch, first, channel, width, rows, columns, T, C, W, PER_TOKEN)
    s = y * sigmoid(y)
    if NORMALISED:
        s *= (tl.rsqrt(tl.sum(s * s, 1) + EPS) * length)[:, None]
    store(out + at(batch, first, 0, T, 1, C) + channel, s, rows, columns, T - first, width, C)


@triton.jit
def activation_gradient_kernel(
    x, taps, tail, valid, d_out,  # in: as above; as x
    d_y,  # out: [B, T, C]; without taps the gradient of x
    d_taps,  # out: of static taps sums over spans of tokens [B * spans, C, W], else as taps
    T, C, WIDTH, length,
    NORMALISED: tl.constexpr, W: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """d_y and d_taps. A program walks over SPAN tokens."""
    batch, start, channel, width = _place(T, C, WIDTH, SPAN)
    rows, columns, of_taps = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TAPS)
    d_taps_CW = tl.zeros([COLUMNS, TAPS], tl.float32)
    for first in range(start, tl.minimum(start + SPAN, T), ROWS):
        y = _convolve(x, taps, tail, valid, batch, first, channel, width, rows, columns, T, C, W, PER_TOKEN)
        here = at(batch, first, 0, T, 1, C) + channel
        d = load(d_out + here, rows, columns, T - first, width, C).to(tl.float32)
        if NORMALISED:
            s = y * sigmoid(y)
            scale = tl.rsqrt(tl.sum(s * s, 1) + EPS)
            d = (length * scale)[:, None] * (d - (scale * scale * tl.sum(d * s, 1))[:, None] * s)
        d *= silu_slope(y)
        if taps is None:
            d = tl.where(_is_input(valid, batch, first + rows, T)[:, None], d, 0.0)
        store(d_y + here, d, rows, columns, T - first, width, C)
        if taps is not None:
            for w in tl.static_range(W):
                shifted = rows - (W - 1 - w)
                d_tap = d * _inputs(x, tail, valid, batch, first, channel, width, shifted, columns, T, C, W)
                if PER_TOKEN:
                    places = at(batch, first, 0, T, C, W) + _tap_places(channel, rows, columns, C, W) + w
                    inside = (first + rows < T)[:, None] & (columns < width)[None, :]
                    tl.store(d_taps + places, d_tap.to(d_taps.dtype.element_ty), mask=inside)
                else:
                    d_taps_CW += tl.where(of_taps[None, :] == w, tl.sum(d_tap, 0)[:, None], 0.0)
    if taps is not None and not PER_TOKEN:
        span = batch * tl.cdiv(T, SPAN) + start // SPAN
        store(d_taps + at(span, channel, 0, C, 1, W), d_taps_CW, columns, of_taps, width, W, W)


@triton.jit
def input_gradient_kernel(
    taps, valid, d_y,  # in: as above
    d_x, d_tail,  # out: as x; as tail, or None
    T, C, WIDTH,
    W: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_x and d_tail. With a tail the positions begin at -(W - 1)."""
    before = 0
    if d_tail is not None:
        before = W - 1
    batch, first, channel, width = _place(T + before, C, WIDTH, ROWS)
    first -= before
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    d = tl.zeros([ROWS, COLUMNS], tl.float32)
    for w in tl.static_range(W):
        later = rows + (W - 1 - w)
        d_later = _inputs(d_y, None, None, batch, first, channel, width, later, columns, T, C, W)
        d += d_later * _tap(taps, w, batch, first, channel, width, later, columns, T, C, W, PER_TOKEN)
    positions, is_mine = first + rows, (columns < width)[None, :]
    places = rows[:, None] * C + columns[None, :]
    if d_tail is not None:
        tail_here = d_tail + at(batch, first + W - 1, 0, W - 1, 1, C) + channel
        tl.store(tail_here + places, d.to(d_tail.dtype.element_ty), mask=(positions < 0)[:, None] & is_mine)
    d = tl.where(_is_input(valid, batch, positions, T)[:, None], d, 0.0)
    inside = ((positions >= 0) & (positions < T))[:, None] & is_mine
    here = d_x + at(batch, first, 0, T, 1, C) + channel
    tl.store(here + places, d.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _place(T, C, WIDTH, TOKENS):
    """Of a program: batch, first token, first channel and number of channels. Neighbours share tokens."""
    tiles, spans = tl.cdiv(C, WIDTH), tl.cdiv(T, TOKENS)
    row, channel = tl.program_id(0) // tiles, tl.program_id(0) % tiles * WIDTH
    return row // spans, row % spans * TOKENS, channel, tl.minimum(WIDTH, C - channel)


@triton.jit
def _convolve(
    x, taps, tail, valid, batch, first, channel, width, rows, columns, T, C,
    W: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """y in float32; without taps x itself."""
    if taps is None:
        y = _inputs(x, tail, valid, batch, first, channel, width, rows, columns, T, C, W)
    else:
        y = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
        for w in tl.static_range(W):
            shifted = rows - (W - 1 - w)
            tap = _tap(taps, w, batch, first, channel, width, rows, columns, T, C, W, PER_TOKEN)
            y += tap * _inputs(x, tail, valid, batch, first, channel, width, shifted, columns, T, C, W)
    return y


@triton.jit
def _inputs(x, tail, valid, batch, first, channel, width, rows, columns, T, C, W: tl.constexpr):
    """x at the tokens ``first + rows`` in float32: zero at a pad and past the end, the tail's below 0."""
    positions, is_mine = first + rows, (columns < width)[None, :]
    places = rows[:, None] * C + columns[None, :]
    inside = _is_input(valid, batch, positions, T)[:, None] & is_mine
    values = tl.load(x + at(batch, first, 0, T, 1, C) + channel + places, mask=inside, other=0.0)
    values = values.to(tl.float32)
    if tail is not None:
        here = tail + at(batch, first + W - 1, 0, W - 1, 1, C) + channel
        before = (positions < 0)[:, None] & is_mine
        values += tl.load(here + places, mask=before, other=0.0).to(tl.float32)
    return values


@triton.jit
def _is_input(valid, batch, positions, T):
    """Whether a token is there, and no pad."""
    inside = (positions >= 0) & (positions < T)
    if valid is not None:
        inside = inside & tl.load(valid + at(batch, 0, 0, T, 1, 1) + positions, mask=inside, other=0)
    return inside


@triton.jit
def _tap(
    taps, w, batch, first, channel, width, rows, columns, T, C, W: tl.constexpr, PER_TOKEN: tl.constexpr
):  # fmt: skip
    """Tap w in float32, ``[1, COLUMNS]``, or each token's own ``[ROWS, COLUMNS]``."""
    is_mine = (columns < width)[None, :]
    if PER_TOKEN:
        inside = ((first + rows >= 0) & (first + rows < T))[:, None] & is_mine
        here = taps + at(batch, first, 0, T, C, W) + w
        tap = tl.load(here + _tap_places(channel, rows, columns, C, W), mask=inside, other=0.0)
    else:
        tap = tl.load(taps + (channel + columns)[None, :] * W + w, mask=is_mine, other=0.0)
    return tap.to(tl.float32)


@triton.jit
def _tap_places(channel, rows, columns, C, W: tl.constexpr):
    """Of taps per token."""
    return (rows[:, None] * C + (channel + columns)[None, :]) * W
