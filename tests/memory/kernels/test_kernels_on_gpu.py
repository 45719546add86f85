"""The compiled Triton kernels on a device: every rule, head size, type and kind of gate, and what stands
around the rule. ``pytest -m gpu``.

The same check as ``python -m sleeptrain.memory.kernels.check``, to be run before a long run on new hardware.
"""

import pytest

from sleeptrain.memory.kernels.check import check_device, measure, problems

pytestmark = pytest.mark.gpu
NUM_SEEDS = 20


@pytest.mark.parametrize("case", problems(NUM_SEEDS), ids=str)
def test_equals_the_plain_form(case) -> None:
    assert measure(case, "cuda")[1] == {}


def test_check_device_passes() -> None:
    check_device("cuda")
