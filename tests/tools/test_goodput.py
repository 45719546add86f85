"""The arithmetic of tools/bench/goodput.py, on runs that are made up."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))
import goodput

STEP, STALL, DETECT, RESTART, LOAD, FIRST = 0.5, 0.1, 1.0, 2.0, 3.0, 0.75
EVERY, NUM_STEPS = 4, 400


def made_up(kills_after: dict[int, int]) -> tuple[list[float], list[dict[str, Any]], float]:
    """Kills, marks and wall time of a run that is killed amid these steps and falls back to its newest
    save."""
    now, step, kills, left = 100.0, 0, [], dict(kills_after)
    marks: list[dict[str, Any]] = []

    def tell(what: str, **more: float) -> None:
        marks.append({"what": what, "rank": 0, "time": now} | more)

    tell("load", step=0)
    begun, stall, is_first = now, 0.0, False
    while step < NUM_STEPS:
        if left.get(step, 0):
            left[step] -= 1
            now += STEP / 2
            kills.append(now)
            for what, seconds in (("start", DETECT), ("imports", RESTART), ("load", LOAD)):
                now += seconds
                step = step // EVERY * EVERY
                tell(what, step=step)
            stall, is_first = 0.0, True
        now += stall + (FIRST if is_first else STEP)
        step += 1
        tell("step", step=step, stall=stall)
        stall, is_first = (STALL if step % EVERY == 0 else 0.0), False
    tell("done")
    return kills, marks, now - begun


def test_the_parts_of_a_run_are_found_again() -> None:
    kills, marks, wall = made_up({14: 1, 31: 1, 50: 1})
    soak = goodput.soak_of(kills, marks)
    assert soak.wall == pytest.approx(wall)
    assert soak.step == pytest.approx(STEP)
    assert soak.stall == pytest.approx(STALL)
    assert [r for recovery in soak.recoveries for r in recovery] == pytest.approx(
        [DETECT, RESTART, LOAD, FIRST] * 3
    )
    assert soak.away == pytest.approx(DETECT + RESTART + LOAD + FIRST - STEP)


def test_the_formula_is_the_share_of_steps_that_last() -> None:
    """Where a kill comes in the middle between two saves, on average."""
    kills, marks, wall = made_up({58: 1, 141: 1, 233: 1, 346: 1})
    soak = goodput.soak_of(kills, marks)
    effective = NUM_STEPS * soak.step / soak.wall
    assert effective == pytest.approx(goodput.formula(soak, EVERY * STEP, wall / len(kills)), abs=0.02)


def test_a_recovery_that_is_killed_itself_is_left_out() -> None:
    kills, marks, _ = made_up({14: 1, 31: 1})
    soak = goodput.soak_of([kills[0], kills[0] + DETECT + RESTART / 2, kills[1]], marks)
    assert len(soak.kills) == 3
    assert len(soak.recoveries) == 1


def test_kills_come_at_random_with_their_mean_interval() -> None:
    times = goodput.kill_times(10.0, 4000, seed=1)
    assert times == sorted(times) == goodput.kill_times(10.0, 4000, seed=1)
    assert times != goodput.kill_times(10.0, 4000, seed=2)
    assert times[-1] / 4000 == pytest.approx(10.0, rel=0.05)
