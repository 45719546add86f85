"""Trainers to be disturbed: whole runs of the command line, each in a process of its own.

They are forked from the test's process, which has imported everything, and draw no figures, so that a run
costs a second or two. ``sabotage`` is done in the child before it starts. What a child prints is in
``RUN.out`` beside its folder, and the samples of every step that it computes are in ``RUN.seen``.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # else each child would import it
from e2e_runs import TINY

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import step_name
from sleeptrain.data.batch import Batch
from sleeptrain.engine import trainer as engine
from sleeptrain.engine.trainer import Trainer
from sleeptrain.model.sleep import Walk
from sleeptrain.parallel.backend import LocalBackend, StepResult
from sleeptrain.pretrain import main

PATIENCE_SECONDS = 120
EVERY_STEPS, NUM_STEPS = 5, 32
SETTINGS = [
    *(setting for setting in TINY if setting.split("=")[0] not in ("optim.num_steps", "eval.every_steps")),
    *(f"optim.num_steps={NUM_STEPS}", f"checkpoint.every_steps={EVERY_STEPS}", "eval.every_steps=16"),
    *("sleep.passes_schedule=sampled", "sleep.num_passes=3", "sleep.min_passes=1"),
    *("model.pattern=attn gdn", "run.num_threads=1"),
]

Sabotage = Callable[["Moment"], None]


class Moment:
    """In a child: tells the test that the moment has come, and waits to be killed or goes on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def tell(self) -> None:
        os.write(self._descriptor, b"!")

    def tell_and_wait(self) -> None:
        self.tell()
        time.sleep(PATIENCE_SECONDS)
        os._exit(99)  # nobody came


def nothing(moment: Moment) -> None:
    """No sabotage."""


class Process:
    """A forked trainer, with ``settings`` after those of ``base``."""

    def __init__(
        self,
        folder: Path,
        settings: Sequence[str],
        sabotage: Sabotage = nothing,
        base: Sequence[str] = SETTINGS,
    ) -> None:
        self.folder = folder
        self._told, descriptor = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run(folder, [*base, *settings], sabotage, Moment(descriptor))
        os.close(descriptor)
        self.exit_code: int | None = None
        self.peak_bytes, self.cpu_seconds = 0, 0.0  # known at its end

    def await_moment(self) -> None:
        """Returns as soon as the child tells it; raises AssertionError if it ends or hangs before."""
        ready, _, _ = select.select([self._told], [], [], PATIENCE_SECONDS)
        if not ready or not os.read(self._told, 1):
            self.end(signal.SIGKILL)
            raise AssertionError(f"the moment did not come: {self.output()}")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it; kills what does not end."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.exit_code is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                self.peak_bytes, self.cpu_seconds = used.ru_maxrss * 2**10, used.ru_utime + used.ru_stime
                os.close(self._told)
            elif time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            else:
                time.sleep(0.002)
        return self.exit_code

    def end(self, number: int) -> int:
        """Sends a signal and waits for the end."""
        if self.exit_code is None:
            self.send(number)
        return self.wait()

    def output(self) -> str:
        """What this one and those before it in the same folder said."""
        path = output_path(self.folder)
        return path.read_text() if path.exists() else ""


def train(folder: Path, *settings: str, sabotage: Sabotage = nothing) -> int:
    """The exit code of a run that nobody ends from outside."""
    return Process(folder, settings, sabotage).wait()


def output_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.out")


def samples(folder: Path) -> list[tuple[int, list[int]]]:
    """(step, keys of its samples) for every step that processes of this run computed, in that order."""
    path = folder.with_name(f"{folder.name}.seen")
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def committed_steps(folder: Path) -> list[int]:
    """Of the checkpoints in a run folder."""
    return sorted(int(path.name.split("_")[1]) for path in (folder / "checkpoints").glob("step_*"))


def newest(folder: Path) -> Path:
    """The last checkpoint of a finished run."""
    return folder / "checkpoints" / step_name(NUM_STEPS)


def earlier(folder: Path) -> Path:
    """The one before it."""
    [found] = set((folder / "checkpoints").iterdir()) - {newest(folder)}
    return found


def found_beside(checkpoints_dir: Path) -> tuple[int, list[str]]:
    """The step of the checkpoint that a run would go on from, and what is said of newer ones."""
    said: list[str] = []
    found = store.find_latest(checkpoints_dir, said.append)
    assert found is not None
    return found.step, said


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far: unlike the time that passed, nothing else that runs changes it."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def at_step(step: int) -> Sabotage:
    """The moment is the beginning of a step; the run goes on."""

    def sabotage(moment: Moment) -> None:
        before_step(step, moment.tell)

    return sabotage


def between_windows(step: int, window: int) -> Sabotage:
    """The moment is before a window of the forward pass of a step; the run waits there."""

    def sabotage(moment: Moment) -> None:
        opened = Walk._open

        def open_window(walk: Walk, number: int) -> None:
            if number == window and armed and torch.is_grad_enabled():
                moment.tell_and_wait()
            opened(walk, number)

        armed: list[bool] = []
        before_step(step, lambda: armed.append(True))
        Walk._open = open_window  # type: ignore[method-assign]

    return sabotage


def in_save(after_step: int, operation: int) -> Sabotage:
    """The moment is before a file operation among the checkpoints, counted from a step on; the thread that
    saves waits there and the training goes on."""

    def sabotage(moment: Moment) -> None:
        before_step(after_step, lambda: before_file_operation(operation, "checkpoints", moment.tell_and_wait))

    return sabotage


def before_step(step: int, act: Callable[[], Any]) -> None:
    """In this process ``act`` comes before step number ``step`` (from 0) is computed."""
    train_step = Trainer.train_step

    def acting(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == step:
            act()
        return train_step(trainer, *arguments)

    Trainer.train_step = acting  # type: ignore[method-assign]


OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def before_file_operation(operation: int, below: str, act: Callable[[], Any]) -> None:
    """In this process ``act`` comes before the given file operation on a path that holds ``below``."""
    count, lock = 0, threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and below in str(arguments[0]):
            with lock:
                count += 1
                is_due = count == operation
            if is_due:
                act()

    sys.addaudithook(hook)  # cannot be removed, hence only in children


def _run(folder: Path, settings: list[str], sabotage: Sabotage, moment: Moment) -> None:
    """In the child: never returns."""
    code = 98
    try:
        forkserver._forkserver.__init__()  # type: ignore[attr-defined,misc]  # that of the test is no child of this one
        output = output_path(folder).open("a", buffering=1)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = output, output
        engine.draw_learning_curve = lambda *arguments: []
        _record(folder.with_name(f"{folder.name}.seen"))
        sabotage(moment)
        code = main([f"run.dir={folder}", *settings])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _record(path: Path) -> None:
    """Each step leaves a line with its samples as soon as it computes them."""
    steps: list[int] = []
    train_step, forward_backward = Trainer.train_step, LocalBackend.forward_backward

    def counted(trainer: Trainer, *arguments: Any) -> Any:
        steps.append(trainer.step)
        return train_step(trainer, *arguments)

    def recorded(backend: LocalBackend, batch: Batch, *arguments: Any) -> StepResult:
        assert batch.example_keys is not None
        with path.open("a") as file:
            file.write(json.dumps([steps[-1], batch.example_keys.tolist()]) + "\n")
        return forward_backward(backend, batch, *arguments)

    Trainer.train_step = counted  # type: ignore[method-assign]
    LocalBackend.forward_backward = recorded  # type: ignore[method-assign]
