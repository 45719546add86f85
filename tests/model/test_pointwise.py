"""The functions that torch.compile fuses: traced as one graph each, with the values and gradients of plain
torch. What is traced runs here by torch itself, for which no compiler is needed."""

from collections.abc import Callable

import pytest
import torch
from plain import WINDOW, assert_model_is_plain, assert_same, build, gradients, make
from torch import Tensor

from sleeptrain.model.graphs import PassGraphs
from sleeptrain.model.layers import RMSNorm, rotary_table
from sleeptrain.model.pointwise import PLAIN, Pointwise, compiled, use

BY_TORCH = {"backend": "aot_eager"}


@pytest.fixture(scope="module")
def traced() -> Pointwise:
    return compiled(**BY_TORCH)


def solved(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and gradients of all inputs for one of its own."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.more
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_traced_functions_equal_plain_ones(dtype: torch.dtype, traced: Pointwise) -> None:
    x, gate = torch.randn(2, 2, 5, 3, 8).to(dtype)
    weight = torch.randn(8, dtype=torch.promote_types(dtype, torch.float32))
    tables = [rotary_table(torch.arange(5)[None], size, 1e4, weight.dtype) for size in (8, 4, 0)]
    calls: list[tuple[int, Callable[[Pointwise], list[Tensor]]]] = [
        (2, lambda p: solved(p.swiglu, gate, x)),
        *((1, lambda p, t=t: solved(lambda y: p.rotate(y, t), x)) for t in tables),
        *(
            (2, lambda p, low=low: solved(lambda y, w: p.rms_norm(y, w, 1e-6, low), x, weight))
            for low in (None, torch.bfloat16)
        ),
    ]
    for num_inputs, call in calls:
        found, expected = call(traced), call(PLAIN)
        assert len(found) == 1 + num_inputs
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.more
@pytest.mark.parametrize("replays", [False, True])
def test_a_model_of_traced_functions_is_the_plain_model(replays: bool, traced: Pointwise) -> None:
    settings = {"eviction": "sliding", "norm_placement": "sandwich", "rotary_fraction": 0.5}
    model = build("attn jet gdn", activation_checkpointing="pass", **settings)
    use(model, traced)
    if replays:
        model.graphs = PassGraphs(model.stack)
    plain, batch = build("attn jet gdn", **settings), make(3 * WINDOW - 1, [1, 2])
    output, expected = model(batch, 3), plain(batch, 3)
    torch.testing.assert_close(output.nll, expected.nll)
    assert_same(gradients(output.loss_sum, model), gradients(expected.loss_sum, plain))


def test_every_module_uses_what_it_is_told_to() -> None:
    calls = set()

    def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: calls.add(name) or function(*args)

    model, batch = build("attn gdn"), make(2 * WINDOW, [1])
    use(model, Pointwise(**{name: noted(name, function) for name, function in PLAIN._asdict().items()}))
    assert_model_is_plain(model, batch, 1)
    assert calls == set(Pointwise._fields)
    use(model, PLAIN)
    calls.clear()
    model(batch, 1)
    assert not calls


def test_a_norm_for_linear_maps_alone_is_in_the_type_in_which_they_multiply() -> None:
    x = torch.randn(2, 8)
    for is_cast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        norm = RMSNorm(8, 1e-6, is_cast=is_cast)
        assert norm(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == expected
            torch.testing.assert_close(norm(x), norm(x.double()).to(expected))
