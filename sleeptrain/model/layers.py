"""The small parts of a block: norm, rotary positions, gated MLP, short convolution.

Shape letters: B batch, T tokens, D model width, H heads, C channels, W convolution taps.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, times a weight; zero-centred, times 1 + weight."""

    def __init__(self, dim: int, eps: float, zero_centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centred else torch.ones(dim))
        self.eps, self.zero_centred = eps, zero_centred

    @property
    def factor(self) -> Tensor:
        """What multiplies the normalised input ``[dim]``."""
        return 1 + self.weight if self.zero_centred else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.factor, self.eps)


class Float32Linear(nn.Linear):
    """A linear map in at least float32, also under autocast or with weights of less: for gate logits."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype))


def in_compute_type(x: Tensor) -> Tensor:
    """As autocast would cast it for a linear map: for several of them, once."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = in_compute_type(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign of its half, ``[B, T, 1, rotary_dim]``, at ``positions`` ``[B, T]``."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    angles = positions[..., None, None].to(torch.float64) * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``x`` ``[B, T, H, head_dim]``, halves paired (RoFormer, arXiv 2104.09864). What the
    table is too short for stays as it is."""
    cos, sin = table
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        first = rotate(x[..., :rotary_dim], table) if rotary_dim else x[..., :0]
        return torch.cat([first, x[..., rotary_dim:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)


def causal_convolution(x_BTC: Tensor, kernels: Tensor, tail: Tensor | None) -> Tensor:
    """Depthwise causal convolution: the sum over taps w of ``kernels[..., w]`` times x at ``t - (W - 1) +
    w``.

    ``kernels`` is ``[C, W]``, or ``[B, T, C, W]`` where every token has its own (Jet block). ``tail`` ``[B,
    W-1, C]`` holds the inputs before the first token; None: zeros.
    """
    x = x_BTC if tail is None else torch.cat([tail.to(x_BTC.dtype), x_BTC], dim=1)
    dtype = torch.promote_types(x.dtype, kernels.dtype)
    return _TapSum.apply(x.to(dtype), kernels.to(dtype), x_BTC.shape[1])


class _TapSum(torch.autograd.Function):
    """The sum over taps for the last ``num_tokens`` inputs; before the first input there are zeros, which are
    neither stored nor multiplied. Its own backward adds into one buffer instead of one tensor per tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.num_tokens = num_tokens
        out = x[:, x.shape[1] - num_tokens :] * kernels[..., -1]
        for w, tokens, inputs in _earlier_taps(x.shape[1], num_tokens, kernels.shape[-1]):
            out[:, tokens].addcmul_(x[:, inputs], _kernels_of(kernels, tokens)[..., w])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, kernels), num_tokens = ctx.saved_tensors, ctx.num_tokens
        newest = slice(x.shape[1] - num_tokens, None)
        d_x, d_kernels = torch.zeros_like(x), torch.zeros_like(kernels)
        d_x[:, newest] = d_out * kernels[..., -1]
        d_kernels[..., -1] = _over_tokens(d_out * x[:, newest], kernels)
        for w, tokens, inputs in _earlier_taps(x.shape[1], num_tokens, kernels.shape[-1]):
            d_part = d_out[:, tokens]
            d_x[:, inputs].addcmul_(d_part, _kernels_of(kernels, tokens)[..., w])
            _kernels_of(d_kernels, tokens)[..., w] = _over_tokens(d_part * x[:, inputs], kernels)
        return d_x, d_kernels, None


def _earlier_taps(num_inputs: int, num_tokens: int, num_taps: int) -> Iterator[tuple[int, slice, slice]]:
    """For each tap but the newest: its index, the tokens that it reaches an input from, and those inputs."""
    for back in range(1, min(num_taps, num_inputs)):
        count = min(num_tokens, num_inputs - back)
        inputs = slice(num_inputs - back - count, num_inputs - back)
        yield num_taps - 1 - back, slice(num_tokens - count, num_tokens), inputs


def _kernels_of(kernels: Tensor, tokens: slice) -> Tensor:
    return kernels if kernels.dim() == 2 else kernels[:, tokens]


def _over_tokens(d_tap: Tensor, kernels: Tensor) -> Tensor:
    """The gradient of a static kernel is a sum over tokens; a token's own kernel has its own."""
    return d_tap.sum((0, 1)) if kernels.dim() == 2 else d_tap


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
