"""A model as a checkpoint has it, for those who do not train it."""

from pathlib import Path
from typing import Any, NamedTuple

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import FILE
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.config import Config
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import ConfigError, from_dict


class Restored(NamedTuple):
    """The checkpoint, the settings of its run, and its weights."""

    checkpoint: Checkpoint
    config: Config
    backend: LocalBackend


def find(path: Path) -> Checkpoint:
    """The checkpoint in a folder of its own, or the newest whole one of a run folder; raises ConfigError
    where there is none."""
    found = Checkpoint(path) if (path / FILE).exists() else store.find_latest(path / "checkpoints", print)
    if found is None:
        raise ConfigError(f"checkpoint={path} holds no checkpoint; give a run folder or a step folder")
    return found


def settings_of(found: Checkpoint, device: str, task_changes: dict[str, Any] | None = None) -> Config:
    """Those of the run, on a device, perhaps with another task or other settings of it; without what is for
    training alone, such as graphs, which hold copies of the weights and sums of their gradients."""
    saved, changes = found.documents["config"], task_changes or {}
    same_task = changes.get("name", saved["task"]["name"]) == saved["task"]["name"]
    task = (saved["task"] if same_task else {}) | changes
    run = saved["run"] | {"device": device, "cuda_graphs": False, "deterministic": False}
    return from_dict(Config, saved | {"task": task, "run": run})


def with_weights(found: Checkpoint, config: Config) -> LocalBackend:
    backend = LocalBackend(config, found.shape("model", "embed.weight")[0])
    backend.load_model(found)
    return backend


def restore(path: Path, device: str = "auto") -> Restored:
    """Raises ConfigError where there is none, CheckpointError where it is damaged."""
    found = find(path)
    config = settings_of(found, device)
    return Restored(found, config, with_weights(found, config))
