"""The two walks over the chunks, each for one sequence, head and tile of value columns, which need nothing of
each other. The state stays in float32 registers."""

import triton
import triton.language as tl

from sleeptrain.memory.kernels.matrix import at, decay, load, product, store


@triton.jit
def scan_kernel(
    q, k, v, beta, total, rest, reads, state,  # in: see factors.py; [B, T, Hv, V]; [B * Hv, K, WIDTH] float32
    out, last_state, states, written,  # out: as v; as state; S before each chunk [B * Hv, N, K, V]; Y as v
    T, Hk, Hv,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, TYPE: tl.constexpr,
    ERASES: tl.constexpr, READS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Y = A^-1 diag(b) (V - diag(exp(G)) K S);  out = diag(exp(G)) Q S + P Y;  S' = exp(G_C) S + K^T
    diag(exp(G_C - G)) Y. A rule that does not erase writes Y = diag(b) V. Columns of the state beyond those
    of v have values of zero (split.py)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    batch, head = row // Hv, row % Hv
    key_head = head // (Hv // Hk)
    tokens, keys, values = tl.arange(0, C), tl.arange(0, KEYS), tile * VALUES + tl.arange(0, VALUES)
    row = row.to(tl.int64)
    num_chunks = tl.cdiv(T, C)

    S_KV = load(state + row * K * WIDTH, keys, values, K, WIDTH, WIDTH)
    for n in range(num_chunks):
        left = T - n * C
        chunk = row * num_chunks + n
        if KEEPS:
            store(states + chunk * K * V, S_KV, keys, values, K, V, V)
        keys_here, values_here = at(batch, n * C, key_head, T, Hk, K), at(batch, n * C, head, T, Hv, V)
        gates_here = at(batch, n * C, head, T, Hv, 1)
        gates = gates_here + tokens * Hv
        b_C = tl.load(beta + gates, mask=tokens < left, other=0.0)
        G_C = tl.load(total + gates, mask=tokens < left, other=0.0)
        G_end = tl.load(total + gates_here + (tl.minimum(left, C) - 1) * Hv)
        k_CK = load(k + keys_here, tokens, keys, left, K, Hk * K)
        y_CV = load(v + values_here, tokens, values, left, V, Hv * V).to(tl.float32)
        if ERASES:
            y_CV -= decay(G_C)[:, None] * product(k_CK, S_KV, TYPE)
        y_CV = b_C[:, None] * y_CV
        if ERASES:
            y_CV += product(load(rest + chunk * C * C, tokens, tokens, C, C, C), y_CV, TYPE)
        if KEEPS:
            store(written + values_here, y_CV, tokens, values, left, V, Hv * V)
        if READS:
            q_CK = load(q + keys_here, tokens, keys, left, K, Hk * K)
            out_CV = decay(G_C)[:, None] * product(q_CK, S_KV, TYPE)
            out_CV += product(load(reads + chunk * C * C, tokens, tokens, C, C, C), y_CV, TYPE)
            store(out + values_here, out_CV, tokens, values, left, V, Hv * V)
        S_KV = decay(G_end) * S_KV + product(tl.trans(k_CK), decay(G_end - G_C)[:, None] * y_CV, TYPE)
    store(last_state + row * K * WIDTH, S_KV, keys, values, K, WIDTH, WIDTH)


@triton.jit
def scan_backward_kernel(
    q, k, beta, total, rest, reads, d_out, d_last_state,  # in: as above
    d_states, d_right, d_state,  # out: dS' after each chunk [B * Hv, N, K, V]; dR as v; as state
    T, Hk, Hv,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    TYPE: tl.constexpr, ERASES: tl.constexpr, READS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """dY = diag(exp(G_C - G)) K dS' + P^T d_out;  dR = A^-T dY;  dS = exp(G_C) dS' + Q^T diag(exp(G)) d_out
    - K^T diag(b exp(G)) dR. Where nothing erases, dR = dY and the last term is absent."""
    row, tile = tl.program_id(0), tl.program_id(1)
    batch, head = row // Hv, row % Hv
    key_head = head // (Hv // Hk)
    tokens, keys, values = tl.arange(0, C), tl.arange(0, KEYS), tile * VALUES + tl.arange(0, VALUES)
    row = row.to(tl.int64)
    num_chunks = tl.cdiv(T, C)

    dS_KV = load(d_last_state + row * K * V, keys, values, K, V, V)
    for step in range(num_chunks):
        n = num_chunks - 1 - step
        left = T - n * C
        chunk = row * num_chunks + n
        if KEEPS:
            store(d_states + chunk * K * V, dS_KV, keys, values, K, V, V)
        keys_here, values_here = at(batch, n * C, key_head, T, Hk, K), at(batch, n * C, head, T, Hv, V)
        gates_here = at(batch, n * C, head, T, Hv, 1)
        gates = gates_here + tokens * Hv
        b_C = tl.load(beta + gates, mask=tokens < left, other=0.0)
        G_C = tl.load(total + gates, mask=tokens < left, other=0.0)
        G_end = tl.load(total + gates_here + (tl.minimum(left, C) - 1) * Hv)
        k_CK = load(k + keys_here, tokens, keys, left, K, Hk * K)
        dr_CV = decay(G_end - G_C)[:, None] * product(k_CK, dS_KV, TYPE)
        dS_KV = decay(G_end) * dS_KV
        if READS:
            d_out_CV = load(d_out + values_here, tokens, values, left, V, Hv * V)
            p_CC = load(reads + chunk * C * C, tokens, tokens, C, C, C)
            dr_CV += product(tl.trans(p_CC), d_out_CV, TYPE)
            q_CK = load(q + keys_here, tokens, keys, left, K, Hk * K)
            dS_KV += product(tl.trans(q_CK), decay(G_C)[:, None] * d_out_CV.to(tl.float32), TYPE)
        if ERASES:
            rest_CC = load(rest + chunk * C * C, tokens, tokens, C, C, C)
            dr_CV += product(tl.trans(rest_CC), dr_CV, TYPE)
            dS_KV -= product(tl.trans(k_CK), (b_C * decay(G_C))[:, None] * dr_CV, TYPE)
        if KEEPS:
            store(d_right + values_here, dr_CV, tokens, values, left, V, Hv * V)
    store(d_state + row * K * V, dS_KV, keys, values, K, V, V)
