"""Metrics of a run: every row to ``metrics.jsonl``, and from there to Weights & Biases when asked."""

import contextlib
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sleeptrain.config import Config
from sleeptrain.engine.mirror import Mirror
from sleeptrain.engine.resilience import METRICS_FILE, cut_metrics
from sleeptrain.schema import RunError

FILE_NAME = METRICS_FILE


class MetricsWriter:
    """Appends rows; a row is a flat dict with its ``step``. Opening it continues what is there."""

    def __init__(self, folder: Path, config: Config, warn: Callable[[str], None] = print) -> None:
        self._path = folder / FILE_NAME
        self._file = self._path.open("a", encoding="utf-8")
        self._warn = warn
        self._mirror = Mirror(self._path, config) if config.log.wandb != "off" else None

    def write(self, step: int, row: dict[str, Any]) -> None:
        """JSON has no infinity: a value that is not finite is written as null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self._told_of_a_full_disk():
            self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
        self._tell_of_wandb()

    def sync(self) -> None:
        """Rows written so far survive a crash of the machine: called before a checkpoint refers to their
        step."""
        with self._told_of_a_full_disk():
            self._file.flush()
            os.fsync(self._file.fileno())

    def cut(self, step: int) -> None:
        """Takes back the rows after ``step``."""
        self._file.close()
        cut_metrics(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def finish(self) -> None:
        """Waits for wandb, but not for long."""
        if self._mirror:
            self._mirror.finish()
            self._tell_of_wandb()

    def close(self) -> None:
        """What could not be written before is given up."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._mirror:
            self._mirror.leave()

    def _tell_of_wandb(self) -> None:
        problem = self._mirror.problem() if self._mirror else None
        if problem:
            self._warn(f"warning: wandb: {problem}; all rows are in {self._path}")

    @contextlib.contextmanager
    def _told_of_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"writing {self._file.name} failed ({error.strerror or error}); free some space, and the "
                "same command goes on from the last checkpoint"
            ) from error


class NoMetrics:
    """For the processes that are not the first: it writes them for all."""

    def write(self, step: int, row: dict[str, Any]) -> None: ...
    def sync(self) -> None: ...
    def cut(self, step: int) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, in order."""
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process on a CPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's peak before this program began, too
        words = status.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) / 2**20  # KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
