"""R3: a notice that the machine goes away: the current step is saved within seconds, and the exit code asks
for another start, which ends bit-equal."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import compare_runs
from fault_runs import (
    NUM_STEPS,
    Moment,
    Process,
    Sabotage,
    at_step,
    before_step,
    committed_steps,
    in_save,
    samples,
    train,
)

from sleeptrain.engine.resilience import EXIT_REQUEUE, StopSignal
from sleeptrain.engine.trainer import Trainer
from sleeptrain.model.sleep import Output
from sleeptrain.parallel.backend import LocalBackend

pytestmark = pytest.mark.more
NOTICE_SECONDS = 5
STEP_SECONDS = 1  # of a toy, on a machine that has much else to do
EVALUATED_STEP = 16


def noticed(folder: Path, name: str, sabotage: Sabotage, pause_seconds: float = 0.0) -> Process:
    """A run that gets a signal at a moment, and its end within the bound."""
    process = Process(folder, (), sabotage)
    process.await_moment()
    time.sleep(pause_seconds)
    start = time.monotonic()
    assert process.end(signal.Signals[name]) == EXIT_REQUEUE, process.output()
    assert time.monotonic() - start < NOTICE_SECONDS + STEP_SECONDS
    return process


def check_nothing_was_made_twice(folder: Path, reference: Path) -> None:
    """The run goes on from the last step that was computed, and ends like the other."""
    last = samples(folder)[-1][0] + 1
    assert max(committed_steps(folder)) == last
    assert train(folder) == 0
    assert [step for step, _ in samples(folder)] == list(range(NUM_STEPS))
    assert samples(folder) == samples(reference)
    assert compare_runs(folder, reference) == ""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_the_current_step_and_asks_for_a_requeue(
    name: str, seed: int, reference: Path, tmp_path: Path
) -> None:
    """R3: at a random step."""
    chance = random.Random(f"{name} {seed}")
    step, pause_seconds = chance.randrange(NUM_STEPS - 4), chance.uniform(0, 0.03)
    process = noticed(tmp_path / "run", name, at_step(step), pause_seconds)
    assert f"stopped by {name}; the same command goes on from step" in process.output()
    check_nothing_was_made_twice(tmp_path / "run", reference)


def test_a_signal_amid_a_save(reference: Path, tmp_path: Path) -> None:
    """R3: the save that is under way ends first, and the current step is saved, too."""

    def slow_save(moment: Moment) -> None:
        moment.tell_and_wait = lambda: (moment.tell(), time.sleep(0.5))  # type: ignore[method-assign]
        in_save(4, 6)(moment)

    noticed(tmp_path / "run", "SIGTERM", slow_save)
    check_nothing_was_made_twice(tmp_path / "run", reference)


def amid_evaluation(step: int) -> Sabotage:
    """The moment is in the evaluation after a step, of which each batch takes long."""

    def sabotage(moment: Moment) -> None:
        evaluate = LocalBackend.evaluate

        def slow(backend: LocalBackend, *arguments: Any) -> Output:
            moment.tell()
            time.sleep(NOTICE_SECONDS / 2)
            return evaluate(backend, *arguments)

        before_step(step - 1, lambda: setattr(LocalBackend, "evaluate", slow))

    return sabotage


@pytest.mark.parametrize("step", [EVALUATED_STEP, NUM_STEPS])
def test_a_signal_amid_an_evaluation_does_not_wait_for_it(step: int, reference: Path, tmp_path: Path) -> None:
    """R3: the evaluation of a large split may take longer than the notice: the resumed run makes it, and its
    row stands where it would."""

    process = noticed(tmp_path / "run", "SIGUSR2", amid_evaluation(step))
    assert process.output().count("held out") == (step == NUM_STEPS)
    check_nothing_was_made_twice(tmp_path / "run", reference)


def test_a_save_that_fails_at_a_stop_is_not_called_saved(tmp_path: Path) -> None:
    """R3, R9: no checkpoint can be made; the exit code is the same, and the sentence tells the truth."""

    def sabotage(moment: Moment) -> None:
        before_step(3, lambda: (tmp_path / "run" / "checkpoints").write_text("in the way"))
        at_step(4)(moment)

    process = noticed(tmp_path / "run", "SIGTERM", sabotage)
    assert "warning: saving step_" in process.output()
    assert "goes on from step 0" in process.output()


def test_without_the_guard_the_step_is_lost(tmp_path: Path) -> None:
    """Negative control of R3: the default of these signals ends the process where it is."""

    def sabotage(moment: Moment) -> None:
        StopSignal.SIGNALS = (signal.SIGINT,)
        at_step(8)(moment)

    process = Process(tmp_path / "run", (), sabotage)
    process.await_moment()
    assert process.end(signal.SIGUSR2) == -signal.SIGUSR2
    assert max(committed_steps(tmp_path / "run")) <= samples(tmp_path / "run")[-1][0]


def test_it_would_notice_an_evaluation_that_is_forgotten(reference: Path, tmp_path: Path) -> None:
    """Negative control of R3."""

    def forget(moment: Moment) -> None:
        resume = Trainer._resume

        def resumed(trainer: Trainer) -> bool:
            found = resume(trainer)
            trainer.owes_evaluation = False
            return found

        Trainer._resume = resumed  # type: ignore[method-assign]

    noticed(tmp_path / "run", "SIGUSR2", amid_evaluation(EVALUATED_STEP))
    assert train(tmp_path / "run", sabotage=forget) == 0
    assert compare_runs(tmp_path / "run", reference) != ""
