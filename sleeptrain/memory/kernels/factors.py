"""What a chunk needs to know of itself before any state is known; all chunks at once."""

import triton
import triton.language as tl

from sleeptrain.memory.kernels.inverse import unit_lower_inverse
from sleeptrain.memory.kernels.matrix import at, decay_between, load, product, store


@triton.jit
def factors_kernel(
    q, k, log_decay, beta,  # in: [B, T, Hk, K] twice, [B, T, Hv] twice
    total, rest, reads,  # out: G [B, T, Hv] float64; A^-1 - I and P [B * Hv, N, C, C]
    T, Hk, Hv,
    K: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, TYPE: tl.constexpr,
    ERASES: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """G = running sum of log decays;  A = I + strictly_lower(diag(b) (K K^T * D));  P = Q K^T * D."""
    row, n = tl.program_id(0), tl.program_id(1)
    batch, head = row // Hv, row % Hv
    key_head = head // (Hv // Hk)
    tokens, left = tl.arange(0, C), T - n * C

    keys_here = at(batch, n * C, key_head, T, Hk, K)
    kk, qk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first in range(0, K, KEYS):
        keys = first + tl.arange(0, KEYS)
        k_CK = load(k + keys_here, tokens, keys, left, K, Hk * K)
        if ERASES:
            kk += product(k_CK, tl.trans(k_CK), TYPE)
        if READS:
            q_CK = load(q + keys_here, tokens, keys, left, K, Hk * K)
            qk += product(q_CK, tl.trans(k_CK), TYPE)

    gates = at(batch, n * C, head, T, Hv, 1) + tokens * Hv
    G_C = tl.cumsum(tl.load(log_decay + gates, mask=tokens < left, other=0.0).to(tl.float64), 0)
    tl.store(total + gates, G_C, mask=tokens < left)
    decays = decay_between(G_C, tokens)
    square = (row.to(tl.int64) * tl.num_programs(1) + n) * C * C
    if ERASES:
        b_C = tl.load(beta + gates, mask=tokens < left, other=0.0)
        lower = tl.where(tokens[:, None] > tokens[None, :], b_C[:, None] * kk * decays, 0.0)
        rest_CC = tl.where(tokens[:, None] > tokens[None, :], unit_lower_inverse(lower, C), 0.0)
        store(rest + square, rest_CC, tokens, tokens, C, C, C)
    if READS:
        store(reads + square, qk * decays, tokens, tokens, C, C, C)
