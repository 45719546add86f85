"""What ends a run on a cluster, and what only starts it again."""

import signal

import pytest

from sleeptrain.cluster import attempts
from sleeptrain.cluster.attempts import Attempts, Outcome
from sleeptrain.engine.resilience import EXIT_CONFIG, EXIT_REQUEUE


def attempt(control: Attempts, name: str, codes: list[int], steps: tuple[int, ...] = ()) -> bool:
    """All ranks begin, make these steps and end so; whether they were to train."""
    orders = [control.begin(name, len(codes)) for _ in codes]
    assert len(set(orders)) == 1
    if orders[0].shall_train:
        for step in steps:
            control.beat(name, {"step": step, "train/loss": 1.0})
        for rank, code in enumerate(codes):
            control.end(name, rank, code, f"rank {rank} is broken" if code else "")
    return orders[0].shall_train


def test_a_run_that_ends_well() -> None:
    control = Attempts()
    assert attempt(control, "a", [0, 0], (1, 2))
    assert control.outcome() == Outcome(0, "")
    assert control.status() == {"starts": 1, "processes": 2, "step": 2, "train/loss": 1.0}


def test_a_stop_saves_and_leaves_and_starts_no_more() -> None:
    control = Attempts()
    control.begin("a", 2)
    assert control.beat("a") == "go on"
    control.request_stop()
    assert control.beat("a") == "stop"
    for rank in range(2):
        control.end("a", rank, EXIT_REQUEUE)
    assert control.outcome() == Outcome(EXIT_REQUEUE, "")
    assert not control.begin("b", 2).shall_train


def test_a_run_that_is_broken_off_saves_and_whoever_cannot_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as by a shard that nobody can make."""
    control = Attempts()
    control.begin("a", 2)
    control.break_off("shard 3 cannot be made")
    control.break_off("shard 4 cannot be made")
    assert control.beat("a") == "stop"
    monkeypatch.setattr(attempts, "GRACE_SECONDS", 0.0)
    assert control.beat("a") == "end"
    control.end("a", 0, EXIT_REQUEUE)
    control.end("a", 1, -signal.SIGKILL)
    assert not control.begin("b", 2).shall_train
    assert control.outcome() == Outcome(1, "shard 3 cannot be made")


def test_a_killed_process_is_started_again_however_often_at_the_same_step() -> None:
    control = Attempts()
    for name in "abcd":
        assert attempt(control, name, [1, -signal.SIGKILL], (5,))
    assert attempt(control, "e", [0, 0], (6,))
    assert control.outcome() == Outcome(0, "")


def test_a_machine_that_is_gone_says_nothing() -> None:
    control = Attempts()
    for name in "abc":
        assert control.begin(name, 2).shall_train
        control.beat(name, {"step": 3})
        control.end(name, 0, 1, "connection lost")
    assert control.begin("d", 2).shall_train


def test_a_failure_that_comes_again_at_the_same_step_ends_the_run() -> None:
    control = Attempts()
    assert attempt(control, "a", [1, 1], (2, 4))
    assert attempt(control, "b", [1, 1], (3, 4))
    assert not attempt(control, "c", [1, 1])
    code, sentence = control.outcome()
    assert code == 1
    assert sentence == "it failed twice at the same place, after step 4: rank 0 is broken"


def test_a_failure_at_another_step_does_not() -> None:
    control = Attempts()
    assert attempt(control, "a", [1, 1], (4,))
    assert attempt(control, "b", [1, 1], (4, 9))
    assert attempt(control, "c", [0, 0], (12,))
    assert control.outcome() == Outcome(0, "")


def test_a_wrong_setting_ends_it_at_once() -> None:
    control = Attempts()
    assert attempt(control, "a", [EXIT_CONFIG, 1])
    assert not control.begin("b", 2).shall_train
    assert control.outcome() == Outcome(EXIT_CONFIG, "rank 0 is broken")


def test_pauses_grow_while_there_is_no_progress() -> None:
    control, pauses = Attempts(), []
    for number in range(9):
        pauses.append(control.begin(str(number), 2).pause_seconds)
        control.end(str(number), 1, -9)
    assert pauses == [0, 1, 3, 7, 15, 31, 60, 60, 60]
    assert attempt(control, "progress", [-9, -9], (1, 2))
    assert control.begin("after", 2).pause_seconds == 0


def test_processes_that_outlive_a_failure_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    control = Attempts()
    control.begin("a", 2)
    control.end("a", 1, 1, "broken")
    assert control.beat("a") == "go on"  # they have some seconds to end by themselves
    monkeypatch.setattr(attempts, "GRACE_SECONDS", -1.0)
    assert control.beat("a") == "end"


def test_a_process_of_an_attempt_that_is_over_is_ended_and_not_listened_to() -> None:
    control = Attempts()
    control.begin("a", 1)
    control.begin("b", 1)
    assert control.beat("a", {"step": 7}) == "end"
    control.end("a", 0, 1, "late")
    assert "step" not in control.status()
    assert control.all_ended("a")
    assert not control.all_ended("b")


def test_no_worker_ever_came() -> None:
    assert Attempts().outcome().code == 1
