"""Text that lies in shards: a folder or URL with a set of documents for each split.

    CORPUS/train/index.json ...        streamed, with data.shards=[CORPUS/train]
    CORPUS/validation/index.json ...   read into memory when first evaluated
    CORPUS/test/index.json ...

Neither the original files nor a local copy are needed.
"""

from pathlib import Path
from typing import get_args

import numpy as np

from sleeptrain.config import TaskConfig, TextConfig
from sleeptrain.data.fetch import ShardReader, join, read_index
from sleeptrain.data.index import FILE, require_plain_url
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import Split, Task, make_task
from sleeptrain.tasks.text import TextCrops, Tokens

HELD_OUT: tuple[Split, ...] = tuple(split for split in get_args(Split) if split != "train")


def open_task(config: TaskConfig) -> Task:
    """The task of these settings; raises ConfigError where its data is not there."""
    if isinstance(config, TextConfig) and _holds_shards(config.folder):
        return ShardedText(config)
    return make_task(config)


class ShardedText(TextCrops):
    """Held-out text from the shards of a corpus; its training split is only streamed."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        require_plain_url(config.folder, "task.folder")
        self._indexes = {split: read_index(join(config.folder, split)) for split in HELD_OUT}
        for split, index in self._indexes.items():
            found = (index.kind, index.split, index.vocab_size, index.task.get("tokenizer"))
            expected = ("documents", split, self.vocab_size, self.tokenizer_name)
            if found != expected:
                raise ConfigError(
                    f"task.folder={config.folder}: the set {split} is of {found} and not of {expected} "
                    "(kind, split, vocabulary, tokenizer); make it again, or change task.tokenizer"
                )
            if index.num_tokens + index.num_samples <= self.sequence_tokens:
                raise ConfigError(
                    f"task.folder={config.folder} has {index.num_tokens} tokens in {split}, too few for "
                    f"task.sequence_tokens={self.sequence_tokens}; lower that, or add text"
                )

    def read_tokens(self, split: Split) -> Tokens:
        if split not in self._indexes:
            raise ConfigError(
                f"task.folder={self.config.folder} holds shards, which are streamed; set "
                f"data.shards=[{join(self.config.folder, split)}]"
            )
        index = self._indexes[split]
        reader = ShardReader(join(self.config.folder, split), index, None)
        end = self.end_id
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        parts = []
        for number in range(len(index.shards)):
            shard = reader.fetch(number).result()
            parts += [np.append(shard.tokens(i), end).astype(dtype) for i in range(len(shard))]
        return np.concatenate(parts)

    def fingerprint(self) -> dict[str, str | int]:
        hashes = {f"{split}_sha256": index.sha256 for split, index in self._indexes.items()}
        named = {"name": self.config.name, "tokenizer": self.tokenizer_name}
        return {**named, "sequence_tokens": self.sequence_tokens, **hashes}


def _holds_shards(folder: str) -> bool:
    return "://" in folder or (Path(folder) / HELD_OUT[0] / FILE).is_file()
