"""Who is named among the ranks, and one process alone; whole runs that hang are in ``tests/faults``."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from sleeptrain.config import RunConfig
from sleeptrain.engine.watchdog import LAST_SECONDS, Watchdog
from sleeptrain.parallel.failure import own_store
from sleeptrain.parallel.roll_call import Pulse, Report, culprits, sentence_of
from sleeptrain.schema import ConfigError


def report(is_waiting: bool = True, **sequences: int) -> Report:
    return Report("12:00:00", 10.4, "after step 3", "batch.py:7 read", is_waiting, sequences)


@pytest.mark.parametrize(
    ("reports", "named"),
    [
        ({0: report(world=5), 1: report(False, world=4)}, [1]),
        ({0: report(False, world=4), 1: report(world=5), 2: report(False, world=4)}, [0, 2]),
        # on NCCL nobody seems to be in a collective
        ({0: report(False, world=5), 1: report(False, world=4), 2: report(False, world=5)}, [1]),
        # rank 1 waits for the messages of rank 0, and so both have begun fewer than the other replica
        (
            {
                0: report(False, replicas_0=4),
                1: report(replicas_1=4),
                2: report(replicas_0=5),
                3: report(replicas_1=5),
            },
            [0],
        ),
        # stages of a pipeline differ in number by design
        ({0: report(False, pipeline=9), 1: report(pipeline=7)}, [0]),
        # all are in collectives, rank 2 in another one
        ({0: report(world=5), 1: report(world=5), 2: report(world=4)}, [2]),
        # a group that only some are in
        ({0: report(tensor_0=9), 1: report(tensor_1=2), 2: report(False)}, [2]),
        ({0: report(world=5), 1: report(world=5)}, [0, 1]),  # nobody stands out
    ],
)
def test_the_rank_that_the_others_wait_for(reports: dict[int, Report], named: list[int]) -> None:
    assert culprits(reports) == named


def test_one_sentence_for_all_that_hang() -> None:
    one, other = str(report(False)), str(report())
    assert one == "no progress since 12:00:00 (10 s), after step 3, in batch.py:7 read"
    assert sentence_of({1: one}) == f"rank 1 hangs: {one}"
    assert sentence_of({1: one, 3: other}) == (
        f"ranks 1, 3 hang: rank 1: {one}; rank 3: {one}, waiting for others"
    )


def test_a_report_tells_the_line_of_the_program_and_not_of_a_library() -> None:
    pulses, over = [], threading.Event()

    def reads_data() -> None:
        pulses.append(Pulse())
        over.wait()

    thread = threading.Thread(target=reads_data)
    thread.start()
    while not pulses or "reads_data" not in (told := pulses[0].report()).where:
        time.sleep(0.01)
    over.set()
    thread.join()
    assert told.where.startswith("tests/engine/test_watchdog.py:")
    assert (told.doing, told.is_waiting) == ("at the start", False)


def exit_code(act: Callable[[], None], errors: Path) -> int:
    """Of a forked process."""
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = errors.open("w")
            act()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    """R6, in small: the thread that made the watchdog sleeps."""

    def hang() -> None:
        with Watchdog(1, tmp_path, 0) as watchdog:
            watchdog.note("reading")
            time.sleep(60)

    assert exit_code(hang, tmp_path / "errors") == 1
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("error: rank 0 hangs: no progress since ")
    assert ", reading, in tests/engine/test_watchdog.py:" in line
    assert line.endswith("raise run.hang_timeout_seconds=1 if this was slow and not stuck")
    assert " in hang\n" in (tmp_path / "stacks_rank_0.txt").read_text()


@pytest.mark.more
def test_nothing_is_left_of_a_watchdog_that_was_left(tmp_path: Path) -> None:
    def leave() -> None:
        with Watchdog(1, tmp_path, 0):
            pass
        assert threading.active_count() == 1
        time.sleep(1 + LAST_SECONDS + 1)  # its timer would have ended the process

    assert exit_code(leave, tmp_path / "errors") == 7
    assert not (tmp_path / "errors").read_text()
    assert not (tmp_path / "stacks_rank_0.txt").exists()


def test_who_is_refused_leaves_the_file_of_who_is_at_work(tmp_path: Path) -> None:
    with Watchdog(60, tmp_path, 0):
        with pytest.raises(ConfigError), Watchdog(60, tmp_path, 0):
            raise ConfigError("the run folder is in use")
        assert (tmp_path / "stacks_rank_0.txt").exists()
    assert not (tmp_path / "stacks_rank_0.txt").exists()


def test_who_is_refused_leaves_no_file_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), Watchdog(60, tmp_path, 0):
        raise ConfigError("other shards under the same name")
    assert not list(tmp_path.iterdir())


def test_leaving_a_watchdog_raises_no_alarm_for_the_ranks_still_at_work(tmp_path: Path) -> None:
    def leave() -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        for _ in range(20):
            with Watchdog(60, tmp_path, 0) as watchdog:
                watchdog.meet(2)
        sys.stderr.write(f"alarm: {own_store().check(['alarm'])}")
        sys.stderr.flush()

    assert exit_code(leave, tmp_path / "errors") == 7
    assert (tmp_path / "errors").read_text() == "alarm: False"


def test_switched_off_it_starts_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(0, tmp_path, 0) as watchdog:
        watchdog.meet(2)
        watchdog.note("reading")
        assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_a_timeout_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="hang_timeout_seconds=-1 must be at least 0"):
        RunConfig(hang_timeout_seconds=-1)
