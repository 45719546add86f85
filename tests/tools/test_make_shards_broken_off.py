"""A set whose making was broken off, anywhere and in any way, ends with the bytes of an undisturbed one."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_making import DEPO, SIZES, TOOLS, die_at, files, in_child, make, make_shards, plan

from sleeptrain.data.index import FILE


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is then the installed one, whatever is committed meanwhile."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")


@pytest.mark.more
def test_a_set_broken_off_at_any_file_operation_is_finished(tmp_path: Path) -> None:
    """The second run is broken off, too, at the same place; the third ends with the bytes of an undisturbed
    one."""
    whole = plan(tmp_path / "whole")
    make_shards.make(whole, 1)
    expected = files(tmp_path / "whole")
    operation = 1
    while die_at(here := replace(whole, url=str(tmp_path / str(operation))), operation):
        out = Path(here.url)
        assert (out / FILE).exists() <= all((out / name).exists() for name in expected)
        die_at(here, operation)
        make_shards.make(here, 1)
        assert files(out) == expected
        operation += 1
    assert operation > 30  # the plan, four shards and their rows, the index: three operations each


def test_a_full_disk_gets_a_sentence_and_the_rest_is_made_later(tmp_path: Path, capfd) -> None:
    assert make(tmp_path / "whole", *SIZES, *DEPO) == 0

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        return make(tmp_path / "set", *SIZES, *DEPO)

    assert in_child(run) == 1
    assert f"{tmp_path}/set cannot be written (File too large)" in capfd.readouterr().err
    assert not list((tmp_path / "set").glob("*.tar"))
    assert make(tmp_path / "set", *SIZES, *DEPO) == 0
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def begin(out: Path, num_shards: int, num_procs: int) -> subprocess.Popen[str]:
    sizes = ("--num-examples", str(num_shards * 100), "--shard-samples", "100")
    arguments = [str(TOOLS / "make_shards.py"), str(out), *sizes, "--num-procs", str(num_procs), *DEPO]
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.more
def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    for num_procs in (1, 2, 5):
        output, error = begin(tmp_path / str(num_procs), 7, num_procs).communicate(timeout=120)
        assert "0 kept and 7 made" in output, error
        assert "samples/s" in output
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "5")


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def workers(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def has_ended(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


@contextlib.contextmanager
def half_way(
    out: Path, num_done: int, num_shards: int = 60
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that has made so many of all shards, and its workers."""
    process = begin(out, num_shards, 2)
    try:
        wait_for(lambda: len(list(out.glob("*.tar"))) >= num_done or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process, workers(process.pid)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.more
@pytest.mark.parametrize("seed", range(3))
def test_a_set_killed_half_way_is_finished(tmp_path: Path, tmp_path_factory, seed: int) -> None:
    """SIGKILL to the parent: its workers end, too, and the same command ends with the bytes of an undisturbed
    one."""
    num_done = int(np.random.default_rng(seed).integers(1, 50))
    with half_way(tmp_path / "set", num_done) as (process, pids):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(pids) == 2
        wait_for(lambda: all(map(has_ended, pids)))
    assert not (tmp_path / "set" / FILE).exists()
    output, error = begin(tmp_path / "set", 60, 2).communicate(timeout=120)
    assert int(output.split(" kept")[0].split()[-1]) >= num_done - 2, error
    whole = tmp_path_factory.getbasetemp() / "whole"  # made once
    if not whole.exists():
        begin(whole, 60, 1).communicate(timeout=120)
    assert files(tmp_path / "set") == files(whole)
    assert len(files(whole)) == 61


@pytest.mark.more
def test_a_worker_that_is_killed_ends_it_with_a_sentence(tmp_path: Path) -> None:
    with half_way(tmp_path / "set", 3) as (process, pids):
        os.kill(pids[0], signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: a process was killed, perhaps for want of memory; the same command goes on" in error
    assert "Traceback" not in error


@pytest.mark.more
def test_control_c_ends_it_with_a_sentence(tmp_path: Path) -> None:
    with half_way(tmp_path / "set", 3, num_shards=2000) as (process, pids):
        for pid in (process.pid, *pids):  # as a terminal does
            os.kill(pid, signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip().endswith("stopped; the same command goes on")
    assert "Traceback" not in error
