"""The gradients of what a chunk was given, once states and their gradients are known; all chunks at once."""

import triton
import triton.language as tl

from sleeptrain.memory.kernels.matrix import at, decay, decay_between, load, product, store


@triton.jit
def gradients_kernel(
    q, k, v, beta, total, states, written, d_out, d_states, d_right,  # in: see scan.py
    dq, dk, dv, d_log_decay, d_beta,  # out: [B, T, Hv, K], for each value head; [B, T, Hv, V]; [B, T, Hv]
    T, Hk, Hv,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    TYPE: tl.constexpr, ERASES: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """With dP = tril(d_out Y^T) * D and dA = -diag(b) strictly_lower(dR Y^T) * D:

        dq = diag(exp(G)) d_out S^T + dP K
        dk = rows + columns     rows = -diag(b exp(G)) dR S^T + dA K       (the k of the token that erases)
                                columns = diag(exp(G_C - G)) Y dS'^T + dP^T Q + dA^T K       (that is written)
        dv = diag(b) dR;  d_beta = <dR, v> + <rows, k> / b

    A decay exp(G_i - G_j) stands with a q or k of row i and a k of column j, so dG = <dq, q> + <rows -
    columns, k>, and the last token's has <S', dS'> besides. A log decay is part of G from its token on.
    """
    row, n = tl.program_id(0), tl.program_id(1)
    batch, head = row // Hv, row % Hv
    key_head = head // (Hv // Hk)
    tokens, left = tl.arange(0, C), T - n * C
    state = (row.to(tl.int64) * tl.num_programs(1) + n) * K * V
    keys_here, d_keys_here = at(batch, n * C, key_head, T, Hk, K), at(batch, n * C, head, T, Hv, K)
    values_here, gates_here = at(batch, n * C, head, T, Hv, V), at(batch, n * C, head, T, Hv, 1)

    gates = gates_here + tokens * Hv
    b_C = tl.load(beta + gates, mask=tokens < left, other=0.0)
    G_C = tl.load(total + gates, mask=tokens < left, other=0.0)
    G_end = tl.load(total + gates_here + (tl.minimum(left, C) - 1) * Hv)

    dp_CC, da_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    d_beta_C = tl.zeros([C], tl.float32)
    for first in range(0, V, VALUES):
        values = first + tl.arange(0, VALUES)
        y_CV = load(written + values_here, tokens, values, left, V, Hv * V)
        dr_CV = load(d_right + values_here, tokens, values, left, V, Hv * V)
        v_CV = load(v + values_here, tokens, values, left, V, Hv * V)
        if READS:
            d_out_CV = load(d_out + values_here, tokens, values, left, V, Hv * V)
            dp_CC += product(d_out_CV, tl.trans(y_CV), TYPE)
        if ERASES:
            da_CC -= product(dr_CV, tl.trans(y_CV), TYPE)
        d_beta_C += tl.sum(dr_CV.to(tl.float32) * v_CV.to(tl.float32), 1)
        store(dv + values_here, b_C[:, None] * dr_CV.to(tl.float32), tokens, values, left, V, Hv * V)
    decays = decay_between(G_C, tokens)
    dp_CC *= decays
    da_CC = tl.where(tokens[:, None] > tokens[None, :], da_CC * decays, 0.0)  # without b yet

    dG_C, d_end_K = tl.zeros([C], tl.float32), tl.zeros([KEYS], tl.float32)
    for first in range(0, K, KEYS):
        keys = first + tl.arange(0, KEYS)
        k_CK = load(k + keys_here, tokens, keys, left, K, Hk * K)
        dq_CK, rows_CK = tl.zeros([C, KEYS], tl.float32), tl.zeros([C, KEYS], tl.float32)
        columns_CK = tl.zeros([C, KEYS], tl.float32)
        for first_value in range(0, V, VALUES):
            values = first_value + tl.arange(0, VALUES)
            S_KV = load(states + state, keys, values, K, V, V)
            dS_KV = load(d_states + state, keys, values, K, V, V)
            columns_CK += product(
                load(written + values_here, tokens, values, left, V, Hv * V), tl.trans(dS_KV), TYPE
            )
            if READS:
                dq_CK += product(
                    load(d_out + values_here, tokens, values, left, V, Hv * V), tl.trans(S_KV), TYPE
                )
            if ERASES:
                rows_CK -= product(
                    load(d_right + values_here, tokens, values, left, V, Hv * V), tl.trans(S_KV), TYPE
                )
            d_end_K += decay(G_end) * tl.sum(S_KV.to(tl.float32) * dS_KV.to(tl.float32), 1)
        k_float = k_CK.to(tl.float32)
        columns_CK *= decay(G_end - G_C)[:, None]
        d_end_K += tl.sum(columns_CK * k_float, 0)  # S' = exp(G_C) S + K^T diag(exp(G_C - G)) Y
        if READS:
            q_CK = load(q + keys_here, tokens, keys, left, K, Hk * K)
            dq_CK = dq_CK * decay(G_C)[:, None] + product(dp_CC, k_CK, TYPE)
            columns_CK += product(tl.trans(dp_CC), q_CK, TYPE)
            dG_C += tl.sum(dq_CK * q_CK.to(tl.float32), 1)
            store(dq + d_keys_here, dq_CK, tokens, keys, left, K, Hv * K)
        if ERASES:
            rows_CK = rows_CK * decay(G_C)[:, None] + product(da_CC, k_CK, TYPE)
            d_beta_C += tl.sum(rows_CK * k_float, 1)
            rows_CK *= b_C[:, None]
            columns_CK += product(tl.trans(da_CC), b_C[:, None] * k_float, TYPE)
        dG_C += tl.sum((rows_CK - columns_CK) * k_float, 1)
        store(dk + d_keys_here, rows_CK + columns_CK, tokens, keys, left, K, Hv * K)

    d_log_decay_C = tl.cumsum(dG_C, 0, reverse=True) + tl.sum(d_end_K, 0)
    tl.store(d_log_decay + gates, d_log_decay_C, mask=tokens < left)
    tl.store(d_beta + gates, d_beta_C, mask=tokens < left)
