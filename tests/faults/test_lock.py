"""R19: one trainer in a run folder. A second one is refused at once, and what is left of a killed one, be it
a lock file or a process of its own, refuses nobody."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_runs import compare_runs
from fault_runs import NUM_STEPS, Moment, Process, before_step, between_windows, samples

from sleeptrain.engine import trainer
from sleeptrain.engine.resilience import RunLock, RunLockedError

pytestmark = pytest.mark.more
REFUSAL_SECONDS = 2  # of computing, after imports: the time that passes depends on what else runs


@pytest.fixture
def working(tmp_path: Path) -> Iterator[Process]:
    """A trainer amid a step, which waits there."""
    process = Process(tmp_path / "run", (), between_windows(8, 1))
    process.await_moment()
    yield process
    process.end(signal.SIGKILL)


def test_a_second_trainer_is_refused_and_the_first_is_not_disturbed(
    working: Process, reference: Path
) -> None:
    """R19: it names the process and the host of the first, and touches no file of the run."""
    before = {path: path.stat().st_mtime_ns for path in working.folder.rglob("*")}
    second = Process(working.folder, ())
    assert second.wait() == 2
    assert second.cpu_seconds < REFUSAL_SECONDS
    sentence = second.output().splitlines()[-1]
    assert f"is in use by process {working.pid} on {socket.gethostname()}; wait for it" in sentence
    assert {path: path.stat().st_mtime_ns for path in working.folder.rglob("*")} == before
    working.end(signal.SIGKILL)
    assert Process(working.folder, ()).wait() == 0
    assert compare_runs(working.folder, reference) == ""


def test_of_two_that_start_at_the_same_time_one_trains(tmp_path: Path, reference: Path) -> None:
    """R19: nothing is computed twice."""
    both = [Process(tmp_path / "run", ()) for _ in range(2)]
    assert sorted(process.wait() for process in both) == [0, 2]
    assert [step for step, _ in samples(tmp_path / "run")] == list(range(NUM_STEPS))
    assert compare_runs(tmp_path / "run", reference) == ""


def fork(folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    return pid


def fork_by_library(folder: Path) -> int:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    assert child.pid is not None
    return child.pid


def spawn(folder: Path) -> int:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    child.start()
    assert child.pid is not None
    return child.pid


def run_a_program(folder: Path) -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False).pid


CHILDREN = {"forked": fork, "forked by library": fork_by_library, "spawned": spawn, "program": run_a_program}


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_killed_trainer_leaves_no_lock_though_its_child_lives(kind: str, tmp_path: Path) -> None:
    """R19: such as a worker that reads ahead, or the process that sends metrics."""

    def with_child(moment: Moment) -> None:
        def make() -> None:
            (tmp_path / "child").write_text(str(CHILDREN[kind](tmp_path)))
            moment.tell_and_wait()

        before_step(2, make)

    first = Process(tmp_path / "run", ["optim.num_steps=4"], with_child)
    first.await_moment()
    child = int((tmp_path / "child").read_text())
    try:
        second = Process(tmp_path / "run", ["optim.num_steps=4"])
        assert second.wait() == 2  # while the first lives
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        os.kill(child, 0)  # it lives on
        third = Process(tmp_path / "run", ["optim.num_steps=4"])
        assert third.wait() == 0, third.output()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("content", [b"", b"not JSON", b'{"pid": 1, "host": "elsewhere"}'])
def test_a_lock_file_alone_refuses_nobody(content: bytes, tmp_path: Path) -> None:
    """R19: the content of a stale one does not matter."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_bytes(content)
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == os.getpid()


def without_a_lock() -> None:
    trainer.RunLock.check = lambda self: None
    trainer.RunLock.__enter__ = lambda self: self
    trainer.RunLock.__exit__ = lambda self, *_: None


def with_a_lock_that_children_keep() -> None:
    os.register_at_fork = lambda **_: None  # type: ignore[assignment]


def test_without_the_lock_both_would_train(tmp_path: Path) -> None:
    """Negative control of R19."""

    def amid_the_run(moment: Moment) -> None:
        without_a_lock()
        before_step(2, moment.tell_and_wait)

    first = Process(tmp_path / "run", ["optim.num_steps=4"], amid_the_run)
    first.await_moment()
    second = Process(tmp_path / "run", ["optim.num_steps=4"], lambda moment: without_a_lock())
    assert second.wait() == 0, second.output()
    first.end(signal.SIGKILL)
    assert sorted(step for step, _ in samples(tmp_path / "run")) == [0, 0, 1, 1, 2, 3]


def test_it_would_notice_a_lock_that_children_keep(tmp_path: Path) -> None:
    """Negative control of R19: with the share that a fork gives it."""
    told, descriptor = os.pipe()
    pid = os.fork()
    if pid == 0:
        with_a_lock_that_children_keep()
        with RunLock(tmp_path):
            os.write(descriptor, f"{fork(tmp_path)} ".encode())
            os.kill(os.getpid(), signal.SIGKILL)
    child = int(os.read(told, 20))
    os.waitpid(pid, 0)
    try:
        with pytest.raises(RunLockedError), RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
