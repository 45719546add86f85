"""The contract of ``short_convolution`` on the kernels of ``convolution.py``; only its inputs are kept."""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeptrain.memory.kernels.convolution import (
    activation_gradient_kernel,
    convolution_kernel,
    input_gradient_kernel,
)
from sleeptrain.memory.kernels.tiles import power_of_2

CHANNELS = 64  # of a program whose heads are not normalised
ELEMENTS = 2048  # of a tile: 16 a thread
SPAN_TOKENS = 256  # whose gradient of static taps one program adds up; the rest is a sum over spans


def fused_convolution(
    x_BTC: Tensor,
    taps: Tensor | None,
    tail: Tensor | None,
    valid: Tensor | None,
    head_dim: int,
    length: float | None,
) -> Tensor:
    """From float32, float16 or bfloat16, in float32, to the type of ``x_BTC``; ``[B, T, H, head_dim]``."""
    tail = None if taps is None else tail
    tensors = [None if x is None else x.contiguous() for x in (x_BTC, taps, tail, valid)]
    with torch.cuda.device_of(x_BTC):
        out = _FusedConvolution.apply(*tensors, head_dim, length)
    return out.unflatten(-1, (-1, head_dim))


class _FusedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        taps: Tensor | None,
        tail: Tensor | None,
        valid: Tensor | None,
        head_dim: int,
        length: float | None,
    ) -> Tensor:
        num_tokens, num_channels = x.shape[1:]
        width = CHANNELS if length is None else head_dim
        columns = power_of_2(width)
        ctx.sizes = (num_tokens, num_channels, width)
        ctx.constants = {
            "W": 1 if taps is None else taps.shape[-1],
            "PER_TOKEN": taps is not None and taps.dim() == 4,
            "ROWS": min(power_of_2(num_tokens), ELEMENTS // columns),
            "COLUMNS": columns,
        }
        ctx.norm = {"length": 1.0 if length is None else length, "NORMALISED": length is not None}
        ctx.save_for_backward(x, taps, tail, valid)
        out = torch.empty_like(x)
        convolution_kernel[_grid(x, num_tokens, ctx.constants["ROWS"], width)](
            x, taps, tail, valid, out, *ctx.sizes, **ctx.norm, **ctx.constants
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, tail, valid = ctx.saved_tensors
        num_tokens, num_channels, width = ctx.sizes
        rows, num_taps = ctx.constants["ROWS"], ctx.constants["W"]
        is_static = taps is not None and taps.dim() == 2
        with torch.cuda.device_of(x):
            d_y = torch.empty_like(x, dtype=x.dtype if taps is None else torch.float32)
            d_taps: Any = None if taps is None else torch.empty_like(taps)
            if is_static:
                num_spans = len(x) * triton.cdiv(num_tokens, SPAN_TOKENS)
                d_taps = x.new_empty(num_spans, num_channels, num_taps, dtype=torch.float32)
            activation_gradient_kernel[_grid(x, num_tokens, SPAN_TOKENS, width)](
                x, taps, tail, valid, d_out.contiguous(), d_y, d_taps, *ctx.sizes,
                SPAN=SPAN_TOKENS, TAPS=triton.next_power_of_2(num_taps), **ctx.norm, **ctx.constants,
            )  # fmt: skip
            if taps is None:
                return d_y, *(None,) * 5
            d_x, d_tail = torch.empty_like(x), None if tail is None else torch.empty_like(tail)
            num_positions = num_tokens + (0 if tail is None else num_taps - 1)
            input_gradient_kernel[_grid(x, num_positions, rows, width)](
                taps, valid, d_y, d_x, d_tail, *ctx.sizes, **ctx.constants
            )
        if is_static:
            d_taps = d_taps.sum(0).to(taps.dtype)
        return d_x, d_taps, d_tail, *(None,) * 3


def _grid(x: Tensor, num_positions: int, tokens: int, width: int) -> tuple[int]:
    """One program for so many tokens of a sequence and so many channels."""
    return (len(x) * triton.cdiv(num_positions, tokens) * triton.cdiv(x.shape[-1], width),)
