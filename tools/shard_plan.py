"""What ``make_shards.py`` is to make: samples by their place in the set, and where each shard begins."""

import argparse
import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sleeptrain.data.index import FORMAT, MAX_INDEX_BYTES, MAX_SHARD_BYTES, Index, require_plain_url
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


def make_plan(options: argparse.Namespace) -> Plan:
    """Raises ConfigError where the settings do not fit together."""
    from sleeptrain.pretrain import compose_config  # workers start sooner without hydra

    require_plain_url(options.out, "OUT")
    if options.out.startswith("memory://") and options.num_procs > 1:
        raise ConfigError(f"OUT={options.out} is memory of one process; use --num-procs 1")
    config = compose_config(options.settings)
    task, seed, split = make_task(config.task), config.run.seed, options.split
    fingerprint: dict[str, Any] = dict(task.fingerprint())
    source: ExampleSource | DocumentSource
    if isinstance(task, Text):
        del fingerprint["sequence_tokens"]  # the run that reads the documents cuts them
        documents = task.documents(split)
        order = shuffled(len(documents), seed, f"documents of {split}", 0)
        source = DocumentSource(task, [documents[i] for i in order])
    else:
        source = ExampleSource(task, seed, split)
    num_samples = count_samples(options, source)
    num_shards = -(-num_samples // options.shard_samples)
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
    plan = Plan(options.out, head, [num_samples * i // num_shards for i in range(num_shards + 1)], source)
    _require_sizes(plan, options.shard_samples)
    return plan


def count_samples(options: argparse.Namespace, source: ExampleSource | DocumentSource) -> int:
    """All shards of examples hold equally many; the numbers of documents differ by at most one."""
    wanted, each = options.num_examples, options.shard_samples
    if isinstance(source, DocumentSource):
        if wanted:
            raise ConfigError(
                f"--num-examples={wanted} is for tasks that make examples, and the {len(source.documents)} "
                "documents of a text are written as they are; leave it out"
            )
        return len(source.documents)
    if not wanted:
        raise ConfigError(
            f"--num-examples is missing; task={source.task.config.name} makes as many as are asked for"
        )
    if wanted % each:
        fitting = [str(n) for n in (wanted // each * each, (wanted // each + 1) * each) if n]
        raise ConfigError(
            f"--num-examples={wanted} is no multiple of --shard-samples={each}, and shards hold equally many "
            f"examples; use {' or '.join(fitting)}"
        )
    return wanted


def _require_sizes(plan: Plan, shard_samples: int) -> None:
    num_samples = plan.borders[-1]
    if plan.num_shards > MAX_SHARDS or num_samples > 10**KEY_DIGITS:
        raise ConfigError(
            f"--shard-samples={shard_samples} puts {num_samples} samples in {plan.num_shards} shards, and a "
            f"set has at most {10**KEY_DIGITS} in {MAX_SHARDS}; raise it, or make several sets"
        )
    for shard in range(plan.num_shards):
        places = plan.places(shard)
        most = plan.source.most_bytes(places) + SAMPLE_OVERHEAD_BYTES * len(places)
        if most > MAX_SHARD_BYTES:
            raise ConfigError(
                f"--shard-samples={shard_samples} puts up to {most} bytes in shard {shard}, more than the "
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
