"""Sums of bits: any flipped bit changes them."""

import pytest
import torch

from sleeptrain.parallel.integrity import _bits, _listed, _sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 3, 5)])
def test_every_flipped_bit_changes_the_sum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).to(dtype)
    values.view(-1)[0] = torch.nan
    integers = _bits(values)
    before = _sum(integers)
    num_bits = 8 * values.element_size()
    for i in range(values.numel()):
        for bit in range(num_bits):
            mask = -(1 << bit) if bit == num_bits - 1 else 1 << bit
            integers[i] ^= mask
            assert _sum(integers) != before
            integers[i] ^= mask
    assert _sum(integers) == before


def test_no_elements_have_a_sum() -> None:
    assert _sum(_bits(torch.empty(0))) == 0


def test_many_names_are_counted() -> None:
    assert _listed(["a", "b", "c"]) == "a, b, c"
    assert _listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more tensors"
