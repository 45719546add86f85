"""Metrics of a run: every row to ``metrics.jsonl``, and to Weights & Biases when asked. The only door to
wandb."""

import contextlib
import json
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sleeptrain.config import Config
from sleeptrain.engine.resilience import cut_metrics
from sleeptrain.schema import ConfigError, RunError, to_dict

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends rows; a row is a flat dict with its ``step``. Opening it continues what is there."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._path = folder / FILE_NAME
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = start_wandb(folder, config) if config.log.wandb != "off" else None

    def write(self, step: int, row: dict[str, Any]) -> None:
        """JSON has no infinity: a value that is not finite is written as null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self._told_of_a_full_disk():
            self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(row, step=step)

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

    def close(self) -> None:
        """What could not be written before is given up."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

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
    def close(self) -> None: ...


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, in order."""
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_wandb(config: Config) -> None:
    """Raises ConfigError before anything starts when the run is to go to wandb and there is no key."""
    if config.log.wandb != "online":
        return
    import wandb

    remedy = "run `wandb login`, set WANDB_API_KEY, or use log.wandb=offline"
    try:
        has_key = wandb.login(prompt=False)
    except (wandb.Error, ValueError) as error:
        raise ConfigError(
            f"log.wandb=online, but wandb refuses ({' '.join(str(error).split())}); {remedy}"
        ) from error
    if not has_key:
        raise ConfigError(f"log.wandb=online, but no API key is set; {remedy}")


def start_wandb(folder: Path, config: Config) -> Any:
    """A wandb run with the id of ours, so that a resumed run goes on there, too."""
    import wandb

    return wandb.init(
        id=config.run.id,
        name=config.run.id,
        project=config.log.wandb_project,
        dir=str(folder),
        mode="online" if config.log.wandb == "online" else "offline",
        resume="allow",
        config=to_dict(config),
    )


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process on a CPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
