"""R18: the network, the server, the key or wandb's own process fails: the training goes on with one warning,
at its own pace, and all rows are in metrics.jsonl. The real wandb, with a server that is wanting."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e_runs import compare_runs
from fault_runs import Moment, Process, Sabotage, before_step, nothing

from sleeptrain.config import Config, LogConfig
from sleeptrain.engine import mirror
from sleeptrain.engine.metrics import MetricsWriter, read_metrics
from sleeptrain.engine.mirror import Mirror

pytestmark = pytest.mark.more
SERVER = Path(__file__).with_name("wandb_server.py")
START_SECONDS, FINISH_SECONDS = 1, 2
ROW_SECONDS = 0.4  # ten steps of the quickstart


@pytest.fixture(autouse=True)
def _nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, no settings of whoever runs the tests, and less patience."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(mirror, "START_SECONDS", START_SECONDS)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", FINISH_SECONDS)


@contextmanager
def server(mode: str, rows: Path) -> Iterator[subprocess.Popen]:
    """Listens on a port of its own, which WANDB_BASE_URL names; or nobody does."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), mode, str(rows)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if mode == "is gone":
            process.kill()
            process.wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
            yield process
    finally:
        process.kill()
        process.wait()


def start(folder: Path, how: str = "online", sabotage: Sabotage = nothing) -> Process:
    return Process(folder, (f"log.wandb={how}",), sabotage)


def warnings_of(process: Process) -> list[str]:
    return [line for line in process.output().splitlines() if line.startswith("warning")]


def require_undisturbed(process: Process, reference: Path, *warnings: str) -> None:
    """It ended well, bit-equal to a run without wandb, with these warnings."""
    assert process.wait() == 0, process.output()
    assert compare_runs(process.folder, reference) == ""
    said = warnings_of(process)
    assert len(said) == len(warnings), said
    for line, part in zip(said, warnings):
        assert line.startswith("warning: wandb: ")
        assert part in line
        assert f"all rows are in {process.folder / 'metrics.jsonl'}" in line


def merged(rows: list[dict[str, Any]], key: str) -> dict[int, dict[str, Any]]:
    """By step: the values of all rows."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        values = {k: v for k, v in row.items() if not k.startswith("_") and k != key and v is not None}
        steps.setdefault(row[key], {}).update(values)
    return steps


def require_all_rows(taken: Path, folder: Path) -> None:
    """The server has what metrics.jsonl has."""
    rows = [json.loads(line) for line in taken.read_text().splitlines()]
    assert merged(rows, "_step") == merged(read_metrics(folder), "step")


def require_kept(process: Process, rows: Path) -> None:
    """The command that the warning names sends the whole run."""
    command = re.search("`(wandb sync .*)`", warnings_of(process)[0])
    assert command is not None
    with server("takes", rows):
        subprocess.run([sys.executable, "-m", *command[1].split()], check=True, capture_output=True)
    require_all_rows(rows, process.folder)


def test_a_server_that_works_gets_all_rows(reference: Path, tmp_path: Path) -> None:
    """The case that the faults are to be compared with."""
    with server("takes", tmp_path / "rows"):
        process = start(tmp_path / "run")
        require_undisturbed(process, reference)
    require_all_rows(tmp_path / "rows", process.folder)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("is gone", "connection refused"),
        pytest.param("hangs", "deadline exceeded", marks=pytest.mark.more),
        ("refuses", "401"),
    ],
)
def test_no_server_or_a_wrong_key(mode: str, reason: str, reference: Path, tmp_path: Path) -> None:
    """R18: from the start; `wandb sync` sends everything later."""
    with server(mode, tmp_path / "rows"):
        process = start(tmp_path / "run")
        require_undisturbed(process, reference, reason)
    require_kept(process, tmp_path / "rows")


def test_the_network_goes_in_the_middle(reference: Path, tmp_path: Path) -> None:
    """R18: wandb would try for days, and is given up at the end."""
    with server("takes", tmp_path / "rows") as listening:
        process = start(tmp_path / "run", sabotage=_with_a_pause(tmp_path))
        process.await_moment()
        _until(lambda: list((process.folder / "wandb").glob("run-*/*.wandb")))
        listening.kill()
        (tmp_path / "go_on").touch()
        require_undisturbed(process, reference, "`wandb sync")
    require_kept(process, tmp_path / "all_rows")


@pytest.mark.parametrize("victim", ["wandb-core", "sleeptrain.engine.mirror"])
def test_a_process_of_wandb_is_killed(victim: str, reference: Path, tmp_path: Path) -> None:
    """R18: its service, or the process that talks to it."""
    process = start(tmp_path / "run", "offline", _with_a_pause(tmp_path))
    process.await_moment()
    _until(lambda: list((process.folder / "wandb").glob("offline-run-*/*.wandb")))
    found = [pid for pid in _descendants(process.pid) if victim in _command(pid)]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)
    (tmp_path / "go_on").touch()
    require_undisturbed(process, reference, "exit code -9" if "mirror" in victim else "`wandb sync")
    if victim == "wandb-core":
        require_kept(process, tmp_path / "rows")


def test_training_does_not_wait(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R18: all steps are made while wandb's process has not done anything at all."""
    monkeypatch.setattr(mirror, "LAST_SECONDS", 1)
    process = start(tmp_path / "run", "online", _frozen)
    begin = time.monotonic()
    require_undisturbed(process, reference, "exit code -9")
    assert time.monotonic() - begin < 60


def _frozen(moment: Moment) -> None:
    begin = Mirror.__init__

    def freeze(self: Mirror, *arguments: Any) -> None:
        begin(self, *arguments)
        os.kill(self._process.pid, signal.SIGSTOP)

    Mirror.__init__ = freeze  # type: ignore[method-assign]


def test_it_notices_wandb_in_the_process_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: there, a network that is gone ends the run."""

    def begin(self: Mirror, path: Path, config: Config) -> None:
        import wandb

        wandb.init(dir=str(tmp_path), settings=wandb.Settings(init_timeout=START_SECONDS))

    monkeypatch.setattr(Mirror, "__init__", begin)
    with server("is gone", tmp_path / "rows"):
        process = start(tmp_path / "run")
        assert process.wait() not in (0, 75)
    assert "CommError" in process.output()


def test_a_row_costs_the_training_nothing(tmp_path: Path) -> None:
    """R18: at most a hundredth of a step, while the server hangs."""
    config, seconds = Config(log=LogConfig(wandb="online")), []
    with server("hangs", tmp_path / "rows"):
        writer = MetricsWriter(tmp_path, config)
        for step in range(200):
            begin = time.thread_time()
            writer.write(step, {"train/loss": 1.0})
            seconds.append(time.thread_time() - begin)
        assert writer._mirror is not None
        writer._mirror._process.kill()
        writer.close()
    assert sum(seconds) / len(seconds) < 0.01 * ROW_SECONDS


def test_a_missing_key_is_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts, as for every setting; without the network."""
    monkeypatch.delenv("WANDB_API_KEY")
    with server("hangs", tmp_path / "rows"):
        process = start(tmp_path / "run")
        assert process.wait() == 2
    assert "log.wandb=online, but no API key is set" in process.output()
    assert not process.folder.exists()


def _with_a_pause(folder: Path) -> Sabotage:
    """The moment is before step 12, where the run waits for a file."""

    def sabotage(moment: Moment) -> None:
        def wait() -> None:
            moment.tell()
            _until((folder / "go_on").exists)

        before_step(12, wait)

    return sabotage


def _until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it did not happen within 60 s"
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in lists for child in path.read_text().split()]
    return children + [pid for child in children for pid in _descendants(child)]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
