"""Whether a checkpoint belongs to the run that finds it."""

from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.bucket import Bucket
from sleeptrain.checkpoint.initial import InitialWeights
from sleeptrain.checkpoint.manifest import FILE, differences
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.config import Config
from sleeptrain.data.index import require_plain_url
from sleeptrain.memory.peers import PACKAGES
from sleeptrain.parallel.layout import logical_shapes
from sleeptrain.parallel.place import Place
from sleeptrain.schema import ConfigError, from_dict, to_dict

# Settings that may change between two starts of a run: they do not touch what it computes.
FREE_SETTINGS = (
    "run.id",
    "run.dir",
    "run.device",
    "run.num_threads",
    "run.compile",
    "run.cuda_graphs",
    "run.check_replicas_every_steps",
    "run.hang_timeout_seconds",
    "run.allow_config_change",
    "dry_run",
    "data.micro_batch_sequences",
    "data.shards",  # what they hold is compared by its hash
    "data.num_workers",
    "data.num_producers",
    "data.shards_ahead",
    "data.on_bad_shard",
    "data.cache_dir",
    "data.cache_gib",
    "sleep.activation_checkpointing",
    "model.memory_backend",
)
ORIGIN = "origin"
FREE_SECTIONS = ("log.", "checkpoint.", "eval.", "parallel.", "cluster.")
KERNELS_OF_OTHERS = {backend: package.partition("==")[0] for backend, package in PACKAGES.items()}


def versions() -> dict[str, str]:
    """Of what computes, for the checkpoint. Without the build, as in ``+cpu``: it goes with the device, which
    may change."""
    found = {}
    for name in ("sleeptrain", "torch", "triton", *KERNELS_OF_OTHERS.values()):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).partition("+")[0]
    return found


def refuse_drift(checkpoints_dir: Path, config: Config) -> None:
    """Raises ConfigError where the newest checkpoint is one of other settings or versions: at once, before
    data is read or a tensor of the checkpoint is looked at."""
    found = store.peek(checkpoints_dir)
    if found and not config.run.allow_config_change:
        _refuse(found, _drift(found, {"config": to_dict(config), "versions": versions()}))


def open_bucket(config: Config) -> Bucket | None:
    """Where the run keeps copies of its checkpoints, if it does. Raises ConfigError for no such place."""
    if not config.checkpoint.bucket:
        return None
    require_plain_url(config.checkpoint.bucket, "checkpoint.bucket")
    return Bucket(f"{config.checkpoint.bucket.rstrip('/')}/{config.run.id}")


def newest_checkpoint(checkpoints_dir: Path, place: Place, bucket: Bucket | None = None) -> Checkpoint | None:
    """The newest that is whole, here or in the bucket. The first process looks for it, and all read the
    same."""
    path = None
    if place.rank == 0:
        here = store.peek(checkpoints_dir)
        if bucket:
            bucket.fetch_newer(checkpoints_dir, here.step if here else 0, print)
        found = store.find_latest(
            checkpoints_dir, report=lambda text: print(f"warning: {text}"), set_aside=True
        )
        path = found.path if found else None
        if bucket and found and found.step not in bucket.steps():
            bucket.put(found.path)  # the copy had failed
    path = place.from_first(path)
    return Checkpoint(path) if path else None


def initial_weights(config: Config, vocab_size: int) -> InitialWeights:
    """What ``run.init_from`` names, of which only the list is read yet. Raises ConfigError where there is no
    checkpoint, or its weights do not fit this model."""
    path = Path(config.run.init_from)
    found = Checkpoint(path) if (path / FILE).exists() else store.peek(path / "checkpoints")
    if found is None:
        raise ConfigError(f"run.init_from={path} holds no checkpoint; give a run folder or a step folder")
    shapes = logical_shapes(config, vocab_size)
    return InitialWeights(found, config.model, shapes, config.run.init_new)


def check_initial_weights(checkpoints_dir: Path, config: Config, vocab_size: int) -> None:
    """Raises ConfigError, before anything else is made, where a new run cannot start as ``run.init_from``
    says. A run that has checkpoints, perhaps in its bucket, needs that folder no more."""
    if config.run.init_from and not config.checkpoint.bucket and not store.peek(checkpoints_dir):
        initial_weights(config, vocab_size)


def origin_of(found: Checkpoint) -> dict[str, Any]:
    """The document that says where imported weights came from, if there is one: it goes along with them."""
    return {ORIGIN: found.documents[ORIGIN]} if ORIGIN in found.documents else {}


def require_same_run(found: Checkpoint, documents: dict[str, Any], change_allowed: bool) -> None:
    """Raises ConfigError with the settings, data and versions that differ from those of ``documents``; where
    the change is allowed, says so in a warning each."""
    differing = _drift(found, documents)
    if not change_allowed:
        _refuse(found, differing)
    # The version of this program is not a reason to refuse: a run that meets a fault of it must be able to go
    # on with the mended one.
    own = _versions_changed(found, documents, ("sleeptrain",))
    for line in differing + own:
        print(f"warning: going on with other settings, {line}")


def require_fitting_moments(found: Checkpoint) -> None:
    """Raises ValueError unless all of the optimizer state is of the checkpoint's own weights, and as large:
    before memory is taken for it."""
    weights = set(found.names("model"))
    for name in found.names("optimizer"):
        weight = name.rpartition("/")[0]
        fitting = (found.shape("model", weight) if weight in weights else None) if weight else ()
        if found.shape("optimizer", name) != fitting:
            raise ValueError(f"its optimizer state {name} belongs to no weight")


def _refuse(found: Checkpoint, differing: list[str]) -> None:
    if differing:
        raise ConfigError(
            f"{found.path} was trained with other settings: {'; '.join(differing)}; go back to them, "
            "choose another run.id, or set run.allow_config_change=true"
        )


def _drift(found: Checkpoint, documents: dict[str, Any]) -> list[str]:
    """A line for each change that may move results."""
    saved = {name: found.documents.get(name, {}) for name in ("config", "data")}
    saved["config"] = _with_later_settings(saved["config"])
    lines: list[str] = []
    for name in documents.keys() & saved.keys():
        changed = differences(saved[name], documents[name])
        lines += [line for line in changed if name == "data" or not is_free(line.split(":")[0])]
    backend = documents["config"]["model"]["memory_backend"]
    own = [KERNELS_OF_OTHERS[backend]] if backend in KERNELS_OF_OTHERS else []
    return sorted(lines) + _versions_changed(found, documents, ("torch", "triton", *own))


def _with_later_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """A setting that sleeptrain got after the checkpoint was made had its default then."""
    try:
        return to_dict(from_dict(Config, saved)) if saved else saved
    except ConfigError:
        return saved


def _versions_changed(found: Checkpoint, documents: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """What only one side has is left out: like the build, it goes with the device."""
    saved, current = found.documents.get("versions", {}), documents["versions"]
    both = [name for name in names if name in saved and name in current]
    return differences(*({"versions": {name: side[name] for name in both}} for side in (saved, current)))


def is_free(setting: str) -> bool:
    """Whether it may change between two starts of a run."""
    return setting in FREE_SETTINGS or setting.startswith(FREE_SECTIONS)
