"""Means over seeds with their uncertainty, and tests that pair what can be paired."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Two-sided 95 % points of Student's t by degrees of freedom; beyond the table the normal distribution's.
_T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_Z95 = 1.960
_MOST_EXACT = 1000  # pairs up to which the sign test counts instead of approximating


class Estimate(NamedTuple):
    """A mean over seeds and the half width of its 95 % confidence interval (Student's t; NaN for one
    seed)."""

    mean: float
    half_width: float
    num_seeds: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.half_width) else f" ± {self.half_width:.3f}"
        return f"{self.mean:.3f}{spread}"


class Paired(NamedTuple):
    """One model against another: the ``gain`` over seeds that both have; ``better`` and ``worse``: held-out
    examples on which only the one or only the other was right, over all seeds; ``p``: how likely so uneven a
    split is by chance (sign test of McNemar, two-sided; NaN where the scores are not right or wrong)."""

    gain: Estimate
    seeds_ahead: int
    better: int
    worse: int
    p: float


def estimate(values: Sequence[float]) -> Estimate:
    count = len(values)
    if count < 2:
        return Estimate(statistics.fmean(values), math.nan, count)
    t = _T95[count - 2] if count - 2 < len(_T95) else _Z95
    return Estimate(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(count), count)


def paired(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], less_is_better: bool = False) -> Paired:
    """Scores of the same examples ``[num_examples]``, of both models for each seed."""
    gains = [float(np.mean(a - b)) for a, b in zip(ours, theirs, strict=True)]
    is_binary = all(np.isin(scores, (0, 1)).all() for scores in (*ours, *theirs))
    better = sum(int((a > b).sum()) for a, b in zip(ours, theirs))
    worse = sum(int((a < b).sum()) for a, b in zip(ours, theirs))
    p = sign_test(better, worse) if is_binary else math.nan
    ahead = sum(gain < 0 if less_is_better else gain > 0 for gain in gains)
    return Paired(estimate(gains), ahead, better, worse, p)


def sign_test(better: int, worse: int) -> float:
    """Probability of a split at least as uneven, if both were as likely."""
    total, less = better + worse, min(better, worse)
    if not total:
        return 1.0
    if total <= _MOST_EXACT:
        tail = sum(math.comb(total, k) for k in range(less + 1)) / 2**total
    else:  # with half a unit of correction for continuity
        tail = statistics.NormalDist().cdf((less + 0.5 - total / 2) / math.sqrt(total / 4))
    return min(1.0, 2 * tail)
