"""The kernels around the rule, interpreted on a CPU, equal the plain torch forms in float64: outputs and
every gradient; and whole blocks on kernels equal the same blocks in torch.

As in test_kernels.py, this file as a script runs all problems, in a process that interprets Triton.
"""

import json
import sys

import pytest
import torch
from own_process import interpreted
from torch import Tensor

from sleeptrain import memory
from sleeptrain.config import ModelConfig
from sleeptrain.memory.kernels.check_parts import Convolution, GatedNorm, Gates, Part, above_bar, errors
from sleeptrain.model.fast_weight import GDN, FastWeight, Jet
from sleeptrain.model.state import BlockState, Tokens

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

SMALL = {"num_tokens": 19, "num_heads": 3, "head_dim": 5, "dtype": torch.float32}
PADDED = {"has_tail": True, "has_pads": True}
HALF = {"num_tokens": 20, "num_heads": 1, "dtype": torch.float16}

PARTS: list[Part] = [
    Convolution(**SMALL, length=0.7),
    Convolution(**SMALL, **PADDED, length=0.7),
    Convolution(**SMALL, **PADDED, per_token=True),
    Convolution(**SMALL, num_taps=0, has_pads=True, length=0.7),
    Convolution(**SMALL, num_taps=1),
    Convolution(num_tokens=2, num_heads=1, head_dim=70, has_tail=True, dtype=torch.float32),
    Convolution(num_tokens=2, num_heads=1, head_dim=16, num_taps=8, dtype=torch.float32),
    Convolution(num_tokens=1, num_heads=1, head_dim=16, has_tail=True, dtype=torch.float32),
    Convolution(**HALF, head_dim=256, length=1.0, has_tail=True),
    Convolution(**HALF, head_dim=96, per_token=True),
    Gates(num_tokens=21, has_pads=True),
    Gates(num_tokens=300, num_heads=2, extreme=True, seed=1),
    Gates(num_tokens=21, decays=False),
    GatedNorm(num_tokens=7, value_dim=5, dtype=torch.float32),
    GatedNorm(num_tokens=40, value_dim=256, dtype=torch.float32),
    GatedNorm(num_tokens=7, value_dim=96, dtype=torch.float16),
]
LONG_PARTS: list[Part] = [
    Convolution(num_tokens=261, num_heads=1, head_dim=64, dtype=torch.float32, has_tail=True, has_pads=True),
    Convolution(num_tokens=70, num_taps=8, head_dim=128, length=1.0, dtype=torch.float32, has_tail=True),
    Convolution(num_tokens=70, head_dim=80, per_token=True, dtype=torch.float32, **PADDED),
    *(Convolution(num_tokens=35, head_dim=d, length=0.1, dtype=torch.float16) for d in (64, 96, 128, 256)),
    Gates(num_tokens=257, num_heads=32, has_pads=True, extreme=True),
    GatedNorm(num_tokens=75, num_heads=2, value_dim=384, dtype=torch.float32),
]
BLOCKS: dict[str, type[FastWeight]] = {"gdn": GDN, "jet": Jet}
SLOW_DECAYS, MIXED = "slow decays", "mixed types"


def run(name: str) -> dict[str, dict[str, float]]:
    return interpreted(__file__, name)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    return run("short")


@pytest.fixture(scope="module")
def found_long() -> dict[str, dict[str, float]]:
    return run("long")


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_equals_the_plain_form(part: Part, found: dict[str, dict[str, float]]) -> None:
    assert above_bar(part, found[str(part)]) == {}


@pytest.mark.more
@pytest.mark.parametrize("part", LONG_PARTS, ids=str)
def test_longer_ones_equal_the_plain_form(part: Part, found_long: dict[str, dict[str, float]]) -> None:
    assert above_bar(part, found_long[str(part)]) == {}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_on_kernels_equals_the_block_in_torch(name: str, found: dict[str, dict[str, float]]) -> None:
    assert set(found[name]) > {"out", "memory", "tail", "d_q_proj.weight", "d_A_log", "d_o_norm.weight"}
    assert {key: error for key, error in found[name].items() if not error <= 2e-5} == {}


def test_slow_decays_keep_their_digits(found: dict[str, dict[str, float]]) -> None:
    assert found[SLOW_DECAYS]["worst"] <= 1e-6


def test_types_and_layouts_may_be_mixed(found: dict[str, dict[str, float]]) -> None:
    assert found[MIXED] == {"difference": 0, "wrong types": 0}


def through_block(name: str) -> dict[str, float]:
    """Relative differences of outputs, states and gradients, kernels against chunked torch; with pads, a
    state and a tail."""
    results = [block_results(name, backend) for backend in ("chunked", "triton")]
    return {key: float((results[1][key] - x).norm() / x.norm()) for key, x in results[0].items()}


def block_results(name: str, backend: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    sizes = {"memory_heads": 2, "memory_qk_heads": 1, "memory_key_dim": 5, "memory_value_dim": 7}
    block = BLOCKS[name](
        ModelConfig(d_model=8, memory_backend=backend, negative_eigenvalues=True, jet_reduction=2, **sizes)
    )
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, state = torch.randn(2, 11, 8, requires_grad=True), torch.randn(2, 2, 5, 7, requires_grad=True)
    tail = torch.randn(2, 3, sum(block.tail_channels.values()), requires_grad=True)
    valid = torch.rand(2, 11) < 0.8
    tokens = Tokens(torch.arange(11)[None], valid, (x, x), 11, False, True)
    out, after = block(x, BlockState(state, tail), tokens)
    outputs = {"out": out, "memory": after.memory, "tail": after.tail}
    leaves = {"x": x, "state": state, "tail": tail} | dict(block.named_parameters())
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs.values()), list(leaves.values()))
    return {key: y.detach() for key, y in outputs.items()} | {f"d_{k}": g for k, g in zip(leaves, gradients)}


def slow_decays() -> dict[str, float]:
    """The worst relative error of single log decays, from 1e-13 up to 30."""
    logits = torch.linspace(-30, 30, 121)[None, :, None]
    zero = torch.zeros(1)
    log_decay, _ = memory.gates_of_logits(logits, (logits, zero, zero), None, backend="triton")
    exact = torch.log1p(logits.double().exp())
    return {"worst": float((log_decay / -exact - 1).abs().max())}


def mixed_types() -> dict[str, float]:
    """Autocast leaves x in bfloat16 and taps, tail and weights in float32, and nothing need be contiguous:
    how far the result is from that of contiguous inputs, and how many results and gradients have another type
    than what they belong to."""
    x, tail = torch.randn(2, 8, 5).bfloat16().mT, torch.randn(2, 8, 3).mT
    taps, weight = torch.randn(4, 8).mT, torch.randn(4)

    def run_parts(x: Tensor, taps: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        heads = memory.short_convolution(x, taps, tail, None, 4, backend="triton")
        return memory.gated_rms_norm(heads, heads.float(), weight, 1e-6, "triton")

    leaves = [y.detach().requires_grad_() for y in (x, taps, tail, weight)]
    out = run_parts(*leaves)
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    difference = (out.detach() - run_parts(*(y.contiguous() for y in (x, taps, tail, weight)))).abs().max()
    wrong_types = sum(g.dtype != y.dtype for g, y in zip((out, *gradients), (x, *leaves)))
    return {"difference": float(difference), "wrong types": wrong_types}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    is_short = sys.argv[1] == "short"
    results = {str(part): errors(part, "cpu") for part in (PARTS if is_short else LONG_PARTS)}
    if is_short:
        results |= {name: through_block(name) for name in BLOCKS}
        results |= {SLOW_DECAYS: slow_decays(), MIXED: mixed_types()}
    print(json.dumps(results))
