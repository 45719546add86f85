"""The rules of ``rule.py`` in parallel over chunks of tokens, with a backward pass of its own.

Within a chunk of C tokens that starts with state S, the written values Y satisfy a unit-triangular system
(the WY form of DeltaNet, arXiv 2406.06484; with decay arXiv 2412.06464). With G the running sum of log decays
and D_ij = exp(G_i - G_j) for i >= j:

    A = I + strictly_lower(diag(b) (K K^T * D))
    A [U | W] = [diag(b) V | diag(b exp(G)) K]        one solve, two right-hand sides, no S needed
    Y = U - W S
    out = diag(exp(G)) Q S + (Q K^T * D) Y
    S' = exp(G_C) S + (diag(exp(G_C - G)) K)^T Y

Only the lines with S run chunk after chunk; everything else is one batched product over all chunks. Without
erasing Y = diag(b) V. The backward pass is written by hand: it walks the chunks once in reverse and batches
the rest, which saves the bookkeeping of automatic differentiation over many small tensors.

Shape letters: N chunks, H batch x heads, C tokens of a chunk, K key size, V value size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sleeptrain.memory.rule import RULES, state_dtype


def chunked(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str = "gated_delta",
) -> tuple[Tensor | None, Tensor]:
    """The contract of ``rule.py``."""
    if v.shape[1] == 0:
        return (None if q is None else torch.zeros_like(v)), state
    dtype = state_dtype(v.dtype)
    inputs = [None if x is None else x.to(dtype) for x in (q, k, v, log_decay, beta, state)]
    with torch.autocast(v.device.type, enabled=False):
        out, state = _ChunkedRule.apply(*inputs, rule)
    return (None if out is None else out.to(v.dtype)), state


def chunk_tokens(num_tokens: int, key_dim: int) -> int:
    """Chunk length: up to 64 tokens, 128 for large heads, split evenly so that little padding is added."""
    longest = 64 if key_dim <= 64 else 128
    num_chunks = -(-num_tokens // longest)
    return -(-num_tokens // num_chunks)


class _ChunkedRule(torch.autograd.Function):
    """Saves the factors of each chunk and the state before it; recomputes the cheap scalings."""

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
    ) -> tuple[Tensor | None, Tensor]:
        decays, erases = RULES[rule]
        num_batch, num_tokens, num_heads, value_dim = v.shape
        length = chunk_tokens(num_tokens, k.shape[-1])
        groups = num_heads // k.shape[2]

        k_NHCK, v_NHCV = _to_chunks(k, length, groups), _to_chunks(v, length)
        b_NHC1 = _to_chunks(beta[..., None], length)
        decay = _decay(
            _to_chunks(log_decay[..., None], length).squeeze(-1) if decays else b_NHC1.new_zeros(1, 1, length)
        )

        u_NHCV, factors = b_NHC1 * v_NHCV, []
        if erases:
            kk_NHCC = torch.matmul(k_NHCK, k_NHCK.mT).mul_(decay.pair)
            right = torch.cat([u_NHCV, (b_NHC1 * decay.from_start) * k_NHCK], dim=-1)
            uw = _solve(b_NHC1 * kk_NHCC, right)
            factors = [kk_NHCC, uw]
            u_NHCV, w_NHCK = uw[..., :value_dim], uw[..., value_dim:]

        k_end_NHCK = k_NHCK * decay.to_end
        num_chunks = len(v_NHCV)
        written_NHCV = torch.empty_like(v_NHCV) if erases else u_NHCV
        state_HKV = state.reshape(-1, *state.shape[2:])
        states_NHKV = v.new_empty(num_chunks, *state_HKV.shape)
        states_NHKV[0] = state_HKV
        last_HKV = torch.empty_like(states_NHKV[0])  # its own storage: it outlives the others
        whole_NH11 = decay.whole.expand(num_chunks, -1)[..., None, None]
        for n in range(num_chunks):
            before, after = states_NHKV[n], states_NHKV[n + 1] if n + 1 < num_chunks else last_HKV
            if erases:
                torch.baddbmm(u_NHCV[n], w_NHCK[n], before, alpha=-1, out=written_NHCV[n])
            torch.mul(whole_NH11[n], before, out=after).baddbmm_(k_end_NHCK[n].mT, written_NHCV[n])

        out, q_NHCK, qk_NHCC = None, None, None
        if q is not None:
            q_NHCK = _to_chunks(q, length, groups)
            qk_NHCC = torch.matmul(q_NHCK, k_NHCK.mT).mul_(decay.pair)
            out_NHCV = torch.matmul(q_NHCK * decay.from_start, states_NHKV).add_(
                torch.matmul(qk_NHCC, written_NHCV)
            )
            out = _from_chunks(out_NHCV, num_batch, num_tokens)

        ctx.sizes, ctx.rule = (num_batch, num_tokens, groups), rule
        chunks = (q_NHCK, k_NHCK, v_NHCV, b_NHC1, written_NHCV, states_NHKV, qk_NHCC)
        ctx.save_for_backward(*decay, *chunks, *factors)  # all of it: activation checkpointing drops these
        return out, last_HKV.reshape(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
        decay = _Decay(*saved[:4])
        q, k, v, b, written, states, qk, *factors = saved[4:]
        num_batch, num_tokens, groups = ctx.sizes
        length, value_dim, erases = k.shape[-2], v.shape[-1], bool(factors)

        # What each chunk's outputs ask of its written values and of its state, all chunks at once.
        if q is None:
            d_written, d_states = torch.zeros_like(written), None
        else:
            d_out = _to_chunks(d_out, length)
            d_written = torch.matmul(qk.mT, d_out)
            d_states = torch.matmul((q * decay.from_start).mT, d_out)

        # The reverse walk: what the later chunks ask of the state that this one leaves.
        k_end = k * decay.to_end
        whole = decay.whole.expand(len(k), -1)[..., None, None]
        d_after = torch.empty_like(states)
        d_state_HKV = d_state.reshape(states.shape[1:])
        for n in reversed(range(len(k))):
            d_after[n] = d_state_HKV
            d_written[n].baddbmm_(k_end[n], d_state_HKV)
            d_state_HKV = whole[n] * d_state_HKV
            if d_states is not None:
                d_state_HKV += d_states[n]
            if erases:
                d_state_HKV.baddbmm_(factors[1][n, ..., value_dim:].mT, d_written[n], alpha=-1)

        # The rest, all chunks at once. dG collects the gradient of the running sum of log decays.
        dk_end = torch.matmul(written, d_after.mT)
        dk = dk_end * decay.to_end
        end = _dot(dk_end, k_end)
        dG = -end
        dG[..., -1] += end.sum(-1) + decay.whole * (states * d_after).sum((-1, -2))
        dq = None
        if q is not None:
            d_qk = torch.matmul(d_out, written.mT)
            dG += _rows_minus_columns(d_qk * qk)
            d_qk *= decay.pair
            dq_start = torch.matmul(d_out, states.mT).mul_(decay.from_start)
            dG += _dot(dq_start, q)
            dq = dq_start.add_(torch.matmul(d_qk, k))
            dk += torch.matmul(d_qk.mT, q)

        if erases:
            kk, uw = factors
            d_uw = torch.cat([d_written, torch.matmul(d_written, states.mT).neg_()], dim=-1)
            d_right = _solve_transposed(b * kk, d_uw)
            d_kk = torch.matmul(d_right, uw.mT).neg_().tril_(-1)
            dv, dk_start = d_right[..., :value_dim], d_right[..., value_dim:]
            d_by_key = _dot(dk_start, k)[..., None] * decay.from_start
            on_kk = d_kk * kk
            db = _dot(dv, v)[..., None] + d_by_key + on_kk.sum(-1, keepdim=True)
            dG += (b * d_by_key).squeeze(-1) + _rows_minus_columns(b * on_kk)
            d_kk = d_kk.mul_(decay.pair).mul_(b)
            dk += dk_start * (b * decay.from_start)
            dk += torch.matmul(d_kk, k).add_(torch.matmul(d_kk.mT, k))
            dv = b * dv
        else:
            db, dv = _dot(d_written, v)[..., None], b * d_written

        d_log_decay = _running_sum(dG, backward=True).to(dG.dtype) if RULES[ctx.rule].decays else None
        return (
            None if dq is None else _from_chunks(dq, num_batch, num_tokens, groups),
            _from_chunks(dk, num_batch, num_tokens, groups),
            _from_chunks(dv, num_batch, num_tokens),
            None
            if d_log_decay is None
            else _from_chunks(d_log_decay[..., None], num_batch, num_tokens).squeeze(-1),
            _from_chunks(db, num_batch, num_tokens).squeeze(-1),
            d_state_HKV.reshape(d_state.shape),
            None,
        )


class _Decay(NamedTuple):
    """Products of decays inside a chunk."""

    pair: Tensor  # [N, H, C, C], from token j to token i >= j, else 0
    from_start: Tensor  # [N, H, C, 1]
    to_end: Tensor  # [N, H, C, 1]
    whole: Tensor  # [N, H]


def _decay(log_decay_NHC: Tensor) -> _Decay:
    """Running sums in float64: their differences must survive log decays of -60 next to 0 in the same
    chunk."""
    dtype = log_decay_NHC.dtype
    total = _running_sum(log_decay_NHC)
    between = (total[..., :, None] - total[..., None, :]).to(dtype)
    return _Decay(
        pair=_exp(between).tril_(),
        from_start=_exp(total.to(dtype))[..., None],
        to_end=_exp((total[..., -1:] - total).to(dtype))[..., None],
        whole=_exp(total[..., -1].to(dtype)),
    )


def _running_sum(x_NHC: Tensor, backward: bool = False) -> Tensor:
    """Over the tokens of a chunk, or from each token to the end, in float64; as a product, since CUDA's own
    running sums are not deterministic."""
    ones = torch.ones(x_NHC.shape[-1:] * 2, dtype=torch.float64, device=x_NHC.device)
    ones = ones.tril_() if backward else ones.triu_()
    return torch.bmm(x_NHC.double(), ones.expand(len(x_NHC), -1, -1))


def _exp(logs: Tensor) -> Tensor:
    """Decays from their logs. Positive logs count as 0, and decays next to the smallest normal number (below
    1e-30 in float32) as none, since denormal numbers slow a CPU's products down many times."""
    smallest = torch.finfo(logs.dtype).tiny ** 0.8
    decays = logs.clamp(math.log(smallest), 0.0).exp_()
    return torch.nn.functional.threshold(decays, 1.001 * smallest, 0.0, inplace=True)


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """X with ``lower`` X = ``right``, ``lower`` unit triangular. Transposed, both have the layout of LAPACK:
    half the time."""
    return torch.linalg.solve_triangular(lower.mT, right.mT, upper=True, left=False, unitriangular=True).mT


def _solve_transposed(lower: Tensor, right: Tensor) -> Tensor:
    """X with ``lower``^T X = ``right``."""
    return torch.linalg.solve_triangular(lower, right.mT, upper=False, left=False, unitriangular=True).mT


def _to_chunks(x: Tensor, length: int, groups: int = 1) -> Tensor:
    """[B, T, heads, D] -> [N, B * heads * groups, C, D]; added tokens are zero, so they neither decay nor
    write."""
    num_batch, num_tokens, num_heads, dim = x.shape
    num_chunks = -(-num_tokens // length)
    if num_chunks * length != num_tokens:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, num_chunks * length - num_tokens))
    x = x.reshape(num_batch, num_chunks, length, num_heads, 1, dim).permute(1, 0, 3, 4, 2, 5)
    return x.expand(-1, -1, -1, groups, -1, -1).reshape(
        num_chunks, num_batch * num_heads * groups, length, dim
    )


def _from_chunks(x: Tensor, num_batch: int, num_tokens: int, groups: int = 1) -> Tensor:
    """The inverse of ``_to_chunks``, summed over the value heads that share a key head: its gradient."""
    num_chunks, _, length, dim = x.shape
    x = x.reshape(num_chunks, num_batch, -1, groups, length, dim)
    x = x.sum(3) if groups > 1 else x.squeeze(3)
    return x.permute(1, 0, 3, 2, 4).reshape(num_batch, num_chunks * length, -1, dim)[:, :num_tokens]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _rows_minus_columns(x: Tensor) -> Tensor:
    """Gradient of G from that of G_i - G_j, weighted by ``x``."""
    return x.sum(-1) - x.sum(-2)
