"""One token, as when text is written: the recurrence itself, in float32, without a chunk around it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleeptrain.memory.kernels.matrix import decay, load, store
from sleeptrain.memory.kernels.tiles import power_of_2
from sleeptrain.memory.rule import RULES

STEP_VALUES = 16  # value columns of a program: 128 programs for 16 heads of 128
STEP_WARPS = 4


def step(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str,
) -> tuple[Tensor | None, Tensor]:
    """The contract of ``memory/rule.py`` for T = 1, without gradients; all tensors are contiguous, gates and
    state float32."""
    decays, erases = RULES[rule]
    num_batch, _, num_heads, value_dim = v.shape
    out, last_state = None if q is None else torch.empty_like(v), torch.empty_like(state)
    step_kernel[num_batch * num_heads, triton.cdiv(value_dim, STEP_VALUES)](
        q, k, v, log_decay, beta, state, out, last_state, num_heads, k.shape[2],
        K=k.shape[-1], V=value_dim, KEYS=power_of_2(k.shape[-1]), VALUES=STEP_VALUES,
        DECAYS=decays, ERASES=erases, READS=q is not None, num_warps=STEP_WARPS,
    )  # fmt: skip
    return out, last_state


@triton.jit
def step_kernel(
    q, k, v, log_decay, beta, state,  # in: as in memory/rule.py, T = 1
    out, last_state,  # out: as v; as state
    Hv, Hk,
    K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    DECAYS: tl.constexpr, ERASES: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """S <- a S;  S <- S + b k (v - S^T k)^T, or S + b k v^T for a rule that does not erase;  o = S^T q."""
    row, tile = tl.program_id(0), tl.program_id(1)
    key_head = (row // Hv) * Hk + (row % Hv) // (Hv // Hk)
    keys, values = tl.arange(0, KEYS), tile * VALUES + tl.arange(0, VALUES)
    columns = row * V + values
    square = row.to(tl.int64) * K * V

    S_KV = load(state + square, keys, values, K, V, V)
    k_K = tl.load(k + key_head * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    y_V = tl.load(v + columns, mask=values < V, other=0.0).to(tl.float32)
    if DECAYS:
        S_KV *= decay(tl.load(log_decay + row))
    if ERASES:
        y_V -= tl.sum(k_K[:, None] * S_KV, 0)
    S_KV += k_K[:, None] * (tl.load(beta + row) * y_V)[None, :]
    store(last_state + square, S_KV, keys, values, K, V, V)
    if READS:
        q_K = tl.load(q + key_head * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        out_V = tl.sum(q_K[:, None] * S_KV, 0)
        tl.store(out + columns, out_V.to(out.dtype.element_ty), mask=values < V)
