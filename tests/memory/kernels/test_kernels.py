"""The Triton kernels, interpreted on a CPU, equal the recurrence: outputs, state and every gradient.

Triton reads TRITON_INTERPRET when it is imported, so one process of its own runs all problems: this file as a
script. Empty tensors are filled with nan there, so that what a kernel fails to write is seen.
"""

import json
import sys

import pytest
import torch
from own_process import interpreted

from sleeptrain import memory
from sleeptrain.memory.kernels.check import STEPS, Case, above_bar, errors, make_inputs
from sleeptrain.memory.kernels.tiles import Tiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

ONE = {"num_sequences": 1, "num_heads": 1, "num_key_heads": 1}
EXACT = ONE | {"dtype": torch.float32}
SHORT = EXACT | {"num_tokens": 70}
HALF = ONE | {"dtype": torch.float16, "num_tokens": 70, "extreme": True}
BFLOAT16 = ONE | {"dtype": torch.bfloat16, "num_tokens": 70}
SMALL_TILES = Tiles(16, factor_keys=16, scan_values=16, gradient_keys=16, gradient_values=16)
WIDE_TILES = Tiles(64, factor_keys=64, scan_values=64, gradient_keys=64, gradient_values=32)
SHARED = {"num_heads": 2, "num_key_heads": 1, "key_dim": 96, "value_dim": 160}

CASES: list[tuple[Case, Tiles | None]] = [
    *((Case(rule, **SHORT, extreme=True), None) for rule in memory.RULES),
    (Case("delta", **SHORT, is_read=False), None),
    (Case(**SHORT, is_read=False), None),
    (Case(dtype=torch.float32, num_tokens=130, num_heads=1, num_key_heads=1), None),
    *((Case(**EXACT, num_tokens=length, extreme=True), None) for length in (1, 15, 31, 64, 65)),
    *((Case(**SHORT, key_dim=dim, value_dim=dim), None) for dim in (96, 128, 256)),
    (Case(**SHORT | SHARED), None),
    (Case(**SHORT, key_dim=5, value_dim=7), None),
    *((Case(**EXACT, num_tokens=75, key_dim=80, extreme=True), t) for t in (SMALL_TILES, WIDE_TILES)),
    *((Case(**HALF, key_dim=dim, value_dim=dim), None) for dim in (64, 96, 128, 256)),
    (Case("delta", **HALF), None),
    (Case(**HALF | SHARED), None),
    *((Case(**BFLOAT16, extreme=extreme), None) for extreme in (False, True)),
    *((case._replace(extreme=extreme), None) for case in STEPS for extreme in (False, True)),
    *((case._replace(dtype=torch.float32, key_dim=5, value_dim=7), None) for case in STEPS),
]
CUT_OFF = (
    2.5  # the interpreter cuts bfloat16 off where a GPU rounds to nearest: twice the error, and a margin
)
THROUGH_APPLY = "through apply"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    return interpreted(__file__)


@pytest.mark.parametrize(("case", "tiles"), CASES, ids=str)
def test_equals_the_recurrence(case: Case, tiles: Tiles | None, found: dict[str, dict[str, float]]) -> None:
    measured = found[label(case, tiles)]
    gradients = {"d_k", "d_v", "d_log_decay", "d_beta", "d_state"} if case.is_learned else set()
    assert set(measured) >= {"out", "last_state"} | gradients
    margin = CUT_OFF if case.dtype == torch.bfloat16 else 1
    assert above_bar(case, {name: error / margin for name, error in measured.items()}) == {}


def test_apply_takes_any_layout_and_mixed_types(found: dict[str, dict[str, float]]) -> None:
    assert found[THROUGH_APPLY] == {"out": 0, "state": 0, "wrong types": 0}


def label(case: Case, tiles: Tiles | None) -> str:
    return f"{case} {tiles}"


def through_apply() -> dict[str, float]:
    """A model hands over queries and keys in float32, values in bfloat16, and not contiguous: how far the
    results are from those of plain inputs without gradients, and how many gradients have another type."""
    low = make_inputs(Case(**BFLOAT16), "cpu")
    mixed = [low[0].float(), low[1].float(), *low[2:]]
    apart = [x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in mixed]
    outputs = memory.apply(*apart, backend="triton")
    gradients = torch.autograd.grad([x.sum() for x in outputs], apart)
    with torch.no_grad():
        plain = memory.apply(*low, backend="triton")
    differences = [float((x.detach() - y).abs().max()) for x, y in zip(outputs, plain)]
    wrong_types = sum(g.dtype != x.dtype for g, x in zip(gradients, apart))
    return dict(zip(("out", "state"), differences)) | {"wrong types": wrong_types}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    results = {label(case, tiles): errors(case, "cpu", tiles) for case, tiles in CASES}
    print(json.dumps(results | {THROUGH_APPLY: through_apply()}))
