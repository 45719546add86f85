"""Small sets of shards for tests, written without the tool that makes large ones."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sleeptrain.data.index import FILE, Index, ShardEntry
from sleeptrain.data.shards import Tokens, write_shard
from sleeptrain.tasks import Task

Sample = tuple[dict[str, Any], Tokens]


def write_set(
    folder: Path,
    shards: Iterable[Sequence[Sample]],
    task: Task,
    kind: str = "examples",
    split: str = "train",
) -> Index:
    """A set with these samples, in the order given."""
    folder.mkdir(parents=True)
    entries, first = [], 0
    for number, samples in enumerate(shards):
        file = io.BytesIO()
        write_shard(file, samples, first)
        first += len(samples)
        data, name = file.getvalue(), f"set-{number:06d}.tar"
        (folder / name).write_bytes(data)
        tokens = sum(array.shape[-1] for _, array in samples)
        entries.append(ShardEntry(name, len(samples), tokens, len(data), hashlib.sha256(data).hexdigest()))
    index = Index(
        kind=kind,  # type: ignore[arg-type]
        split=split,
        sequence_tokens=task.sequence_tokens if kind == "examples" else 0,
        vocab_size=task.vocab_size,
        task=task.fingerprint(),
        tokenizer_sha256="",
        code_version="test",
        shards=tuple(entries),
    )
    (folder / FILE).write_bytes(index.to_json())
    return index


def examples_set(folder: Path, task: Task, num_shards: int, shard_samples: int, seed: int = 0) -> Index:
    """The first examples of a task."""

    def shard(number: int) -> list[Sample]:
        indices = np.arange(number * shard_samples, (number + 1) * shard_samples)
        e = task.examples(seed, indices, "train")
        tokens = np.stack([np.where(e.valid, e.ids, -1), np.where(e.loss_mask, e.targets, -1)], axis=1)
        return [
            ({"difficulty": int(d), "index": int(i)}, t)
            for d, i, t in zip(e.difficulty, indices, tokens.astype(np.int16))
        ]

    return write_set(folder, [shard(number) for number in range(num_shards)], task)


def documents_set(folder: Path, task: Task, texts: Sequence[bytes], num_shards: int) -> Index:
    """Documents of bytes, dealt to the shards in turn."""
    samples = [
        ({"name": str(i)}, np.frombuffer(text, np.uint8).astype(np.uint16)) for i, text in enumerate(texts)
    ]
    return write_set(folder, [samples[n::num_shards] for n in range(num_shards)], task, "documents")
