"""Intervals and tests against known values and against counting."""

import math
from itertools import product

import numpy as np
import pytest

from sleeptrain.study.statistics import estimate, paired, sign_test


def test_the_interval_is_that_of_student() -> None:
    found = estimate([0.1, 0.2, 0.6])
    assert found.mean == pytest.approx(0.3)
    # standard deviation 0.26458, over the root of 3, times 4.303
    assert found.half_width == pytest.approx(0.6573, abs=1e-3)
    assert str(found) == "0.300 ± 0.657"


def test_one_seed_has_no_interval() -> None:
    assert math.isnan(estimate([0.5]).half_width)
    assert str(estimate([0.5])) == "0.500"


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 1), (5, 5), (9, 0), (2, 8)])
def test_the_sign_test_counts(better: int, worse: int) -> None:
    total = better + worse
    flips = [sum(sides) for sides in product((0, 1), repeat=total)]
    uneven = abs(better - worse)
    as_uneven = sum(abs(2 * heads - total) >= uneven for heads in flips) / len(flips)
    assert sign_test(better, worse) == pytest.approx(as_uneven)


def test_many_pairs_are_nearly_counted() -> None:
    exact = 2 * sum(math.comb(1200, k) for k in range(561)) / 2**1200
    assert sign_test(560, 640) == pytest.approx(exact, rel=0.02)


def test_pairs_are_of_the_same_example_and_seed() -> None:
    ours = [np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])]
    theirs = [np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0])]
    found = paired(ours, theirs)
    assert (found.better, found.worse, found.seeds_ahead) == (3, 1, 1)
    assert found.gain.mean == pytest.approx(0.25)
    assert found.p == pytest.approx(sign_test(3, 1))


def test_of_a_loss_less_is_ahead() -> None:
    ours, theirs = [np.array([0.5, 1.0])], [np.array([0.75, 1.0])]
    assert paired(ours, theirs).seeds_ahead == 0
    assert paired(ours, theirs, less_is_better=True).seeds_ahead == 1


def test_scores_that_are_not_right_or_wrong_have_no_sign_test() -> None:
    found = paired([np.array([0.5, 1.0])], [np.array([0.25, 1.0])])
    assert math.isnan(found.p)
    assert found.gain.mean == pytest.approx(0.125)
