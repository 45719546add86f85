"""R1: kill -9 at random instants, inside saves and between two windows: nothing is lost.

The resumed run ends bit-equal to the uninterrupted one in every tensor and every figure, and computed the
same samples in the same steps.
"""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from e2e_runs import command, compare_runs, environment
from fault_runs import (
    EVERY_STEPS,
    NUM_STEPS,
    SETTINGS,
    Process,
    Sabotage,
    at_step,
    between_windows,
    committed_steps,
    cpu_seconds,
    in_save,
    samples,
    train,
)

from sleeptrain.engine import trainer
from sleeptrain.engine.interval import Interval
from sleeptrain.optim.optimizer import MuonAdamW

NUM_WINDOWS = 3
FIRST_STEP_SECONDS = 10


def killed(folder: Path, sabotage: Sabotage, pause_seconds: float = 0.0) -> None:
    """A run that another process kills at a moment."""
    process = Process(folder, (), sabotage)
    process.await_moment()
    time.sleep(pause_seconds)
    assert process.end(signal.SIGKILL) == -signal.SIGKILL  # on its way, not at its end


def check_nothing_lost(folder: Path, reference: Path, saved_step: int) -> None:
    """After a kill, when ``saved_step`` was on the disk, and a second start that came to its end."""
    assert compare_runs(folder, reference) == ""
    computed, expected = samples(folder), dict(samples(reference))
    steps = [step for step, _ in computed]
    restart = next((i for i, (a, b) in enumerate(pairwise(steps), 1) if b <= a), len(steps))
    assert steps[:restart] == list(range(restart))
    assert steps[restart:] == list(range(saved_step, NUM_STEPS))
    assert all(keys == expected[step] for step, keys in computed)


@pytest.mark.more
@pytest.mark.parametrize("seed", range(10))
def test_at_a_random_instant(seed: int, reference: Path, tmp_path: Path) -> None:
    """R1: at most one interval of steps is made again, and the steps made while a save was under way."""
    chance, folder = random.Random(seed), tmp_path / "run"
    killed(folder, at_step(chance.randrange(NUM_STEPS - 2)), pause_seconds=chance.uniform(0, 0.06))
    saved_step, reached = max(committed_steps(folder), default=0), samples(folder)[-1][0]
    assert train(folder) == 0
    check_nothing_lost(folder, reference, saved_step)
    assert reached - saved_step < 2 * EVERY_STEPS


@pytest.mark.more
@pytest.mark.parametrize("seed", range(5))
def test_between_two_windows(seed: int, reference: Path, tmp_path: Path) -> None:
    """R1: in the forward pass of a step, when the fast weights hold a part of the sequences."""
    chance, folder = random.Random(seed), tmp_path / "run"
    step, window = chance.randrange(NUM_STEPS), chance.randrange(1, NUM_WINDOWS)
    killed(folder, between_windows(step, window))
    saved_step = max(committed_steps(folder), default=0)
    assert train(folder) == 0
    check_nothing_lost(folder, reference, saved_step)


@pytest.mark.more
@pytest.mark.parametrize("seed", range(5))
def test_inside_a_save(seed: int, reference: Path, tmp_path: Path) -> None:
    """R1: between two of its file operations. ``test_save.py`` takes all of them, on smaller states."""
    chance, folder = random.Random(seed), tmp_path / "run"
    step, operation = chance.randrange(NUM_STEPS - EVERY_STEPS), chance.randint(1, 16)
    killed(folder, in_save(step, operation))
    saved_step = max(committed_steps(folder), default=0)
    assert train(folder) == 0
    check_nothing_lost(folder, reference, saved_step)


@pytest.mark.more
def test_the_same_command_goes_on_within_seconds(reference: Path, tmp_path: Path) -> None:
    """R1: with a new interpreter, as a user or a scheduler starts it. Most of it are imports."""
    folder, arguments = tmp_path / "run", command(tmp_path / "run", *SETTINGS)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("step 12/") for line in process.stdout)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    assert any(line.startswith("step ") for line in again.stdout)
    assert cpu_seconds(again.pid) < FIRST_STEP_SECONDS
    again.stdout.read()
    assert again.wait() == 0
    assert compare_runs(folder, reference) == ""


def forget_the_optimizer() -> None:
    MuonAdamW.load = lambda self, state: None  # type: ignore[method-assign]


def forget_the_interval() -> None:
    Interval.load = lambda self, state: None  # type: ignore[method-assign]


def keep_the_rows() -> None:
    trainer.cut_metrics = lambda path, step: None


FORGOTTEN = {"optimizer": forget_the_optimizer, "interval": forget_the_interval, "rows": keep_the_rows}


@pytest.mark.more
@pytest.mark.parametrize("forget", FORGOTTEN.values(), ids=FORGOTTEN)
def test_it_would_notice_what_is_forgotten(
    forget: Callable[[], None], reference: Path, tmp_path: Path
) -> None:
    """Negative control of R1: a resume that forgets one thing does not end equal."""
    folder = tmp_path / "run"
    killed(folder, between_windows(13, 1))
    assert train(folder, sabotage=lambda moment: forget()) == 0
    assert compare_runs(folder, reference) != ""


@pytest.mark.more
def test_it_would_notice_another_sample(reference: Path, tmp_path: Path) -> None:
    """Negative control of R1: a resume that begins a step too late."""

    def skip_one(_: object) -> None:
        resume = trainer.Trainer._resume

        def resumed(self: trainer.Trainer) -> None:
            resume(self)
            self.step += 1

        trainer.Trainer._resume = resumed  # type: ignore[method-assign]

    folder = tmp_path / "run"
    killed(folder, between_windows(13, 1))
    assert train(folder, sabotage=skip_one) == 0
    with pytest.raises(AssertionError):
        check_nothing_lost(folder, reference, max(committed_steps(folder)))
