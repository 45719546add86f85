"""A worker of Ray Train: starts the process that trains, watches it, and passes on what there is to say.

The training is a process of its own, the same as under torchrun or srun: with its signals, its watchdog and
its way to end. It dies with the worker.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import ray
import ray.train

from sleeptrain.config import Config
from sleeptrain.engine.resilience import EXIT_CONFIG, EXIT_REQUEUE, METRICS_FILE
from sleeptrain.parallel.rows import check_rows
from sleeptrain.schema import ConfigError, RunError, from_dict

POLL_SECONDS = 0.2  # for the end of the process, which costs next to nothing
BEAT_SECONDS = 2.0  # between two messages to the driver, which take time from the training on the same cores
OTHERS_SECONDS = 15.0  # for the processes of the other ranks to end after ours
TAIL_BYTES = 16384
SHARED_FILE = ".shared"  # what the driver wrote into the run folder


class Failed(RunError):
    """The process of this rank failed; Ray starts all of them again."""


def supervise(settings: dict[str, str]) -> None:
    """The training function of Ray Train. ``settings``: what the process that trains reads (``run``), the
    name of the ``control`` actor, and the ``token`` that the driver left in the run folder. Raises Failed
    where trying again may help."""
    config = from_dict(Config, json.loads(settings["run"])["config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), usable_workers(config, context.get_world_size())
    if rank >= world_size:
        return  # fewer than a replica are left over: they wait for company
    control = ray.get_actor(settings["control"])
    attempt = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    orders: Any = ray.get(control.begin.remote(attempt, world_size))
    if not orders.shall_train:
        return
    time.sleep(orders.pause_seconds)
    code, sentence = EXIT_CONFIG, unshared(config, settings["token"])
    if not sentence:
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(context.get_local_rank()),
            "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        }
        process = TrainingProcess(settings["run"], environment)
        code, sentence = process.watch(control, attempt, config if rank == 0 else None)
    ray.get(control.end.remote(attempt, rank, code, sentence))
    if code in (0, EXIT_REQUEUE, EXIT_CONFIG):
        return
    deadline = time.monotonic() + OTHERS_SECONDS
    while not ray.get(control.all_ended.remote(attempt)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    raise Failed(f"rank {rank}: {sentence}")


def usable_workers(config: Config, num_workers: int) -> int:
    """The most of so many workers that make whole replicas among which the batch can be shared out."""
    per_replica = config.parallel.per_replica
    for replicas in range(num_workers // per_replica, 0, -1):
        try:
            check_rows(config, replicas)
        except ConfigError:
            continue
        if config.data.streams % replicas == 0:
            return replicas * per_replica
    return num_workers - num_workers % per_replica  # the run itself says what is wrong


def unshared(config: Config, token: str) -> str:
    """The sentence for a run folder that is not that of the driver, else nothing."""
    folder = Path(config.run.dir)
    try:
        if (folder / SHARED_FILE).read_text() == token:
            return ""
    except OSError:
        pass
    return (
        f"run.dir={folder} on node {ray.util.get_node_ip_address()} is not the folder that the driver has; "
        "choose one on a file system that all nodes share"
    )


class TrainingProcess:
    """The process of a rank; it ends with the thread that made this."""

    def __init__(self, run: str, environment: dict[str, str]) -> None:
        self.sentence = ""
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as self._file:
            self._file.write(run)
        package_parent = str(Path(__file__).parents[2])
        path = os.pathsep.join(p for p in (package_parent, os.environ.get("PYTHONPATH")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sleeptrain.cluster.training_process", self._file.name],
            env=os.environ | environment | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr
        self._relay = threading.Thread(target=self._pass_on, args=(self._process.stderr,), daemon=True)
        self._relay.start()

    def watch(self, control: Any, attempt: str, config: Config | None) -> tuple[int, str]:
        """Its exit code and last word. With ``config``, reports the metrics of the run."""
        asked_to_stop, beaten = False, -BEAT_SECONDS
        try:
            while self._process.poll() is None:
                time.sleep(POLL_SECONDS)
                if time.monotonic() < beaten + BEAT_SECONDS:
                    continue
                beaten = time.monotonic()
                row = newest_row(Path(config.run.dir) / METRICS_FILE) if config else None
                order = ray.get(control.beat.remote(attempt, row))
                if order == "end":
                    self._process.kill()
                if order == "stop" and not asked_to_stop:
                    self._process.send_signal(signal.SIGTERM)
                    asked_to_stop = True
        finally:
            self._process.kill()
            self._process.wait()
            Path(self._file.name).unlink(missing_ok=True)
        self._relay.join(POLL_SECONDS)
        if self._process.returncode < 0:
            self.sentence = f"killed by {signal.Signals(-self._process.returncode).name}"
        if config and (row := newest_row(Path(config.run.dir) / METRICS_FILE)):
            ray.get(control.beat.remote(attempt, row))
        return self._process.returncode, self.sentence

    def _pass_on(self, errors: IO[str]) -> None:
        for line in errors:
            print(line, end="", file=sys.stderr, flush=True)
            if line.strip():
                self.sentence = line.strip().removeprefix("error: ")


def newest_row(path: Path) -> dict[str, Any] | None:
    """The last row of training in a ``metrics.jsonl``, read from its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in row:
            return dict(row)
    return None
