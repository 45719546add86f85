"""The contract of ``memory/rule.py`` on Triton kernels; the mathematics is in ``__init__.py``."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeptrain.memory.kernels.factors import factors_kernel
from sleeptrain.memory.kernels.gradients import gradients_kernel
from sleeptrain.memory.kernels.scan import scan_backward_kernel, scan_kernel
from sleeptrain.memory.kernels.split import gradients_after, in_segments, states_before
from sleeptrain.memory.kernels.step import step
from sleeptrain.memory.kernels.tiles import Tiles, choose_tiles, power_of_2
from sleeptrain.memory.rule import RULES

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def chunked_triton(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str = "gated_delta",
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Products are of factors in the type of ``v`` (float32, float16 or bfloat16) and are summed in float32;
    gates and state are float32."""
    num_batch, num_tokens, num_heads, value_dim = v.shape
    if num_tokens == 0:
        return (None if q is None else torch.zeros_like(v)), state
    tiles = tiles or choose_tiles(num_tokens, num_batch * num_heads, k.shape[-1], value_dim, v.element_size())
    tensors = [None if q is None else q.to(v.dtype), k.to(v.dtype), v]
    tensors += [x.float() for x in (log_decay, beta, state)]
    is_kept = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    contiguous = [None if x is None else x.contiguous() for x in tensors]
    if tiles.segments > 1:
        contiguous[:5] = [None if x is None else in_segments(x, tiles.segments) for x in contiguous[:5]]
    with torch.cuda.device_of(v):
        if num_tokens == 1 and not is_kept:
            return step(*contiguous, rule=rule)  # type: ignore[arg-type, misc]
        out, last_state = _TritonRule.apply(*contiguous, rule, tiles, is_kept)
    return None if out is None else out.view(v.shape), last_state


class _TritonRule(torch.autograd.Function):
    """Saves the factors, states and written values of each chunk; activation checkpointing drops these.

    Where sequences are split, all but the states before and after is of segments, ``[B * P, T / P, ...]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        state: Tensor,
        rule: str,
        tiles: Tiles,
        is_kept: bool,
    ) -> tuple[Tensor | None, Tensor]:
        decays, erases = RULES[rule]
        num_batch, num_tokens, num_heads, value_dim = v.shape
        num_states, num_chunks = num_batch * num_heads, triton.cdiv(num_tokens, tiles.chunk_tokens)
        if not decays:
            log_decay = torch.zeros_like(beta)

        square = (num_states, num_chunks, tiles.chunk_tokens, tiles.chunk_tokens)
        total = torch.empty_like(beta, dtype=torch.float64)
        rest = v.new_empty(square) if erases else None
        reads = v.new_empty(square) if q is not None else None
        sizes = _sizes(k, v)
        common = {
            "K": k.shape[-1],
            "C": tiles.chunk_tokens,
            "TYPE": TYPES[v.dtype],
            "ERASES": erases,
            "READS": q is not None,
        }
        factors_kernel[num_states, num_chunks](
            q, k, log_decay, beta, total, rest, reads, *sizes,
            KEYS=tiles.factor_keys, num_warps=tiles.warps, num_stages=tiles.stages, **common,
        )  # fmt: skip

        scan = common | {"V": value_dim, "KEYS": power_of_2(k.shape[-1]), "VALUES": tiles.scan_values}
        scan |= {"num_warps": tiles.scan_warps, "num_stages": tiles.scan_stages}
        maps = None
        if tiles.segments > 1:
            state, maps = states_before(k, v, beta, total, rest, state, scan)
        out, last_state = None if q is None else torch.empty_like(v), torch.empty_like(state)
        states = v.new_empty(num_states, num_chunks, *state.shape[-2:]) if is_kept else None
        written = torch.empty_like(v) if is_kept else None
        grid = (num_states, triton.cdiv(value_dim, tiles.scan_values))
        scan_kernel[grid](
            q, k, v, beta, total, rest, reads, state,
            out, last_state, states, written, *sizes, WIDTH=value_dim, KEEPS=is_kept, **scan,
        )  # fmt: skip
        ctx.decays, ctx.tiles, ctx.common, ctx.scan, ctx.scan_grid = decays, tiles, common, scan, grid
        kept_maps = maps.contiguous() if maps is not None and is_kept else None
        ctx.save_for_backward(q, k, v, beta, total, rest, reads, states, written, kept_maps)
        return out, last_state if maps is None else last_state[:, -1].clone()  # it outlives the others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_last_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, total, rest, reads, states, written, maps = ctx.saved_tensors
        d_out = None if q is None or d_out is None else d_out.contiguous()
        d_last_state, sizes, tiles = d_last_state.contiguous(), _sizes(k, v), ctx.tiles
        with torch.cuda.device_of(v):
            d_states, d_right = torch.empty_like(states), torch.empty_like(v)
            if maps is not None:
                d_last_state = gradients_after(
                    q, k, beta, total, rest, reads, d_out, d_last_state, maps, ctx.scan
                )
            d_state = torch.empty_like(d_last_state)
            scan_backward_kernel[ctx.scan_grid](
                q, k, beta, total, rest, reads, d_out, d_last_state,
                d_states, d_right, d_state, *sizes, KEEPS=True, **ctx.scan,
            )  # fmt: skip

            # A key head shared by several value heads gets the sum of their gradients.
            per_head = torch.float32 if k.shape[2] < v.shape[2] else k.dtype
            dk = k.new_empty(*v.shape[:3], k.shape[-1], dtype=per_head)
            dq = None if q is None else torch.empty_like(dk)
            dv, d_log_decay, d_beta = torch.empty_like(v), torch.empty_like(beta), torch.empty_like(beta)
            gradients_kernel[states.shape[:2]](
                q, k, v, beta, total, states, written, d_out, d_states, d_right,
                dq, dk, dv, d_log_decay, d_beta, *sizes,
                V=v.shape[-1], KEYS=tiles.gradient_keys, VALUES=tiles.gradient_values,
                num_warps=tiles.warps, num_stages=tiles.stages, **ctx.common,
            )  # fmt: skip
        return (
            _of_key_heads(dq, k),
            _of_key_heads(dk, k),
            dv,
            d_log_decay if ctx.decays else None,
            d_beta,
            d_state if maps is None else d_state[:, 0],
            *(None,) * 3,
        )


def _sizes(k: Tensor, v: Tensor) -> tuple[int, int, int]:
    """T, Hk, Hv."""
    return v.shape[1], k.shape[2], v.shape[2]


def _of_key_heads(d_BTHK: Tensor | None, k: Tensor) -> Tensor | None:
    """Sums over the value heads that share a key head."""
    if d_BTHK is None or d_BTHK.shape == k.shape:
        return d_BTHK
    return d_BTHK.unflatten(2, (k.shape[2], -1)).sum(3).to(k.dtype)
