"""When an update is refused, and when too many were."""

import json
import math

import pytest

from sleeptrain.config import OptimConfig
from sleeptrain.engine.guard import HISTORY_UPDATES, SkipGuard, TooManySkipsError
from sleeptrain.parallel.backend import UpdateResult


def applied(norm: float) -> UpdateResult:
    return UpdateResult(1.0, norm, True)


def refused(norm: float = math.nan) -> UpdateResult:
    return UpdateResult(2.5, norm, False)


def guard_with(norms: list[float], **settings: float) -> SkipGuard:
    guard = SkipGuard(OptimConfig(**settings))  # type: ignore[arg-type]
    for step, norm in enumerate(norms, start=1):
        guard.record(step, applied(norm))
    assert guard.warning is None
    return guard


@pytest.mark.parametrize(
    ("norms", "settings", "limit"),
    [
        ([], {}, math.inf),  # nothing to compare with
        ([2.0], {}, 100.0),
        ([2.0, 900.0, 4.0], {}, 200.0),  # one that was applied does not lift the limit
        ([0.01, 0.02], {}, 50.0),  # what clipping tames is no spike
        ([0.01, 0.02], {"clip_norm": 0}, 0.75),
        ([0.0], {"clip_norm": 0}, math.inf),
        ([2.0], {"spike_factor": 3}, 6.0),
        ([2.0], {"spike_factor": 0}, math.inf),
        ([1e6] * 51 + [2.0] * HISTORY_UPDATES, {}, 100.0),  # the first are forgotten
    ],
)
def test_the_limit_is_a_multiple_of_the_usual_norm(
    norms: list[float], settings: dict[str, float], limit: float
) -> None:
    assert guard_with(norms, **settings).max_norm == pytest.approx(limit)


def test_a_refused_update_is_told_and_leaves_the_limit() -> None:
    guard = guard_with([2.0])
    guard.record(17, refused(1234.5))
    assert guard.warning is not None
    for part in ("step 17", "loss is 2.5", "1234", "100 is the limit", "1 in a row", "10 end the run"):
        assert part in guard.warning
    assert guard.max_norm == 100.0


def test_refusals_in_a_row_end_the_run_and_scattered_ones_do_not() -> None:
    guard = SkipGuard(OptimConfig(max_skipped_steps=3))
    for update in (refused(), refused(), applied(1.0)) * 4:
        guard.record(1, update)
        guard.check()
    assert (guard.total, guard.in_a_row) == (8, 0)
    for _ in range(2):
        guard.record(1, refused())
        guard.check()
    guard.record(1, refused())
    with pytest.raises(
        TooManySkipsError, match=r"3 updates in a row .* not finite, or .*optim\.spike_factor"
    ):
        guard.check()
    assert (guard.total, guard.in_a_row) == (11, 3)


def test_a_restored_guard_decides_alike() -> None:
    guard = guard_with([0.1 * 3, 7.0, 1 / 3, 5.0])
    guard.record(5, refused())
    restored = SkipGuard(OptimConfig())
    restored.load(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert restored.max_norm == guard.max_norm != math.inf
    assert restored.state() == guard.state()
    for _ in range(HISTORY_UPDATES):
        restored.record(6, applied(9.0))
    assert len(restored.norms) == HISTORY_UPDATES
    assert restored.max_norm == 450.0
