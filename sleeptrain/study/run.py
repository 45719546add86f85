"""Makes the runs of a study that are not done: on processes of this machine, in this one, or on Ray.

Any number of these may work on one folder, as the tasks of a Slurm array do: a run that another has begun is
left to it.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from sleeptrain.config import Config
from sleeptrain.engine.resilience import EXIT_REQUEUE
from sleeptrain.study import trial
from sleeptrain.study.forks import forks
from sleeptrain.study.plan import eval_passes
from sleeptrain.study.spec import Asked, Study
from sleeptrain.study.trial import Request

PROGRAM = ("-m", "sleeptrain.study.trial")
POLL_SECONDS, LOOK_SECONDS = 0.2, 1.0
LINE_SECONDS = 30.0  # between two states of the bar where it goes to a file
STEP_ROW_BYTES = 4096  # more than a row of metrics has


class Outcome(NamedTuple):
    """``failed``: why, by run; ``elsewhere``: runs that other processes make; ``is_stopped``: by a signal."""

    failed: dict[str, str]
    elsewhere: list[str]
    is_stopped: bool


def trials_folder(asked: Asked) -> Path:
    return asked.folder / "trials"


def request_of(study: Study, config: Config) -> Request:
    """What the study asks of a run."""
    passes = eval_passes(study, config)
    sizes = (study.difficulties, study.eval_task, study.num_examples)
    return Request(passes, *sizes, study.probes, study.tolerances, study.halt_thresholds)


def is_done(asked: Asked, name: str, config: Config) -> bool:
    return trial.result_of(trials_folder(asked) / name, request_of(asked.study, config)) is not None


def run(asked: Asked, trials: Mapping[str, Config]) -> Outcome:
    """Returns when nothing is left to do here."""
    todo = {name: config for name, config in trials.items() if not is_done(asked, name, config)}
    for name, config in todo.items():
        trial.prepare(trials_folder(asked) / name, config, request_of(asked.study, config))
    with Progress(asked, trials, todo) as progress, _signals() as stops:
        if asked.execution.where == "process":
            codes = _in_this_process(asked, todo, progress, stops)
        elif asked.execution.where == "ray":
            codes = _on_ray(asked, todo, progress, stops)
        else:
            codes = _on_this_machine(asked, todo, progress, stops)
    return _outcome(asked, todo, codes)


def slots_of(asked: Asked, trials: Mapping[str, Config]) -> int:
    """Runs at a time on this machine: by its GPUs, or else by its cores and the threads of a run."""
    if asked.execution.slots:
        return asked.execution.slots
    workers = max((config.cluster.workers(config.parallel) for config in trials.values()), default=1)
    on_cpu = all(config.run.device == "cpu" for config in trials.values())
    if torch.cuda.is_available() and not on_cpu:
        return max(1, torch.cuda.device_count() // workers)
    threads = max((config.run.num_threads or 1 for config in trials.values()), default=1)
    return max(1, len(os.sched_getaffinity(0)) // (threads * workers))


def _in_this_process(
    asked: Asked, todo: dict[str, Config], progress: "Progress", stops: list[int]
) -> dict[str, int]:
    codes: dict[str, int] = {}
    for name, config in todo.items():
        if _is_free(asked, name, config):
            codes[name] = trial.run(trials_folder(asked) / name)
            progress.update()
        if stops or codes.get(name) == EXIT_REQUEUE:
            break
    return codes


def _on_this_machine(
    asked: Asked, todo: dict[str, Config], progress: "Progress", stops: list[int]
) -> dict[str, int]:
    """Every run a process. A stop signal is passed on; they save and leave."""
    waiting, running, codes = list(todo), dict[str, Any](), dict[str, int]()
    num_slots = slots_of(asked, todo)
    while running or (waiting and not stops):
        while waiting and len(running) < num_slots and not stops:
            name = waiting.pop(0)
            if _is_free(asked, name, todo[name]):
                running[name] = _start(trials_folder(asked) / name)
        for name, process in list(running.items()):
            if stops:
                process.terminate()
            if process.exitcode is not None:
                # Where it was not training yet or no longer, it has nothing to save.
                was_stopped = stops and process.exitcode == -signal.SIGTERM
                codes[name] = EXIT_REQUEUE if was_stopped else process.exitcode
                del running[name]
        progress.update()
        time.sleep(1.0 if stops else POLL_SECONDS)
    return codes


def _start(folder: Path) -> Any:
    """A process that has all imports behind it."""
    process = forks().Process(target=_in_a_process, args=(folder,))
    process.start()
    return process


def _in_a_process(folder: Path) -> None:
    """Its output goes to a file; a Ctrl-C comes to it through us, and so does our end."""
    os.setpgid(0, 0)
    threading.Thread(target=_leave_after_the_parent, daemon=True).start()
    with (folder / "output.log").open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    sys.exit(trial.run(folder))


def _leave_after_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # it saves first


def _on_ray(asked: Asked, todo: dict[str, Config], progress: "Progress", stops: list[int]) -> dict[str, int]:
    from sleeptrain.cluster.ray_tasks import Task, run_tasks

    folder, tasks = trials_folder(asked), {}
    for name, config in todo.items():
        if _is_free(asked, name, config):
            num_workers = config.cluster.workers(config.parallel)
            tasks[name] = Task((*PROGRAM, str(folder / name)), str(folder / name), num_workers)
    return run_tasks(next(iter(todo.values())), tasks, progress.update, stops) if tasks else {}


def _is_free(asked: Asked, name: str, config: Config) -> bool:
    """Whether nobody else makes the run, or has made it since we looked."""
    return not trial.is_taken(trials_folder(asked) / name) and not is_done(asked, name, config)


def _outcome(asked: Asked, todo: dict[str, Config], codes: dict[str, int]) -> Outcome:
    left = [name for name, config in todo.items() if not is_done(asked, name, config)]
    is_stopped = EXIT_REQUEUE in codes.values() or any(name not in codes for name in left)
    elsewhere = [name for name in left if trial.is_taken(trials_folder(asked) / name)]
    failed = {
        name: failure_of(trials_folder(asked) / name)
        for name in left
        if name not in elsewhere and codes.get(name, EXIT_REQUEUE) not in (EXIT_REQUEUE, trial.EXIT_TAKEN)
    }
    return Outcome(failed, elsewhere, is_stopped and len(elsewhere) < len(left) and not failed)


def failure_of(folder: Path) -> str:
    """The last error that a run told, in one line; empty if it told none."""
    for path in (folder / trial.ERROR, *sorted((folder / "logs").glob("rank_*.log")), folder / "output.log"):
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        told = lines if path.name == trial.ERROR else [line for line in lines if line.startswith("error: ")]
        if told:
            return told[-1].removeprefix("error: ")
    return ""


def step_of(folder: Path) -> int:
    """The last step whose row is written."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - STEP_ROW_BYTES))
        rows = file.read().split(b'{"step": ')
    digits = rows[-1].partition(b",")[0] if len(rows) > 1 else b"0"
    return int(digits) if digits.isdigit() else 0


class Progress:
    """A bar over the optimizer steps of all runs, with the time left. It looks at files: once a second."""

    def __init__(self, asked: Asked, trials: Mapping[str, Config], todo: Mapping[str, Config]) -> None:
        self.asked, self.left, self.num_trials = asked, dict(todo), len(trials)
        self.total = sum(config.optim.num_steps for config in trials.values())
        self._looked_at = -math.inf

    def __enter__(self) -> "Progress":
        often = LOOK_SECONDS if sys.stderr.isatty() else LINE_SECONDS
        self._bar = tqdm(
            total=self.total, initial=self._made(), unit="step", smoothing=0.05, mininterval=often
        )
        self.update()
        return self

    def __exit__(self, *_: object) -> None:
        self._looked_at = -math.inf
        self.update()
        self._bar.close()

    def update(self) -> None:
        if time.monotonic() < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        self.left = {name: c for name, c in self.left.items() if not is_done(self.asked, name, c)}
        self._bar.set_description(f"{self.num_trials - len(self.left)}/{self.num_trials} runs", refresh=False)
        self._bar.update(self._made() - self._bar.n)

    def _made(self) -> int:
        to_come = (
            config.optim.num_steps - step_of(trials_folder(self.asked) / name)
            for name, config in self.left.items()
        )
        return self.total - sum(to_come)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The stop signals that came; the handlers before come back at the end."""
    came: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        came.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
