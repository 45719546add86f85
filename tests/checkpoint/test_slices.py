import math
import random
import sys

import pytest
import torch
from cuts import boxes, part, random_cut

from sleeptrain.checkpoint.slices import Range, common, flaw, num_elements, view, whole, whole_box

SHAPES = [(), (1,), (7,), (5, 6), (4, 3, 5), (2, 3, 2, 3), (3, 0, 2)]


def random_range(shape, chance):
    sides = tuple(tuple(sorted(chance.choices(range(size + 1), k=2))) for size in shape)
    start, stop = sorted(chance.choices(range(num_elements(sides) + 1), k=2))
    return Range(sides, start, stop)


def test_the_slice_of_a_whole_tensor():
    tensor = torch.arange(6).view(2, 3).T
    found = whole("w", tensor)
    assert found[:4] == ("w", (3, 2), ((0, 3), (0, 2)), 0)
    assert found.values.tolist() == [0, 3, 1, 4, 2, 5]
    assert whole("s", torch.tensor(2.5))[1:] == ((), (), 0, torch.tensor([2.5]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(30))
def test_what_two_ranges_share_is_found_once_and_in_its_place(shape, seed):
    chance = random.Random(seed)
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    a, b = random_range(shape, chance), random_range(shape, chance)
    source, target = part(tensor, a.box)[a.start : a.stop], part(tensor, b.box)[b.start : b.stop]
    copied = torch.full_like(target, -1)
    for box in common(a, b):
        goal = view(copied, b, box)
        assert (goal == -1).all()  # no element is copied twice
        goal.copy_(view(source.clone(), a, box))
    shared = torch.isin(target, source)
    assert torch.equal(copied, torch.where(shared, target, -1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(20))
def test_a_cut_has_no_flaw_and_any_change_of_it_has(shape, seed):
    chance = random.Random(seed)
    cut = random_cut("w", torch.zeros(shape), chance)
    ranges = [Range(s.box, s.start, s.start + len(s.values)) for s in cut]
    assert flaw(shape, ranges) is None
    held = [r for r in ranges if r.start < r.stop]
    if held:
        chosen = chance.choice(held)
        rest = [r for r in ranges if r is not chosen]
        assert flaw(shape, rest) == "elements are missing"
        assert flaw(shape, [*ranges, chosen]) == "elements are held twice"
        assert flaw(shape, [*rest, chosen._replace(stop=chosen.stop - 1)]) == "elements are missing"


def test_flaws_between_boxes():
    rows, columns = boxes((4, 6), 0, 2), boxes((4, 6), 1, 2)
    ranges = [Range(box, 0, 12) for box in (rows[0], columns[0])]
    assert flaw((4, 6), ranges) == "elements are held twice"
    assert flaw((4, 6), ranges[:1]) == "elements are missing"
    assert "outside of its shape [4, 5]" in flaw((4, 5), [Range(whole_box((4, 6)), 0, 24)])
    assert "outside of its shape" in flaw((24,), [Range(whole_box((4, 6)), 0, 24)])


def test_a_tensor_in_very_many_slices_is_checked_in_linear_time():
    def num_calls(count):
        shape, calls = (count, 4), 0

        def counted(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        by_rows = [Range(box, 0, 4) for box in boxes(shape, 0, count)]
        flat = [Range(whole_box(shape), i, i + 1) for i in range(4 * count)]
        sys.setprofile(counted)
        try:
            assert flaw(shape, by_rows) is None
            assert flaw(shape, flat) is None
        finally:
            sys.setprofile(None)
        return calls

    assert num_calls(2000) < 11 * num_calls(200)
