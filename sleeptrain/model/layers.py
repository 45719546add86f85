"""The small parts of a block: norm, rotary positions, gated MLP, short convolution.

Shape letters: B batch, T tokens, D model width, H heads, C channels, W convolution taps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign of its half, ``[B, T, 1, head_dim]``, at ``positions`` ``[B, T]``."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[..., None, None].to(torch.float64) * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``x`` ``[B, T, H, head_dim]``, halves paired (RoFormer, arXiv 2104.09864)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)


def causal_convolution(x_BTC: Tensor, kernels: Tensor, tail: Tensor | None) -> Tensor:
    """Depthwise causal convolution: the sum over taps w of ``kernels[..., w]`` times x at ``t - (W - 1) +
    w``.

    ``kernels`` is ``[C, W]``, or ``[B, T, C, W]`` where every token has its own (Jet block). ``tail`` ``[B,
    W-1, C]`` holds the inputs before the first token; None: zeros.
    """
    if tail is None:
        padded = F.pad(x_BTC, (0, 0, kernels.shape[-1] - 1, 0))
    else:
        padded = torch.cat([tail.to(x_BTC.dtype), x_BTC], dim=1)
    dtype = torch.promote_types(padded.dtype, kernels.dtype)
    return _TapSum.apply(padded.to(dtype), kernels.to(dtype))


class _TapSum(torch.autograd.Function):
    """The sum over taps; its own backward adds into one buffer instead of one padded tensor per tap."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(padded, kernels)
        num_tokens = padded.shape[1] - kernels.shape[-1] + 1
        out = padded[:, :num_tokens] * kernels[..., 0]
        for w in range(1, kernels.shape[-1]):
            out.addcmul_(padded[:, w : w + num_tokens], kernels[..., w])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        padded, kernels = ctx.saved_tensors
        num_tokens = d_out.shape[1]
        d_padded, by_tap = torch.zeros_like(padded), []
        for w in range(kernels.shape[-1]):
            taps = slice(w, w + num_tokens)
            d_padded[:, taps].addcmul_(d_out, kernels[..., w])
            by_tap.append(d_out * padded[:, taps])
        if kernels.dim() == 2:
            by_tap = [d_tap.sum((0, 1)) for d_tap in by_tap]
        return d_padded, torch.stack(by_tap, dim=-1)


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
    order = kept.to(torch.int8).argsort(dim=1, stable=True)[:, -size:]
    return inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[-1]))
