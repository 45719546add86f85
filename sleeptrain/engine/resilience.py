"""What lets a run stop at any moment and go on: one owner per folder, polite stops."""

import fcntl
import json
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.schema import ConfigError

EXIT_CONFIG = 2  # a setting or an input is wrong: trying again cannot help
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, saved; the SLURM scripts requeue on it
METRICS_FILE = "metrics.jsonl"  # in a run folder


class RunLockedError(ConfigError):
    """Another process is working in the run folder."""


class RunLock:
    """Context manager: the only process that works in ``folder``; raises RunLockedError on entry.

    The lock is the kernel's (``flock`` on ``run.lock``), so it ends with the process however that ends; the
    content of the file only tells others whom to ask. A forked child gives its share back at once, and one
    that runs another program never had it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Raises the same where another process holds the lock, and takes nothing: all processes of a run may
        ask, before data is read."""
        with suppress(FileNotFoundError), (self.folder / "run.lock").open() as self._file:
            self._take(fcntl.LOCK_SH)

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "run.lock").open("a+")
        os.register_at_fork(after_in_child=self._file.close)  # an orphan shall not keep the run from going on
        try:
            self._take(fcntl.LOCK_EX)
        except ConfigError:
            self._file.close()
            raise
        self._file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, self._file)
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)  # closing is not enough: a forked child may share the file
        self._file.close()

    def _take(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(self._refusal()) from None
        except OSError as error:
            raise ConfigError(
                f"run folder {self.folder} lies where files cannot be locked ({error.strerror}); choose "
                "another run.dir, or mount that file system with locks"
            ) from error

    def _refusal(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            owner = f"process {holder['pid']} on {holder['host']}"
        except (ValueError, TypeError, KeyError):  # it has the lock and is about to write its name
            owner = "another process"
        return (
            f"run folder {self.folder} is in use by {owner}; wait for it, stop it, or choose another run.id"
        )


class StopSignal:
    """Context manager: SIGTERM, SIGUSR1, SIGUSR2 and SIGINT only set ``requested``; the loop then saves and
    leaves.

    ``requested`` is the name of the first signal that came, else None. A second SIGINT raises
    KeyboardInterrupt. For the main thread; the handlers before it come back at the end, unless the run was
    stopped (``has_stopped``): signals that come later than those of other processes then find it leaving, and
    are ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None
        self.has_stopped = False
        self._interrupted = False

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            before = signal.SIG_DFL if handler is None else handler
            signal.signal(number, signal.SIG_IGN if self.has_stopped else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.requested = self.requested or signal.Signals(number).name


def cut_metrics(path: Path, step: int) -> None:
    """Removes from a ``metrics.jsonl`` the rows after ``step`` and a torn last line; it may be missing.

    Rows without a step stay. The file is replaced at once, and only if something changes. Raises ConfigError
    if a line before the last is no row.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None and number < len(lines):
            raise ConfigError(
                f"{path} line {number} is not a row of metrics; repair the file or move it away"
            )
        if row is not None and row.get("step", step) <= step:
            kept.append(line + b"\n")
    result = b"".join(kept)
    if result != content:
        replace_file(path, result)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
