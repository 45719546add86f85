"""Both gates of a block in one kernel, and one backward (contract in ``memory/gates.py``).

Shape letters: N tokens of all sequences, H value heads. A program has ROWS tokens and all heads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeptrain.memory.kernels.activations import sigmoid, softplus
from sleeptrain.memory.kernels.matrix import load, store
from sleeptrain.memory.kernels.tiles import power_of_2

ELEMENTS = 1024  # of a tile: few tokens a program, so that a short window fills a GPU, too


@triton.jit
def gates_kernel(
    a, b, A_log, dt_bias, valid,  # in: [N, H] or None; [N, H]; [H] twice, or None; [N] or None
    log_decay, beta,  # out: [N, H] float32
    N, H, SCALE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """beta = SCALE sigmoid(b);  log_decay = -exp(A_log) softplus(a + dt_bias), or 0 without a."""
    rows, heads = _place(ROWS, HEADS)
    is_real = _is_real(valid, rows, N)
    beta_NH = SCALE * sigmoid(load(b, rows, heads, N, H, H).to(tl.float32))
    store(beta, tl.where(is_real, beta_NH, 0.0), rows, heads, N, H, H)
    log_decay_NH = tl.zeros([ROWS, HEADS], tl.float32)
    if a is not None:
        logits = load(a, rows, heads, N, H, H).to(tl.float32) + _of_heads(dt_bias, heads, H)
        log_decay_NH -= tl.exp(_of_heads(A_log, heads, H)) * softplus(logits)
    store(log_decay, tl.where(is_real, log_decay_NH, 0.0), rows, heads, N, H, H)


@triton.jit
def gates_gradient_kernel(
    a, b, A_log, dt_bias, valid, d_log_decay, d_beta,  # in: as above
    da, db, d_heads,  # out: as a, or None; as b; sums of a program's tokens [programs, 2, H], or None
    N, H, SCALE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """db = SCALE s (1 - s) d_beta;  da = -exp(A_log) sigmoid(a + dt_bias) d_log_decay, which is also what
    dt_bias gets from a token; A_log gets log_decay d_log_decay."""
    rows, heads = _place(ROWS, HEADS)
    is_real = _is_real(valid, rows, N)
    b_NH = load(b, rows, heads, N, H, H).to(tl.float32)
    d_NH = tl.where(is_real, load(d_beta, rows, heads, N, H, H), 0.0)
    store(db, SCALE * sigmoid(b_NH) * sigmoid(-b_NH) * d_NH, rows, heads, N, H, H)
    if a is not None:
        logits = load(a, rows, heads, N, H, H).to(tl.float32) + _of_heads(dt_bias, heads, H)
        d_NH = tl.where(is_real, load(d_log_decay, rows, heads, N, H, H), 0.0)
        d_NH *= -tl.exp(_of_heads(A_log, heads, H))
        da_NH = d_NH * sigmoid(logits)
        store(da, da_NH, rows, heads, N, H, H)
        sums = d_heads + tl.program_id(0) * 2 * H + heads
        tl.store(sums, tl.sum(d_NH * softplus(logits), 0), mask=heads < H)
        tl.store(sums + H, tl.sum(da_NH, 0), mask=heads < H)


@triton.jit
def _place(ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Tokens and heads of a program."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEADS)


@triton.jit
def _is_real(valid, rows, N):
    """Whether a token is there, and no pad ``[ROWS, 1]``."""
    inside = rows < N
    if valid is not None:
        inside = inside & tl.load(valid + rows, mask=inside, other=0)
    return inside[:, None]


@triton.jit
def _of_heads(x, heads, H):
    """A vector with an element for each head, as a row in float32."""
    return tl.load(x + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]


def fused_gates(
    b_BTH: Tensor,
    decay: tuple[Tensor, Tensor, Tensor] | None,
    valid: Tensor | None,
    negative_eigenvalues: bool,
) -> tuple[Tensor, Tensor]:
    """In float32, from float32, float16 or bfloat16."""
    a_BTH, A_log, dt_bias = decay or (None, None, None)
    tensors = [None if x is None else x.contiguous() for x in (a_BTH, b_BTH, A_log, dt_bias, valid)]
    with torch.cuda.device_of(b_BTH):
        return _FusedGates.apply(*tensors, 2.0 if negative_eigenvalues else 1.0)


class _FusedGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor | None,
        b: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        valid: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        num_heads = b.shape[-1]
        heads = power_of_2(num_heads)
        ctx.sizes = (b.numel() // num_heads, num_heads)
        ctx.constants = {"SCALE": scale, "ROWS": max(1, ELEMENTS // heads), "HEADS": heads}
        ctx.grid = (triton.cdiv(ctx.sizes[0], ctx.constants["ROWS"]),)
        ctx.save_for_backward(a, b, A_log, dt_bias, valid)
        log_decay, beta = (torch.empty_like(b, dtype=torch.float32) for _ in range(2))
        gates_kernel[ctx.grid](a, b, A_log, dt_bias, valid, log_decay, beta, *ctx.sizes, **ctx.constants)
        if a is None:
            ctx.mark_non_differentiable(log_decay)
        return log_decay, beta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_decay: Tensor, d_beta: Tensor) -> tuple[Tensor | None, ...]:
        a, b, A_log, dt_bias, valid = ctx.saved_tensors
        da, db = None if a is None else torch.empty_like(a), torch.empty_like(b)
        with torch.cuda.device_of(b):
            d_heads: Any = None if a is None else d_beta.new_empty(*ctx.grid, 2, b.shape[-1])
            gates_gradient_kernel[ctx.grid](
                a, b, A_log, dt_bias, valid, d_log_decay.contiguous(), d_beta.contiguous(),
                da, db, d_heads, *ctx.sizes, **ctx.constants,
            )  # fmt: skip
        if a is None:
            return None, db, *(None,) * 4
        d_A_log, d_dt_bias = d_heads.sum(0)
        return da, db, d_A_log.to(A_log.dtype), d_dt_bias.to(dt_bias.dtype), None, None
