"""The index of a set of shards: what the samples are, and of each shard its size and its SHA-256.

A set is a folder, local or behind any URL that fsspec opens:

    index.json           this
    depo-000000.tar ...  the shards: see ``shards.py``

Index and shards may come from anywhere: what is read here is checked before it is used. The bounds below keep
what a hostile index can make its reader allocate under 100 MB.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from sleeptrain.schema import ConfigError, RunError

FILE = "index.json"
MAKING = ".making"  # until the set is whole: what it will be, NAME.json for each shard, files half written
FORMAT = "sleeptrain shards 1"
MAX_INDEX_BYTES = 8 * 2**20  # about 50 000 shards
MAX_SHARD_BYTES = 4 * 2**30
MIN_SAMPLE_BYTES = 4 * 512  # two members of a tar file
_LEAST_BYTES_PER_VALUE = 16  # the values of a real index take more each
_MAX_TOKENS = 2**31
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{,63}-[0-9]{6}\.tar")
_PLAIN_TYPES = (str, int, float, bool, type(None))
_SHA256 = re.compile(r"[0-9a-f]{64}")

Kind = Literal["examples", "documents"]


class ShardError(RunError):
    """A set of shards is damaged, or not what its index says; the message names the file."""


class ShardEntry(NamedTuple):
    """What the index says of one shard."""

    name: str
    samples: int
    tokens: int
    bytes: int
    sha256: str

    @property
    def is_made(self) -> bool:
        """Of a set that is made while it is read, only names and numbers of samples are known before."""
        return bool(self.sha256)


@dataclass(frozen=True)
class Index:
    """``examples`` have ``sequence_tokens`` each and their own targets; ``documents`` (0) are token ids, each
    of any length, to be packed. ``task`` is the fingerprint of the task that they came from, and the seed."""

    kind: Kind
    split: str
    sequence_tokens: int
    vocab_size: int
    task: dict[str, Any]
    tokenizer_sha256: str
    code_version: str
    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Of all that the index says, however it was laid out."""
        return hashlib.sha256(json.dumps(_plain(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """One line per shard, so that two indexes can be compared by eye."""
        plain = _plain(self)
        rows = ",\n".join(f"    {json.dumps(row)}" for row in plain.pop("shards"))
        head = json.dumps(plain, indent=2).removesuffix("\n}")
        return f'{head},\n  "shards": [\n{rows}\n  ]\n}}\n'.encode()


def _plain(index: Index) -> dict[str, Any]:
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    return {"format": FORMAT} | values | {"shards": [shard._asdict() for shard in index.shards]}


def parse_index(data: bytes, where: str) -> Index:
    """Raises ShardError unless it is an index of this format, whole and plain."""
    try:
        _require_few_values(data)
        values = json.loads(data)
        if values.pop("format") != FORMAT:
            raise ShardError(f"{where} is not of the format '{FORMAT}'; make the shards again")
        shards = tuple(ShardEntry(**row) for row in values.pop("shards"))
        index = Index(**values, shards=shards)
        _require_types(index)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardError(f"{where} is no index of shards ({error}); make the shards again") from error
    _require_plain(shards, where)
    return index


def parse_entry(data: bytes, where: str) -> ShardEntry:
    """What the maker of a shard says of it; raises ShardError unless it is plain."""
    try:
        _require_few_values(data)
        entry = ShardEntry(**json.loads(data))
        _require_entry_types(entry)
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardError(f"{where} tells of no shard ({error}); make the shards again") from error
    _require_plain([entry], where)
    return entry


def _require_few_values(data: bytes) -> None:
    """JSON of a few MB can become hundreds of MB of empty lists."""
    num_values = sum(map(data.count, (b",", b"[", b"{")))
    if len(data) > MAX_INDEX_BYTES or num_values > 64 + len(data) // _LEAST_BYTES_PER_VALUE:
        raise ValueError(f"{num_values} values in {len(data)} bytes are too many")


def _require_types(index: Index) -> None:
    for shard in index.shards:
        _require_entry_types(shard)
    if any(type(n) is not int or n < 0 for n in (index.sequence_tokens, index.vocab_size)):
        raise ValueError("a size is not a whole number")
    texts = (index.tokenizer_sha256, index.code_version)
    if any(type(text) is not str for text in texts) or type(index.task) is not dict:
        raise ValueError("a value is of the wrong type")
    if not all(map(_is_plain, index.task.values())):
        raise ValueError("a value of task is nested")
    if index.kind not in ("examples", "documents") or index.split not in ("train", "validation", "test"):
        raise ValueError(f"kind {index.kind!r} of split {index.split!r} is unknown")
    if max(index.sequence_tokens, index.vocab_size) > _MAX_TOKENS:
        raise ValueError("sequence_tokens or vocab_size is too large")


def _require_entry_types(shard: ShardEntry) -> None:
    if any(type(n) is not int or n < 0 for n in (shard.samples, shard.tokens, shard.bytes)):
        raise ValueError("a size is not a whole number")
    if type(shard.name) is not str or type(shard.sha256) is not str:
        raise ValueError("a value is of the wrong type")


def _is_plain(value: Any) -> bool:
    """A number or a text, or a list of them."""
    return all(type(v) in _PLAIN_TYPES for v in (value if type(value) is list else [value]))


def _require_plain(shards: Sequence[ShardEntry], where: str) -> None:
    if not shards:
        raise ShardError(f"{where} names no shard; make the shards again")
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise ShardError(f"{where} names a shard {shard.name[:100]!r}; plain names end in -000000.tar")
        if not _SHA256.fullmatch(shard.sha256):
            raise ShardError(f"{where} gives {shard.name} no SHA-256")
        if shard.bytes % 512 or not 0 < shard.bytes <= MAX_SHARD_BYTES:
            raise ShardError(
                f"{where} gives {shard.name} {shard.bytes} bytes; a shard is a tar file of at most "
                f"{MAX_SHARD_BYTES}"
            )
        if not 0 < shard.samples <= shard.bytes // MIN_SAMPLE_BYTES or shard.tokens > shard.bytes:
            raise ShardError(
                f"{where} gives {shard.name} {shard.samples} samples with {shard.tokens} tokens in "
                f"{shard.bytes} bytes, which cannot be"
            )
    if len({shard.name for shard in shards}) < len(shards):
        raise ShardError(f"{where} names a shard twice")


def require_plain_url(url: str, setting: str) -> None:
    """Raises ConfigError for a URL that holds a secret, or that would run a command."""
    if url.strip().startswith("pipe:") or "::" in url:
        raise ConfigError(f"{setting} holds a chained or pipe URL, which could run commands; give a folder")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{setting} holds {url!r}, which is no URL ({error}); give a folder") from error
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"{setting} holds a URL with a name, password or query in it, which would end up in config.yaml; "
            "give credentials by the environment or the file that its fsspec backend reads"
        )
