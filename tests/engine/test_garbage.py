"""Garbage is looked for between steps alone."""

import contextlib
import gc

from sleeptrain.engine.garbage import EVERY_STEPS, collected_between_steps


def test_garbage_is_collected_at_its_steps_alone() -> None:
    class Cycle:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Cycle.alive += 1

        def __del__(self) -> None:
            Cycle.alive -= 1

    with collected_between_steps() as collect:
        for step in range(1, EVERY_STEPS):
            Cycle()
            collect(step)
        assert Cycle.alive == EVERY_STEPS - 1
        collect(EVERY_STEPS)
        assert Cycle.alive == 0


def test_python_collects_by_itself_again_afterwards() -> None:
    with contextlib.suppress(RuntimeError), collected_between_steps():
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
