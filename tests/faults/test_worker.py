"""R17: a data worker that dies is an error and not a hang, one that stalls is seen in the metrics."""

import os
import signal
import time
from pathlib import Path

import pytest
from e2e_runs import compare_runs
from fault_runs import Moment, Process, at_step, train
from shard_sets import examples_set

from sleeptrain.config import Rule110Config
from sleeptrain.data.fetch import ShardReader
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.tasks import make_task

pytestmark = pytest.mark.more
BOUND_SECONDS = 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sets") / "set"
    examples_set(folder, make_task(Rule110Config(width=6, num_strings=2, steps=1)), 5, 9)
    return f"data.shards=[{folder}]"


@pytest.fixture(scope="module")
def reference(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train(folder, shards) == 0
    return folder


def workers_of(pid: int) -> list[int]:
    """Grandchildren: the trainer starts a server of forks, and that the workers."""
    return [worker for server in _children(pid) for worker in _children(server)]


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_workers_change_nothing(shards: str, reference: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", shards, "data.num_workers=2") == 0
    assert compare_runs(tmp_path / "run", reference) == ""


def test_a_killed_worker_is_an_error_and_the_run_goes_on(
    shards: str, reference: Path, tmp_path: Path
) -> None:
    process = Process(tmp_path / "run", (shards, "data.num_workers=2"), at_step(12))
    process.await_moment()
    victim = workers_of(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    assert process.wait() == 1
    assert time.monotonic() - start < BOUND_SECONDS
    assert f"a data worker died (DataLoader worker (pid(s) {victim})" in process.output()
    assert train(tmp_path / "run", shards, "data.num_workers=2") == 0
    assert compare_runs(tmp_path / "run", reference) == ""


def test_a_killed_trainer_leaves_no_worker_and_no_lock(shards: str, reference: Path, tmp_path: Path) -> None:
    process = Process(tmp_path / "run", (shards, "data.num_workers=2"), at_step(12))
    process.await_moment()
    workers = workers_of(process.pid)
    assert len(workers) == 2
    assert process.end(signal.SIGKILL) == -signal.SIGKILL
    assert train(tmp_path / "run", shards, "data.num_workers=2") == 0  # at once: the lock is free
    assert compare_runs(tmp_path / "run", reference) == ""
    deadline = time.monotonic() + BOUND_SECONDS
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stop_signal_to_all_processes_saves(shards: str, reference: Path, tmp_path: Path) -> None:
    """Schedulers signal every process of a job: the workers leave it to the trainer."""
    process = Process(tmp_path / "run", (shards, "data.num_workers=2"), at_step(12))
    process.await_moment()
    for pid in (*workers_of(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait() == 75
    assert train(tmp_path / "run", shards) == 0
    assert compare_runs(tmp_path / "run", reference) == ""


def test_a_stall_is_seen_in_the_metrics(shards: str, tmp_path: Path) -> None:
    stall_seconds = 1.5

    def slow(moment: Moment) -> None:
        read = ShardReader._bytes

        def read_slowly(reader: ShardReader, entry):
            time.sleep(stall_seconds if entry.name == "set-000002.tar" else 0)
            return read(reader, entry)

        ShardReader._bytes = read_slowly  # type: ignore[method-assign]

    assert train(tmp_path / "run", shards, "log.every_steps=1", sabotage=slow) == 0
    waits = sorted(row.get("train/data_seconds", 0.0) for row in read_metrics(tmp_path / "run"))
    assert waits[-1] > stall_seconds / 2 > 5 * waits[len(waits) // 2]
