"""Learning rate and N as functions of the step."""

from collections import Counter

import pytest

from sleeptrain.config import OptimConfig, SleepConfig
from sleeptrain.optim.schedule import lr_factor, num_passes_at


def test_warm_up_stable_linear_decay() -> None:
    config = OptimConfig(num_steps=100, warmup_steps=10, decay_fraction=0.2)
    factors = [lr_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[9:81] == [1.0] * 72
    assert factors[80:] == pytest.approx([0.05 * k for k in range(20, 0, -1)])


@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0.0), (0, 1.0), (10, 0.0), (50, 1.0)])
def test_factors_at_the_edges(warm_up: int, decay: float) -> None:
    config = OptimConfig(num_steps=10, warmup_steps=warm_up, decay_fraction=decay)
    factors = [lr_factor(step, config) for step in range(10)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] == (1 / warm_up if warm_up else 1)
    assert factors[-1] == pytest.approx(min(0.1 if decay else 1, 10 / warm_up if warm_up else 1))


def test_fixed() -> None:
    assert {num_passes_at(step, SleepConfig(num_passes=3), 10, 0) for step in range(10)} == {3}


def test_sampled_is_uniform_and_reproducible() -> None:
    sleep = SleepConfig(num_passes=4, min_passes=2, passes_schedule="sampled")
    draws = [num_passes_at(step, sleep, 3000, 7) for step in range(3000)]
    counts = Counter(draws)
    assert set(counts) == {2, 3, 4}
    assert all(abs(count - 1000) < 130 for count in counts.values())  # five standard deviations
    assert [num_passes_at(step, sleep, 5, 7) for step in reversed(range(3000))] == draws[::-1]
    assert [num_passes_at(step, sleep, 3000, 8) for step in range(3000)] != draws


def test_growing_in_equal_stages() -> None:
    sleep = SleepConfig(num_passes=4, min_passes=2, passes_schedule="growing", growth_fraction=0.6)
    draws = [num_passes_at(step, sleep, 100, 0) for step in range(100)]
    assert draws == [2] * 20 + [3] * 20 + [4] * 60


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_growing_at_the_edges(fraction: float) -> None:
    sleep = SleepConfig(num_passes=3, passes_schedule="growing", growth_fraction=fraction)
    draws = [num_passes_at(step, sleep, 10, 0) for step in range(10)]
    assert draws == sorted(draws)
    assert draws[0] in (1, 3)
    assert draws[-1] == 3
