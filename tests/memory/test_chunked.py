"""The chunked form equals the recurrence: outputs, state and every gradient."""

import gc

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleeptrain.memory import RULES, apply, recurrent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("q", "k", "v", "log_decay", "beta", "state")
EXTREME_DECAYS = torch.tensor([0.0, -1e-6, -1e-3, -0.1, -1.0, -10.0, -60.0], dtype=torch.float64)
EXTREME_BETAS = torch.tensor([0.0, 1.0, 1.99], dtype=torch.float64)


def inputs(num_tokens: int, extreme: bool = False, key_heads: int = 2, key_dim: int = 8) -> list[Tensor]:
    """q, k, v, log_decay, beta, state in float64, with unit keys and a state that is not zero."""
    draw = {"dtype": torch.float64}
    q, k = torch.randn(2, 2, num_tokens, key_heads, key_dim, **draw)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v, state = torch.randn(2, num_tokens, 2, 5, **draw), torch.randn(2, 2, key_dim, 5, **draw)
    shape = (2, num_tokens, 2)
    log_decay, beta = -torch.rand(shape, **draw), torch.rand(shape, **draw)
    if extreme:
        log_decay = EXTREME_DECAYS[torch.randint(len(EXTREME_DECAYS), shape)]
        beta = EXTREME_BETAS[torch.randint(len(EXTREME_BETAS), shape)]
    return [q, k, v, log_decay, beta, state]


def results(function, values: list[Tensor], rule: str) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random functional of both outputs."""
    leaves = [x.clone().requires_grad_() for x in values]
    out, state = function(*leaves, rule=rule)
    draw = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=draw, dtype=torch.float64)).sum() for x in (out, state))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    named = {f"d_{name}": torch.zeros_like(x) if g is None else g for name, x, g in zip(NAMES, leaves, grads)}
    return {"out": out.detach(), "state": state.detach()} | named


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, reference in expected.items():
        error = (actual[name].double() - reference.double()).norm()
        assert actual[name].shape == reference.shape
        assert error <= tolerance * reference.double().norm(), f"{name}: {error / reference.norm():.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_recurrence(rule: str, num_tokens: int, extreme: bool, dtype: torch.dtype) -> None:
    values = [x.to(dtype) for x in inputs(num_tokens, extreme)]
    expected = results(recurrent, [x.double() for x in values], rule)
    assert_equal(results(apply, values, rule), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("key_heads", "key_dim"), [(1, 8), (2, 80)])
@pytest.mark.parametrize("rule", RULES)
def test_shared_keys_and_large_heads(rule: str, key_heads: int, key_dim: int) -> None:
    values = inputs(150, key_heads=key_heads, key_dim=key_dim)
    assert_equal(results(apply, values, rule), results(recurrent, values, rule), 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_without_queries_the_state_and_its_gradients_are_the_same(rule: str) -> None:
    def written(q: Tensor | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in values]
        out, state = apply(q, *leaves, rule=rule)
        assert (out is None) == (q is None)
        grads = torch.autograd.grad(state.sin().sum(), leaves, allow_unused=True)
        return [state, *(g for g in grads if g is not None)]

    q, *values = inputs(70, key_heads=1)
    without, full = written(None), written(q)
    assert len(without) == len(full) >= 5
    torch.testing.assert_close(without, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck_over_two_chunks(rule: str) -> None:
    values = [x[:1].requires_grad_() for x in inputs(66, key_heads=1, key_dim=2)]
    assert torch.autograd.gradcheck(lambda *x: apply(*x, rule=rule), values, fast_mode=True)


def test_small_gradcheck_of_every_element() -> None:
    values = [x[:1].requires_grad_() for x in inputs(4, key_heads=1, key_dim=2)]
    assert torch.autograd.gradcheck(lambda *x: apply(*x), values)


def test_state_stays_float32_under_bf16_and_autocast() -> None:
    q, k, v, *rest = inputs(70)
    low = [x.bfloat16() for x in (q, k, v)]
    rest = [x.float() for x in rest]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = apply(*low, *rest)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    _, expected = recurrent(*(x.double() for x in low + rest))
    assert (state - expected).norm() <= 1e-5 * expected.norm()


def test_state_in_two_stretches_equals_one() -> None:
    values = inputs(90)
    out, state = apply(*values)
    first, middle = apply(*(x[:, :37] for x in values[:5]), values[5])
    second, last = apply(*(x[:, 37:] for x in values[:5]), middle)
    torch.testing.assert_close((torch.cat([first, second], 1), last), (out, state))


def test_under_activation_checkpointing_nothing_is_kept_for_the_backward_pass() -> None:
    """What a chunk keeps must go through saved tensors: only those are dropped and computed again."""

    def alive() -> set[tuple[int, int]]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        return {(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors}

    values = [x.requires_grad_() for x in inputs(256)]
    before = alive()
    out, state = checkpoint(apply, *values, use_reentrant=False, preserve_rng_state=False)
    kept = sum(size for _, size in alive() - before)
    assert kept == out.nbytes + state.nbytes
    (out.sum() + state.sum()).backward()
