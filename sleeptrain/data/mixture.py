"""The sets of shards that a run reads, and in which shares; everything is checked before the first step."""

from dataclasses import dataclass
from pathlib import Path

from sleeptrain.config import Config
from sleeptrain.data.fetch import read_index
from sleeptrain.data.index import Index, require_plain_url
from sleeptrain.data.shard_plan import plan_of_run, planned_index
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.base import Task
from sleeptrain.tasks.text import TextCrops


@dataclass(frozen=True)
class Mixture:
    """``num_streams`` logical streams draw from the sources ``urls`` by their ``shares``, which add up to 1.

    A row has ``row_tokens``: one example, or documents packed from window borders on, each with ``end_id``
    before and after it. ``cache`` is a folder for copies of shards and its size in bytes.
    """

    urls: tuple[str, ...]
    indexes: tuple[Index, ...]
    shares: tuple[float, ...]
    num_streams: int
    seed: int
    vocab_size: int
    end_id: int
    row_tokens: int
    window_tokens: int
    skips_bad_shards: bool
    cache: tuple[Path, int] | None

    @property
    def is_packed(self) -> bool:
        return self.indexes[0].kind == "documents"

    def fingerprint(self) -> dict[str, str]:
        """What the data is: a resumed run must find the same."""
        return {f"shards_{i}_sha256": index.sha256 for i, index in enumerate(self.indexes)}


def open_mixture(run: Config, task: Task) -> Mixture | None:
    """Reads the indexes of ``data.shards``, None without any. Raises ConfigError where they do not belong to
    ``task`` or not together, ShardError where one is damaged."""
    config = run.data
    if not config.shards:
        return None
    for url in config.shards:
        require_plain_url(url, "data.shards")
    if config.producer == "none":
        indexes = tuple(read_index(url) for url in config.shards)
    else:
        indexes = (planned_index(plan_of_run(run)),)
    for url, index in zip(config.shards, indexes):
        _require_same_task(url, index, task)
    if len({index.kind for index in indexes}) > 1:
        raise ConfigError("data.shards mixes sets of examples with sets of documents; use one kind in a run")
    _require_documents(run, indexes[0])
    length = run.window_tokens
    if indexes[0].kind == "documents" and task.sequence_tokens % length:
        raise ConfigError(
            f"sleep.window_tokens={length} does not divide task.sequence_tokens={task.sequence_tokens}, and "
            "documents are packed in whole windows; choose a divisor"
        )
    weights = config.weights or tuple(float(index.num_samples) for index in indexes)
    return Mixture(
        urls=config.shards,
        indexes=indexes,
        shares=tuple(weight / sum(weights) for weight in weights),
        num_streams=config.batch_sequences if run.sleep.carry_between_batches else config.streams,
        seed=run.run.seed,
        vocab_size=task.vocab_size,
        end_id=task.end_id if isinstance(task, TextCrops) else task.vocab_size - 1,
        row_tokens=task.sequence_tokens,
        window_tokens=length,
        skips_bad_shards=config.on_bad_shard == "skip",
        cache=(Path(config.cache_dir), int(config.cache_gib * 2**30)) if config.cache_dir else None,
    )


def _require_documents(run: Config, index: Index) -> None:
    """What is carried from row to row is the memory of a long document: each row is a stream of its own."""
    if not run.sleep.carry_between_batches:
        return
    if index.kind != "documents":
        raise ConfigError(
            "sleep.carry_between_batches=true goes on with long documents, and data.shards holds examples; "
            "set it to false, or give a set of documents"
        )
    if run.data.num_streams not in (None, run.data.batch_sequences):
        raise ConfigError(
            f"data.num_streams={run.data.num_streams} does not go with sleep.carry_between_batches=true: "
            "each row of a batch is a stream then; leave it out"
        )


def _require_same_task(url: str, index: Index, task: Task) -> None:
    """The sets of a mixture may differ in difficulty and in seed, and not in what a token means."""
    own = task.fingerprint()
    expected = {
        "task": own["name"],
        "split": "train",
        "vocab_size": task.vocab_size,
        "tokenizer": own.get("tokenizer", ""),
        "sequence_tokens": 0 if index.kind == "documents" else task.sequence_tokens,
    }
    found = {
        "task": index.task.get("name"),
        "split": index.split,
        "vocab_size": index.vocab_size,
        "tokenizer": index.task.get("tokenizer", ""),
        "sequence_tokens": index.sequence_tokens,
    }
    differing = [f"{k} is {found[k]!r} and not {expected[k]!r}" for k in expected if found[k] != expected[k]]
    if differing:
        raise ConfigError(
            f"data.shards holds {url}, which is not of this run's task: {', '.join(differing)}; choose other "
            "shards or another task"
        )
