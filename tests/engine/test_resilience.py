import json
import os
import signal
import socket

import pytest

from sleeptrain.engine.resilience import (
    RunLock,
    RunLockedError,
    StopSignal,
    cut_metrics,
)
from sleeptrain.schema import ConfigError


def lock_in_child(folder):
    """A forked process that holds the lock until it is killed: its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(folder):
            os.write(writer, b"!")
            signal.pause()
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    return pid


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    pid = lock_in_child(tmp_path / "run")
    try:
        with pytest.raises(RunLockedError) as caught, RunLock(tmp_path / "run"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    message = str(caught.value)
    assert isinstance(caught.value, ConfigError)
    for part in (str(tmp_path / "run"), f"process {pid}", socket.gethostname(), "run.id"):
        assert part in message
    with RunLock(tmp_path / "run"):
        content = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert content == {"pid": os.getpid(), "host": socket.gethostname()}


def test_the_lock_ends_with_its_block_even_if_a_forked_child_lives_on(tmp_path):
    with RunLock(tmp_path):
        pid = os.fork()
        if pid == 0:
            signal.pause()
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_holder_that_has_not_written_its_name_yet_still_refuses(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / "run.lock").write_text("")
        with pytest.raises(RunLockedError, match="in use by another process"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_sets_the_flag_and_the_old_handler_returns(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested == name
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_after_the_stop_does_not_change_the_exit_code() -> None:
    """Those of other processes may have come earlier, and the run has stopped by them."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignal() as stop:
            stop.has_stopped = True
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number in StopSignal.SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    assert before == signal.getsignal(signal.SIGTERM)


def test_the_second_interrupt_stops_at_once():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


ROWS = [
    b'{"note": "no step"}\n',
    b'{"step": 10, "loss": NaN}\n',
    b'{"step": 20}\n',
    b'{"step": 15, "eval": 1}\n',
]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (ROWS, ROWS[:2] + ROWS[3:]),
        ([*ROWS[:2], b'{"step": 1'], ROWS[:2]),
        ([*ROWS[:2], b"\xff\x00"], ROWS[:2]),
        ([*ROWS[:2], b'{"step": 15, "eval": 1}'], [*ROWS[:2], ROWS[3]]),  # only its line end is torn off
        ([b'{"st'], []),
        (ROWS[2:3], []),
    ],
)
def test_rows_after_the_step_and_a_torn_line_are_cut(tmp_path, content, expected):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / ".metrics.jsonl.tmp").write_text("left by a crash")
    path.write_bytes(b"".join(content))
    cut_metrics(path, 15)
    assert path.read_bytes() == b"".join(expected)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_cut_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 15)
    assert not path.exists()
    path.write_bytes(b"".join(ROWS))
    before = path.stat()
    cut_metrics(path, 20)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_broken_line_inside_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 is not a row"):
        cut_metrics(path, 1)
    assert path.read_bytes().count(b"\n") == 3
