"""Bytes of shards from where they are: read ahead, compared with their hash as they arrive, kept nearby.

Any URL that fsspec opens will do. What comes from far can be kept in a folder of bounded size; it is compared
with its hash at every reading, too, so that a copy gone bad is fetched again.
"""

import hashlib
import os
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from sleeptrain.data.index import FILE, MAX_INDEX_BYTES, Index, ShardEntry, ShardError, parse_index
from sleeptrain.data.shards import Shard
from sleeptrain.schema import ConfigError

CHUNK_BYTES = 2**20
NUM_TRIES, FIRST_PAUSE_SECONDS = 4, 0.5
NUM_THREADS = 4


def read_index(url: str) -> Index:
    """The index of the set at ``url``; ConfigError if there is none, ShardError if it is damaged."""
    where = join(url, FILE)
    try:
        with open_url(where) as file:
            data = file.read(MAX_INDEX_BYTES + 1)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"data.shards holds {url}, whose {FILE} cannot be read ({_reason(error)}); give the folder or URL "
            "that tools/make_shards.py wrote"
        ) from error
    if len(data) > MAX_INDEX_BYTES:
        raise ShardError(f"{where} has more than {MAX_INDEX_BYTES} bytes")
    return parse_index(data, where)


class ShardReader:
    """Fetches the shards of one set in threads; a shard is in memory while somebody holds its future."""

    def __init__(self, url: str, index: Index, cache: "Cache | None") -> None:
        self.url, self.index, self.cache = url, index, cache
        self._pool: ThreadPoolExecutor | None = None
        self._running: WeakValueDictionary[int, Future[Shard]] = WeakValueDictionary()

    def fetch(self, shard: int) -> "Future[Shard]":
        """Begins to fetch, unless it is here. The result raises ShardError for a shard that is missing or
        damaged."""
        found = self._running.get(shard)
        if found is None:
            self._pool = self._pool or ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="shards")
            found = self._running[shard] = self._pool.submit(self._load, self.index.shards[shard])
        return found

    def _load(self, entry: ShardEntry) -> Shard:
        shard = Shard(self._bytes(entry), join(self.url, entry.name))
        if len(shard) != entry.samples:
            raise ShardError(f"{shard.name} holds {len(shard)} samples; the index says {entry.samples}")
        return shard

    def _bytes(self, entry: ShardEntry) -> npt.NDArray[np.uint8]:
        if self.cache:
            with suppress(ShardError):
                return read_verified(str(self.cache.path(entry)), entry)
        data = read_verified(join(self.url, entry.name), entry)
        if self.cache:
            self.cache.keep(entry, data)
        return data


class Cache:
    """Copies of shards in a folder; when they are more than ``max_bytes``, the ones unused for longest go.

    Several processes may share it: files appear whole, and one that another process removed is fetched again.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={folder} cannot be made a folder ({error.strerror}); choose another"
            ) from error

    def path(self, entry: ShardEntry) -> Path:
        """Where the copy of a shard is, if there is one; counts as a use of it."""
        path = self.folder / f"{entry.sha256}.tar"
        with suppress(OSError):
            os.utime(path)
        return path

    def keep(self, entry: ShardEntry, data: npt.NDArray[np.uint8]) -> None:
        """A full disk is no error here: the next reading fetches again."""
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        with suppress(OSError):
            self._make_room(entry.bytes)
            try:
                temporary.write_bytes(data.data)
                temporary.replace(self.path(entry))
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        copies = [(path.stat(), path) for path in self.folder.glob("*.tar")]
        total = num_bytes
        for found, path in sorted(copies, key=lambda copy: copy[0].st_mtime, reverse=True):
            total += found.st_size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)


def read_verified(url: str, entry: ShardEntry) -> npt.NDArray[np.uint8]:
    """All bytes of a shard, equal to those that the index knows; else ShardError. A connection that breaks is
    tried again."""
    pause_seconds = FIRST_PAUSE_SECONDS
    for tries_left in reversed(range(NUM_TRIES)):
        try:
            return _read(url, entry)
        except ShardError:
            raise
        except FileNotFoundError as error:
            raise ShardError(f"{url} is missing; the index says that it is there") from error
        except Exception as error:  # every backend of fsspec has errors of its own
            if not tries_left:
                raise ShardError(f"{url} cannot be read ({_reason(error)})") from error
        time.sleep(pause_seconds)
        pause_seconds *= 2
    raise AssertionError("not reached")


def _read(url: str, entry: ShardEntry) -> npt.NDArray[np.uint8]:
    data = np.empty(entry.bytes, dtype=np.uint8)
    view, done, found = data.data, 0, hashlib.sha256()
    with open_url(url) as file:
        while done < len(view) and (size := file.readinto(view[done : done + CHUNK_BYTES])):
            found.update(view[done : done + size])
            done += size
        if done < len(view) or file.read(1):
            raise ShardError(
                f"{url} is {'longer' if done == len(view) else 'truncated'}; expected {done} bytes"
            )
    if found.hexdigest() != entry.sha256:
        raise ShardError(f"{url} is damaged: its SHA-256 differs from the one in the index")
    return data


def open_url(url: str) -> AbstractContextManager[Any]:
    """For reading; a path is a file of this machine."""
    if "://" not in url:
        return Path(url).open("rb", buffering=0)
    import fsspec

    return fsspec.open(url, "rb", block_size=8 * CHUNK_BYTES)


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
