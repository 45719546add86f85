"""The norm of the reads and its gate in one kernel, and one backward (contract in ``memory/gated_norm.py``).

With n = x rsqrt(mean(x^2) + eps) and g = SiLU(gate): out = n weight g. n and g are computed again in the
backward pass, so that nothing but the inputs is kept.

Shape letters: N heads of all tokens, V value size. A program has whole rows of V columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeptrain.memory.kernels.activations import sigmoid, silu_slope
from sleeptrain.memory.kernels.matrix import load, store
from sleeptrain.memory.kernels.tiles import power_of_2

ELEMENTS = 2048  # of a tile: 16 a thread
SPAN_TILES = 16  # of rows whose gradient of the weight one program adds up; the rest is a sum over spans


@triton.jit
def gated_norm_kernel(
    x, gate, weight,  # in: [N, V] twice; [V]
    out,  # as x
    N, eps, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first, columns = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, COLUMNS)
    n_NV, _, gate_NV = _normalise(x, gate, first, columns, N, eps, V, ROWS)
    w_V = tl.load(weight + columns, mask=columns < V, other=0.0).to(tl.float32)
    out_NV = n_NV * w_V[None, :] * (gate_NV * sigmoid(gate_NV))
    store(out + first * V, out_NV, tl.arange(0, ROWS), columns, N - first, V, V)


@triton.jit
def gated_norm_gradient_kernel(
    x, gate, weight, d_out,  # in: as above; as x
    dx, d_gate, d_weight,  # out: as x; as gate; sums over a program's rows [programs, V] float32
    N, eps, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """dx = (dn - n mean(dn n)) rsqrt(mean(x^2) + eps), dn = weight g d_out. A program has SPAN rows."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    w_V = tl.load(weight + columns, mask=columns < V, other=0.0).to(tl.float32)
    d_weight_V = tl.zeros([COLUMNS], tl.float32)
    start = tl.program_id(0).to(tl.int64) * SPAN
    for first in range(start, tl.minimum(start + SPAN, N), ROWS):
        left = N - first
        n_NV, scale_N, gate_NV = _normalise(x, gate, first, columns, N, eps, V, ROWS)
        d_NV = load(d_out + first * V, rows, columns, left, V, V).to(tl.float32)
        g_NV = gate_NV * sigmoid(gate_NV)
        d_weight_V += tl.sum(d_NV * n_NV * g_NV, 0)
        d_NV *= w_V[None, :]
        store(d_gate + first * V, d_NV * n_NV * silu_slope(gate_NV), rows, columns, left, V, V)
        d_NV *= g_NV
        d_NV -= n_NV * (tl.sum(d_NV * n_NV, 1) / V)[:, None]
        store(dx + first * V, scale_N[:, None] * d_NV, rows, columns, left, V, V)
    tl.store(d_weight + tl.program_id(0) * V + columns, d_weight_V, mask=columns < V)


@triton.jit
def _normalise(x, gate, first, columns, N, eps, V: tl.constexpr, ROWS: tl.constexpr):
    """n, what each row was multiplied by, and the gate, all in float32."""
    rows = tl.arange(0, ROWS)
    x_NV = load(x + first * V, rows, columns, N - first, V, V).to(tl.float32)
    gate_NV = load(gate + first * V, rows, columns, N - first, V, V).to(tl.float32)
    scale_N = tl.rsqrt(tl.sum(x_NV * x_NV, 1) / V + eps)
    return x_NV * scale_N[:, None], scale_N, gate_NV


def fused_gated_norm(x_BTHV: Tensor, gate_BTHV: Tensor, weight: Tensor, eps: float) -> Tensor:
    """From float32, float16 or bfloat16, in float32, to the type of ``x_BTHV``."""
    with torch.cuda.device_of(x_BTHV):
        return _FusedGatedNorm.apply(x_BTHV.contiguous(), gate_BTHV.contiguous(), weight.contiguous(), eps)


class _FusedGatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        value_dim = x.shape[-1]
        columns = power_of_2(value_dim)
        ctx.sizes = (x.numel() // value_dim, eps)
        ctx.constants = {"V": value_dim, "ROWS": max(1, ELEMENTS // columns), "COLUMNS": columns}
        ctx.save_for_backward(x, gate, weight)
        out = torch.empty_like(x)
        grid = (triton.cdiv(ctx.sizes[0], ctx.constants["ROWS"]),)
        gated_norm_kernel[grid](x, gate, weight, out, *ctx.sizes, **ctx.constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        span = ctx.constants["ROWS"] * SPAN_TILES
        grid = (triton.cdiv(ctx.sizes[0], span),)
        with torch.cuda.device_of(x):
            dx, d_gate = torch.empty_like(x), torch.empty_like(gate)
            d_weight = weight.new_empty(*grid, len(weight), dtype=torch.float32)
            gated_norm_gradient_kernel[grid](
                x, gate, weight, d_out.contiguous(), dx, d_gate, d_weight, *ctx.sizes,
                SPAN=span, **ctx.constants,
            )  # fmt: skip
        return dx, d_gate, d_weight.sum(0).to(weight.dtype), None
