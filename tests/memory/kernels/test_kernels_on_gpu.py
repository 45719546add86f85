"""The compiled Triton kernels on a device: every rule, head size, type and kind of gate. ``pytest -m gpu``.

The same check as ``python -m sleeptrain.memory.kernels.check``, to be run before a long run on new hardware.
"""

import pytest

from sleeptrain.memory.kernels.check import above_bar, cases, check_device, errors

pytestmark = pytest.mark.gpu
NUM_SEEDS = 20


@pytest.mark.parametrize("case", cases(NUM_SEEDS), ids=str)
def test_equals_the_recurrence(case) -> None:
    assert above_bar(case, errors(case, "cuda")) == {}


def test_check_device_passes() -> None:
    check_device("cuda")
