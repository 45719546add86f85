"""A sequence scanned in segments equals the recurrence as well as one that is not split.

One process of its own runs all problems, interpreted: this file as a script (see test_kernels.py).
"""

import json
import sys

import pytest
import torch
from own_process import interpreted

from sleeptrain import memory
from sleeptrain.memory.kernels.check import Case, above_bar, errors, make_inputs
from sleeptrain.memory.kernels.tiles import Tiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

ONE = {"num_sequences": 1, "num_heads": 1, "num_key_heads": 1, "num_tokens": 64}
EXACT = Case(**ONE, key_dim=32, value_dim=32, dtype=torch.float32)
HALF = EXACT._replace(dtype=torch.float16)
SHARED = Case(num_tokens=32, num_key_heads=1, key_dim=24, value_dim=40, dtype=torch.float32)

CASES: list[tuple[Case, int]] = [
    *((EXACT._replace(rule=rule), 4) for rule in memory.RULES),
    *((EXACT._replace(rule=rule, extreme=True, num_tokens=32), 2) for rule in memory.RULES),
    *((EXACT._replace(rule=rule, is_read=False), 4) for rule in ("gated_delta", "delta")),
    (EXACT._replace(num_tokens=68, slow=True), 4),  # segments that end within a chunk
    (EXACT._replace(num_tokens=34, extreme=True), 2),
    (SHARED, 2),
    (HALF, 4),
    (HALF._replace(rule="delta", extreme=True), 4),
]
OTHER_CALLS = "other calls"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    return interpreted(__file__)


@pytest.mark.parametrize(("case", "num_segments"), CASES, ids=str)
def test_equals_the_recurrence(case: Case, num_segments: int, found: dict[str, dict[str, float]]) -> None:
    measured = found[label(case, num_segments)]
    assert set(measured) >= {"out", "last_state", "d_k", "d_v", "d_log_decay", "d_beta", "d_state"}
    assert above_bar(case, measured) == {}


def test_autocast_layouts_and_a_call_without_gradients_change_nothing(
    found: dict[str, dict[str, float]],
) -> None:
    assert found[OTHER_CALLS] == {"out": 0, "state": 0, "bytes of other states": 0}


def label(case: Case, num_segments: int) -> str:
    return f"{case} {num_segments}"


def tiles(num_segments: int) -> Tiles:
    columns = {"factor_keys": 16, "scan_values": 32, "gradient_keys": 32, "gradient_values": 32}
    return Tiles(16, **columns, segments=num_segments)


def other_calls() -> dict[str, float]:
    """How far results under autocast and from inputs that are not contiguous are from those of plain inputs
    without gradients; and what the state that remains of a call keeps alive beside itself."""
    from sleeptrain.memory.kernels.rule import chunked_triton

    plain = make_inputs(HALF._replace(num_sequences=2, num_tokens=32), "cpu")
    apart = [x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in plain]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = chunked_triton(*apart, tiles=tiles(2))
    with torch.no_grad():
        expected = chunked_triton(*plain, tiles=tiles(2))
    differences = [float((x.detach() - y).abs().max()) for x, y in zip(outputs, expected)]
    state = expected[1]
    kept = state.untyped_storage().nbytes() - state.numel() * state.element_size()
    return dict(zip(("out", "state"), differences)) | {"bytes of other states": kept}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    results = {label(case, count): errors(case, "cpu", tiles(count)) for case, count in CASES}
    print(json.dumps(results | {OTHER_CALLS: other_calls()}))
