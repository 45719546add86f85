"""The compiled Triton kernels on a device: every rule, head size, type and kind of gate, and what stands
around the rule. ``pytest -m gpu``.

The same check as ``python -m sleeptrain.memory.kernels.check``, to be run before a long run on new hardware.
"""

import pytest

from sleeptrain import memory
from sleeptrain.memory.dispatch import KERNELS
from sleeptrain.memory.kernels.check import Case, check_device, check_run, measure, obstacle_to, problems

pytestmark = pytest.mark.gpu
NUM_SEEDS = 20


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", list(problems(NUM_SEEDS)), ids=str)
def test_equals_the_plain_form(case, backend: str) -> None:
    if reason := obstacle_to(case, "cuda", backend):
        pytest.skip(reason)
    assert measure(case, "cuda", backend)[1] == {}


def test_check_device_passes() -> None:
    check_device("cuda")


@pytest.mark.parametrize("rule", memory.RULES)
def test_the_check_at_the_start_of_a_run_passes(rule: str) -> None:
    check_run(Case(rule, num_sequences=64, num_tokens=1024, key_dim=128, value_dim=128), "cuda", "triton")
