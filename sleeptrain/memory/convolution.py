"""The short convolution of queries, keys and values with what follows it: SiLU, and heads of a given length.

Shape letters: B batch, T tokens, C channels, W taps, H heads, D channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeptrain.memory.dispatch import runs_kernels
from sleeptrain.memory.rule import state_dtype

SQUARES_EPS = 1e-6  # added to a head's sum of squares before its root


def short_convolution(
    x_BTC: Tensor,
    taps: Tensor | None,
    tail: Tensor | None,
    valid: Tensor | None,
    head_dim: int,
    length: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """SiLU of the causal convolution of ``x_BTC``, in heads ``[B, T, H, D]`` of ``head_dim`` channels, in the
    type of ``x_BTC``; each head brought to ``length``, if one is given.

    ``taps`` and ``tail`` are those of ``causal_convolution``; without taps there is no convolution. Where
    ``valid`` ``[B, T]`` is False, a pad, the input counts as zero. Raises ConfigError as ``choose`` does.
    """
    if runs_kernels(x_BTC, backend, 1 if length is None else head_dim):
        from sleeptrain.memory.kernels.fused_convolution import fused_convolution

        return fused_convolution(x_BTC, taps, tail, valid, head_dim, length)
    x = x_BTC if valid is None else x_BTC.masked_fill(~valid[..., None], 0.0)
    out = F.silu(x if taps is None else causal_convolution(x, taps, tail)).unflatten(-1, (-1, head_dim))
    if length is not None:
        out = out.to(state_dtype(out.dtype))
        out = out * (torch.rsqrt(out.square().sum(-1, keepdim=True) + SQUARES_EPS) * length)
    return out.to(x_BTC.dtype)


def causal_convolution(x_BTC: Tensor, taps: Tensor, tail: Tensor | None) -> Tensor:
    """Depthwise causal convolution: the sum over taps w of ``taps[..., w]`` times x at ``t - (W - 1) +
    w``.

    ``taps`` is ``[C, W]``, or ``[B, T, C, W]`` where every token has its own (Jet block). ``tail`` ``[B,
    W-1, C]`` holds the inputs before the first token; None: zeros.
    """
    x = x_BTC if tail is None else torch.cat([tail.to(x_BTC.dtype), x_BTC], dim=1)
    dtype = torch.promote_types(x.dtype, taps.dtype)
    return _TapSum.apply(x.to(dtype), taps.to(dtype), x_BTC.shape[1])


class _TapSum(torch.autograd.Function):
    """The sum over taps for the last ``num_tokens`` inputs; before the first input there are zeros, which are
    neither stored nor multiplied. Its own backward adds into one buffer instead of one tensor per tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.num_tokens = num_tokens
        out = x[:, x.shape[1] - num_tokens :] * taps[..., -1]
        for w, tokens, inputs in _earlier_taps(x.shape[1], num_tokens, taps.shape[-1]):
            out[:, tokens].addcmul_(x[:, inputs], _taps_of(taps, tokens)[..., w])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, taps), num_tokens = ctx.saved_tensors, ctx.num_tokens
        newest = slice(x.shape[1] - num_tokens, None)
        d_x, d_taps = torch.zeros_like(x), torch.zeros_like(taps)
        d_x[:, newest] = d_out * taps[..., -1]
        d_taps[..., -1] = _over_tokens(d_out * x[:, newest], taps)
        for w, tokens, inputs in _earlier_taps(x.shape[1], num_tokens, taps.shape[-1]):
            d_part = d_out[:, tokens]
            d_x[:, inputs].addcmul_(d_part, _taps_of(taps, tokens)[..., w])
            _taps_of(d_taps, tokens)[..., w] = _over_tokens(d_part * x[:, inputs], taps)
        return d_x, d_taps, None


def _earlier_taps(num_inputs: int, num_tokens: int, num_taps: int) -> Iterator[tuple[int, slice, slice]]:
    """For each tap but the newest: its index, the tokens that it reaches an input from, and those inputs."""
    for back in range(1, min(num_taps, num_inputs)):
        count = min(num_tokens, num_inputs - back)
        inputs = slice(num_inputs - back - count, num_inputs - back)
        yield num_taps - 1 - back, slice(num_tokens - count, num_tokens), inputs


def _taps_of(taps: Tensor, tokens: slice) -> Tensor:
    return taps if taps.dim() == 2 else taps[:, tokens]


def _over_tokens(d_tap: Tensor, taps: Tensor) -> Tensor:
    """The gradient of a static tap is a sum over tokens; a token's own tap has its own."""
    return d_tap.sum((0, 1)) if taps.dim() == 2 else d_tap


def convolution_tail(x_BTC: Tensor, tail: Tensor | None, valid: Tensor | None, num_taps: int) -> Tensor:
    """The newest ``num_taps - 1`` inputs ``[B, W-1, C]`` that are no pads: what a following convolution
    starts from."""
    size = num_taps - 1
    if tail is None:
        tail = x_BTC.new_zeros(len(x_BTC), size, x_BTC.shape[-1])
    inputs = torch.cat([tail.to(x_BTC.dtype), x_BTC], dim=1)
    if valid is None:
        return inputs[:, inputs.shape[1] - size :]
    # A row's newest inputs, in order: stable sort by "is a pad or older than the tail" keeps the order of the
    # rest.
    kept = torch.cat([valid.new_ones(len(valid), size), valid], dim=1)
    order = kept.to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, order.shape[1] - size :]
    return inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[-1]))
