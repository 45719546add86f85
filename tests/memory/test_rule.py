"""The recurrence against the formula of the method, one head and one token at a time."""

import pytest
import torch
from torch import Tensor

from sleeptrain.memory import RULES, recurrent


def by_hand(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, rule: str):
    """S <- a S;  S <- S + b k (v - S^T k)^T;  o = S^T q, with python scalars for a and b."""
    out, after = torch.zeros_like(v), state.clone()
    group = v.shape[2] // k.shape[2]
    for n in range(v.shape[0]):
        for head in range(v.shape[2]):
            S = state[n, head]
            for t in range(v.shape[1]):
                a = 1.0 if rule == "delta" else float(log_decay[n, t, head].exp())
                key, value = k[n, t, head // group], v[n, t, head]
                S = a * S
                missing = value if rule == "gated_hebbian" else value - S.T @ key
                S = S + float(beta[n, t, head]) * torch.outer(key, missing)
                out[n, t, head] = S.T @ q[n, t, head // group]
            after[n, head] = S
    return out, after


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("rule", ["gated_delta", "delta", "gated_hebbian"])
def test_recurrence_is_the_formula(rule: str, key_heads: int) -> None:
    draw = {"dtype": torch.float64}
    q, k = torch.randn(2, 5, key_heads, 3, **draw), torch.randn(2, 5, key_heads, 3, **draw)
    v, state = torch.randn(2, 5, 4, 2, **draw), torch.randn(2, 4, 3, 2, **draw)
    log_decay, beta = -torch.rand(2, 5, 4, **draw), 2 * torch.rand(2, 5, 4, **draw)
    expected = by_hand(q, k, v, log_decay, beta, state, rule)
    torch.testing.assert_close(recurrent(q, k, v, log_decay, beta, state, rule), expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_token_with_zero_gates_leaves_the_state(rule: str) -> None:
    q, k, v, state = (torch.randn(shape) for shape in [(1, 1, 1, 3)] * 3 + [(1, 1, 3, 3)])
    assert torch.equal(recurrent(q, k, v, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), state, rule)[1], state)
