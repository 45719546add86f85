"""The learned local rules by which a fast weight is written and read, as plain recurrences.

The contract, for every rule and every faster form of it::

    apply(q, k, v, log_decay, beta, state) -> (out, state)

    q, k       [B, T, Hk, K]  queries and keys; the caller normalises k and scales q
    v          [B, T, Hv, V]  values; Hk divides Hv, and a group is Hv / Hk consecutive value heads
    log_decay  [B, T, Hv]     log of the decay a in (0, 1], so at most 0
    beta       [B, T, Hv]     strength of the write
    state      [B, Hv, K, V]  the fast weights before the first token; returned after the last one
    out        [B, T, Hv, V]  what each token reads after its own write

A token with log_decay = 0 and beta = 0 leaves the state untouched. Gradients flow through both states. Gates
and state are computed in at least float32, ``out`` comes back in the type of ``v``. With ``q=None`` nothing
is read: only the state is advanced, and out is None.

Shape letters: B batch, T tokens, Hk query/key heads, Hv value heads, K key size, V value size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """What distinguishes the rules: whether the state decays, and whether a write first erases along its
    key."""

    decays: bool
    erases: bool


RULES = {
    "gated_delta": Rule(decays=True, erases=True),  # Gated DeltaNet, arXiv 2412.06464
    "delta": Rule(decays=False, erases=True),  # DeltaNet, arXiv 2406.06484
    "gated_hebbian": Rule(decays=True, erases=False),  # the Mamba-2 form, arXiv 2405.21060
}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which gates and fast weights are kept: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def recurrent(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str = "gated_delta",
) -> tuple[Tensor | None, Tensor]:
    """Steps token by token: the reference for everything faster (method: paper section 2.2).

    S <- a S;  S <- S + b k (v - S^T k)^T, or S + b k v^T for a rule that does not erase;  o = S^T q
    """
    decays, erases = RULES[rule]
    dtype = state_dtype(v.dtype)
    groups = v.shape[2] // k.shape[2]
    k = k.to(dtype).repeat_interleave(groups, dim=2)
    q = None if q is None else q.to(dtype).repeat_interleave(groups, dim=2)
    state = state.to(dtype)
    reads = []
    for t in range(v.shape[1]):
        k_BHK, v_BHV, b_BH1 = k[:, t], v[:, t].to(dtype), beta[:, t, :, None].to(dtype)
        if decays:
            state = log_decay[:, t, :, None, None].to(dtype).exp() * state
        if erases:
            v_BHV = v_BHV - torch.einsum("bhkv,bhk->bhv", state, k_BHK)
        state = state + torch.einsum("bhk,bhv->bhkv", k_BHK, b_BH1 * v_BHV)
        if q is not None:
            reads.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    if q is None:
        return None, state
    out = torch.stack(reads, dim=1) if reads else torch.zeros_like(v, dtype=dtype)
    return out.to(v.dtype), state
