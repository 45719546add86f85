"""What a set of shards will be: samples by their place in it, and where each shard begins."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sleeptrain.config import Config
from sleeptrain.data.index import (
    FORMAT,
    MAX_INDEX_BYTES,
    MAX_SHARD_BYTES,
    Index,
    ShardEntry,
    require_plain_url,
)
from sleeptrain.data.order import shuffled
from sleeptrain.data.shards import KEY_DIGITS, Tokens
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import Split, Task, Text, make_task
from sleeptrain.tasks.text import Document

MAX_SHARDS = MAX_INDEX_BYTES // 220  # bytes of a row of the index, at most
CHUNK_SAMPLES = 512  # made at once
SAMPLE_OVERHEAD_BYTES = 6 * 512  # at most, but for long names: headers and padding of both members, a .json

Sample = tuple[dict[str, Any], Tokens]


@dataclass(frozen=True)
class ExampleSource:
    """The examples of a task; place i of the set holds example i."""

    task: Task
    seed: int
    split: Split

    def samples(self, places: range) -> Iterator[Sample]:
        for start in range(places.start, places.stop, CHUNK_SAMPLES):
            indices = np.arange(start, min(start + CHUNK_SAMPLES, places.stop))
            e = self.task.examples(self.seed, indices, self.split)
            tokens = np.stack([np.where(e.valid, e.ids, -1), np.where(e.loss_mask, e.targets, -1)], axis=1)
            rows = zip(e.difficulty.tolist(), indices.tolist(), tokens.astype(self._type))
            yield from (({"difficulty": d, "index": i}, array) for d, i, array in rows)

    def most_bytes(self, places: range) -> int:
        return 2 * self.task.sequence_tokens * np.dtype(self._type).itemsize * len(places)

    @property
    def _type(self) -> type[np.int16] | type[np.int32]:
        return np.int16 if self.task.vocab_size <= 2**15 else np.int32


@dataclass(frozen=True)
class DocumentSource:
    """The documents of a split in the order of the set."""

    task: Text
    documents: list[Document]

    def samples(self, places: range) -> Iterator[Sample]:
        for document in self.documents[places.start : places.stop]:
            meta = {"name": document.name, "num_bytes": document.num_bytes}
            yield meta, self.task.read(document)

    def most_bytes(self, places: range) -> int:
        """No token is shorter than a byte."""
        num_bytes = sum(document.num_bytes for document in self.documents[places.start : places.stop])
        return num_bytes * (2 if self.task.vocab_size <= 2**16 else 4)


@dataclass(frozen=True)
class Plan:
    """What is to be made. ``head`` is the index without its shards; shard i holds the places from
    ``borders[i]`` to ``borders[i + 1]`` of the source."""

    url: str
    head: Index
    borders: list[int]
    source: ExampleSource | DocumentSource

    @property
    def num_shards(self) -> int:
        return len(self.borders) - 1

    def name(self, shard: int) -> str:
        return f"{self.head.task['name']}-{shard:06d}.tar"

    def places(self, shard: int) -> range:
        return range(self.borders[shard], self.borders[shard + 1])

    def describe(self) -> dict[str, Any]:
        return describe(self.head, self.borders[-1], self.num_shards)


def describe(head: Index, num_samples: int, num_shards: int) -> dict[str, Any]:
    """What tells a set from another, as plain values of JSON."""
    values = {key: value for key, value in asdict(head).items() if key != "shards"}
    counts = {"num_samples": num_samples, "num_shards": num_shards}
    return json.loads(json.dumps({"format": FORMAT} | values | counts))


class Sizes(NamedTuple):
    """Of a set: how many examples (None: a text, which is written whole), and samples of a shard, with the
    ``names`` that the user knows them by."""

    num_examples: int | None
    shard_samples: int
    names: tuple[str, str]


def make_plan(config: Config, url: str, split: Split, sizes: Sizes) -> Plan:
    """The set of the task of ``config``, with its seed. Raises ConfigError where the settings do not fit
    together."""
    task, seed = make_task(config.task), config.run.seed
    fingerprint: dict[str, Any] = dict(task.fingerprint())
    source: ExampleSource | DocumentSource
    if isinstance(task, Text):
        del fingerprint["sequence_tokens"]  # the run that reads the documents cuts them
        documents = task.documents(split)
        order = shuffled(len(documents), seed, f"documents of {split}", 0)
        source = DocumentSource(task, [documents[i] for i in order])
    else:
        source = ExampleSource(task, seed, split)
    num_samples = count_samples(sizes, source)
    num_shards = -(-num_samples // sizes.shard_samples)
    head = Index(
        kind="documents" if isinstance(task, Text) else "examples",
        split=split,
        sequence_tokens=0 if isinstance(task, Text) else task.sequence_tokens,
        vocab_size=task.vocab_size,
        task=fingerprint | {"seed": seed},
        tokenizer_sha256=task.tokenizer_sha256 if isinstance(task, Text) else "",
        code_version=code_version(),
        shards=(),
    )
    plan = Plan(url, head, [num_samples * i // num_shards for i in range(num_shards + 1)], source)
    _require_sizes(plan, sizes)
    return plan


def plan_of_run(config: Config) -> Plan:
    """The set that producers make for a run in data.shards: unless data.num_examples says otherwise, each
    logical stream finds what it needs once. Raises ConfigError where the settings do not fit together."""
    data = config.data
    require_plain_url(data.shards[0], "data.shards")
    num_examples = data.num_examples
    if num_examples is None:
        per_stream = config.optim.num_steps * data.batch_sequences // data.streams
        num_examples = data.streams * -(-per_stream // data.shard_samples) * data.shard_samples
    sizes = Sizes(num_examples, data.shard_samples, ("data.num_examples", "data.shard_samples"))
    return make_plan(config, data.shards[0], "train", sizes)


def planned_index(plan: Plan) -> Index:
    """What is known before the first shard is made; the same whatever code makes them."""
    shards = (
        ShardEntry(plan.name(i), len(plan.places(i)), tokens=0, bytes=0, sha256="")
        for i in range(plan.num_shards)
    )
    return replace(plan.head, code_version="", shards=tuple(shards))


def count_samples(sizes: Sizes, source: ExampleSource | DocumentSource) -> int:
    """All shards of examples hold equally many; the numbers of documents differ by at most one."""
    wanted, each, (name, each_name) = sizes
    if isinstance(source, DocumentSource):
        if wanted:
            raise ConfigError(
                f"{name}={wanted} is for tasks that make examples, and the {len(source.documents)} "
                "documents of a text are written as they are; leave it out"
            )
        return len(source.documents)
    if not wanted:
        raise ConfigError(f"{name} is missing; task={source.task.config.name} makes as many as are asked for")
    if wanted % each:
        fitting = [str(n) for n in (wanted // each * each, (wanted // each + 1) * each) if n]
        raise ConfigError(
            f"{name}={wanted} is no multiple of {each_name}={each}, and shards hold equally many "
            f"examples; use {' or '.join(fitting)}"
        )
    return wanted


def _require_sizes(plan: Plan, sizes: Sizes) -> None:
    name = f"{sizes.names[1]}={sizes.shard_samples}"
    num_samples = plan.borders[-1]
    if plan.num_shards > MAX_SHARDS or num_samples > 10**KEY_DIGITS:
        raise ConfigError(
            f"{name} puts {num_samples} samples in {plan.num_shards} shards, and a "
            f"set has at most {10**KEY_DIGITS} in {MAX_SHARDS}; raise it, or make several sets"
        )
    for shard in range(plan.num_shards):
        places = plan.places(shard)
        most = plan.source.most_bytes(places) + SAMPLE_OVERHEAD_BYTES * len(places)
        if most > MAX_SHARD_BYTES:
            raise ConfigError(
                f"{name} puts up to {most} bytes in shard {shard}, more than the "
                f"{MAX_SHARD_BYTES} that it may have; lower it"
            )


def code_version() -> str:
    """The commit of this checkout, or the version that is installed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return version("sleeptrain")
