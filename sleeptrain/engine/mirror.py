"""The rows of a run at Weights & Biases, sent by a process of their own: the only door to wandb.

Whatever becomes of the network, of the server or of wandb's service, the training neither waits for it nor
fails by it. The process reads ``metrics.jsonl`` as it grows. Its standard input brings the settings, and with
its end the end of the run; what goes wrong, it says in a line on its standard output.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from sleeptrain.config import Config
from sleeptrain.schema import ConfigError, to_dict

START_SECONDS, FINISH_SECONDS = 10, 20  # that the server has
LAST_SECONDS, GRACE_SECONDS = 40, 5  # that the process has after the run; to end by itself
POLL_SECONDS = 1.0
PROGRAM = [sys.executable, "-m", "sleeptrain.engine.mirror"]


def check_wandb(config: Config) -> None:
    """Raises ConfigError before anything starts when the run is to go to wandb and there is no key. Nobody is
    asked over the network whether it is a good one."""
    if config.log.wandb != "online":
        return
    try:
        asked = subprocess.run([*PROGRAM, "check"], capture_output=True, text=True, timeout=LAST_SECONDS)
    except subprocess.TimeoutExpired:
        return
    if asked.returncode:
        reason = (asked.stdout or asked.stderr).strip().splitlines()[-1]
        raise ConfigError(
            f"log.wandb=online, but {reason}; run `wandb login`, set WANDB_API_KEY, or use log.wandb=offline"
        )


class Mirror:
    """That process, as the training sees it."""

    def __init__(self, metrics: Path, config: Config) -> None:
        folder = metrics.parent
        settings = {
            "metrics": str(metrics),
            "dir": str(folder),
            "mode": config.log.wandb,
            "pid": os.getpid(),
            "start_seconds": START_SECONDS,
            "finish_seconds": FINISH_SECONDS,
            "last_seconds": LAST_SECONDS,
            # With our id a resumed run goes on there, too.
            "run": {"id": config.run.id, "name": config.run.id, "project": config.log.wandb_project},
            "config": to_dict(config),
        }
        (folder / "logs").mkdir(exist_ok=True)
        with (folder / "logs" / "wandb.log").open("ab") as log:
            self._process = subprocess.Popen(
                PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the training
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._settings, self._said = self._process.stdin, self._process.stdout
        os.set_blocking(self._said.fileno(), False)
        self._has_failed = False
        with contextlib.suppress(OSError):
            self._settings.write(json.dumps(settings).encode() + b"\n")
            self._settings.flush()

    def problem(self) -> str | None:
        """What has gone wrong, told once; does not wait."""
        said = self._said.read()
        code = self._process.poll()
        if self._has_failed or not (said or code):
            return None
        self._has_failed = True
        return (
            said.decode().splitlines()[0]
            if said
            else f"its process ended with exit code {code}, see logs/wandb.log"
        )

    def finish(self) -> None:
        """Waits until the last rows are sent, but not for long."""
        self.leave()
        try:
            self._process.wait(LAST_SECONDS + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def leave(self) -> None:
        """Lets it send the last rows while nobody waits."""
        with contextlib.suppress(OSError):
            self._settings.close()


def mirror() -> None:
    """The process. Ends with exit code 0 when all is sent or kept, and after a bounded time in any case."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    answer = os.dup(1)
    os.dup2(2, 1)  # wandb prints what belongs into the log

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(answer, f"{text}\n".encode())

    settings, ended = json.loads(sys.stdin.buffer.readline()), threading.Event()
    threading.Thread(target=_end_with_the_run, args=(ended, settings, say), daemon=True).start()
    code = 1
    try:
        _send_or_keep(settings, ended, say)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)  # wandb's own way out may wait for ever


def _send_or_keep(settings: dict[str, Any], ended: threading.Event, say: Callable[[str], None]) -> None:
    """What cannot be sent is kept in the run folder: the whole run, since what a service had that is gone may
    be torn."""
    try:
        _send(_start(settings, settings["mode"]), settings, ended)
    except Exception as error:
        _forget_service()
        run = _start(settings, "offline")
        say(f"{_in_a_line(error)}; `wandb sync {Path(run.dir).parent}` sends the run later")
        _send(run, settings, ended)


def _end_with_the_run(ended: threading.Event, settings: dict[str, Any], say: Callable[[str], None]) -> None:
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(settings["last_seconds"])
    say(f"it did not end within {settings['last_seconds']} s")
    os._exit(1)


def _start(settings: dict[str, Any], mode: Literal["online", "offline"]) -> Any:
    import wandb

    return wandb.init(
        **settings["run"],
        dir=settings["dir"],
        mode=mode,
        resume="allow",
        config=settings["config"],
        settings=wandb.Settings(
            init_timeout=settings["start_seconds"],
            finish_timeout=settings["finish_seconds"],
            finish_timeout_raises=True,
            console="off",
            disable_git=True,  # it keeps the user's name in a remote's address, which may be a token
            x_stats_pid=settings["pid"],
        ),
    )


def _send(run: Any, settings: dict[str, Any], ended: threading.Event) -> None:
    """All rows that it does not have yet, to the end of the training."""
    for row in _rows(Path(settings["metrics"]), run.starting_step, ended):
        run.log(row, step=row.pop("step"))
    run.finish()


def _forget_service() -> None:
    """It takes the run's id for used, or is gone."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def check() -> str | None:
    """What is wrong with the key; without the network."""
    import wandb

    with contextlib.redirect_stdout(sys.stderr):
        try:
            has_key = wandb.login(prompt=False, verify=False)
        except (wandb.Error, ValueError) as error:
            return f"wandb refuses ({_in_a_line(error)})"
    return None if has_key else "no API key is set"


def _rows(path: Path, first_step: int, ended: threading.Event) -> Iterator[dict[str, Any]]:
    """Those of ``first_step`` and later as they are written, until the run has ended. Where the file was
    replaced, because its last rows were taken back, it goes on with the step it was at."""
    newest = first_step
    while True:
        with path.open("rb") as file:
            is_replaced = False
            while not is_replaced:
                is_over, start = ended.is_set(), file.tell()
                while (line := file.readline()).endswith(b"\n"):
                    row, start = json.loads(line), file.tell()
                    if row.get("step", -1) >= newest:
                        newest = row["step"]
                        yield row
                is_replaced = path.stat().st_ino != os.fstat(file.fileno()).st_ino
                if is_over and not is_replaced:
                    return
                file.seek(start)  # of a line that is not whole yet
                ended.wait(POLL_SECONDS)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        found = check()
        print(found or "")
        sys.exit(bool(found))
    mirror()
