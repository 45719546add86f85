"""Whether a checkpoint belongs to the run that finds it."""

from pathlib import Path
from typing import Any

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import differences
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.parallel.place import Place
from sleeptrain.schema import ConfigError

# Settings that may change between two starts of a run: they do not touch what it computes.
FREE_SETTINGS = (
    "run.id",
    "run.dir",
    "run.device",
    "run.num_threads",
    "run.check_replicas_every_steps",
    "run.hang_timeout_seconds",
    "run.allow_config_change",
    "dry_run",
    "data.micro_batch_sequences",
    "data.shards",  # what they hold is compared by its hash
    "data.num_workers",
    "data.on_bad_shard",
    "data.cache_dir",
    "data.cache_gib",
    "sleep.activation_checkpointing",
)
FREE_SECTIONS = ("log.", "checkpoint.", "eval.", "parallel.")


def newest_checkpoint(checkpoints_dir: Path, place: Place) -> Checkpoint | None:
    """The newest that is whole. The first process looks for it, and all read the same."""
    path = None
    if place.rank == 0:
        found = store.find_latest(
            checkpoints_dir, report=lambda text: print(f"warning: {text}"), set_aside=True
        )
        path = found.path if found else None
    path = place.from_first(path)
    return Checkpoint(path) if path else None


def require_same_run(found: Checkpoint, documents: dict[str, Any], change_allowed: bool) -> None:
    """Raises ConfigError with the settings and data that differ from those of ``documents``; where the
    change is allowed, says so in a warning each."""
    differing = [
        line
        for name in ("config", "data")
        for line in differences(found.documents.get(name, {}), documents[name])
        if name == "data" or not _is_free(line.split(":")[0])
    ]
    if differing and not change_allowed:
        raise ConfigError(
            f"{found.path} was trained with other settings: {'; '.join(differing)}; go back to them, "
            "choose another run.id, or set run.allow_config_change=true"
        )
    for line in differing:
        print(f"warning: going on with other settings, {line}")


def _is_free(setting: str) -> bool:
    return setting in FREE_SETTINGS or setting.startswith(FREE_SECTIONS)
