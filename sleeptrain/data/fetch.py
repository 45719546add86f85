"""Bytes of shards from where they are: read ahead, compared with their hash as they arrive, kept nearby.

Any URL that fsspec opens will do. What comes from far can be kept in a folder of bounded size; it is compared
with its hash at every reading, too, so that a copy gone bad is fetched again.
"""

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import numpy as np

from sleeptrain.data.index import (
    FILE,
    MAKING,
    MAX_INDEX_BYTES,
    Index,
    ShardEntry,
    ShardError,
    parse_entry,
    parse_index,
)
from sleeptrain.data.shards import Bytes, Shard
from sleeptrain.schema import ConfigError, reason_of

CHUNK_BYTES = 2**20
NUM_TRIES, FIRST_PAUSE_SECONDS = 4, 0.5
NUM_THREADS = 4
ASK_SECONDS = 0.5  # between two looks for a shard that is being made
SILENCE_SECONDS = 60  # after which a connection counts as broken
_LEFT_BEHIND_SECONDS = 3600  # a file half written for so long is nobody's

Result = TypeVar("Result")


class MissingError(ShardError):
    """There is no such file."""


def read_index(url: str) -> Index:
    """The index of the set at ``url``; ConfigError if there is none, ShardError if it is damaged."""
    where = join(url, FILE)
    try:
        data = _few_bytes(where)
    except ShardError as error:
        raise ConfigError(
            f"data.shards holds {url}, whose {FILE} cannot be read ({error}); give the folder or URL that "
            "tools/make_shards.py wrote"
        ) from error
    return parse_index(data, where)


class ShardReader:
    """Fetches the shards of one set in threads; a shard is in memory while somebody holds its future."""

    def __init__(self, url: str, index: Index, cache: "Cache | None") -> None:
        self.url, self.index, self.cache = url, index, cache
        self._running: WeakValueDictionary[int, Future[Shard]] = WeakValueDictionary()
        self._may_read = threading.Semaphore(NUM_THREADS)

    def fetch(self, shard: int) -> "Future[Shard]":
        """Begins to fetch, unless it is here. The result raises ShardError for a shard that is missing or
        damaged."""
        found = self._running.get(shard)
        if found is None:
            found = self._running[shard] = Future()
            # A thread that no exit waits for: it may be waiting itself, for a connection that is stuck.
            threading.Thread(target=self._load, args=(self.index.shards[shard], found), daemon=True).start()
        return found

    def _load(self, entry: ShardEntry, future: "Future[Shard]") -> None:
        try:
            if not entry.is_made:
                entry = await_entry(self.url, entry)
            with self._may_read:
                shard = Shard(self._bytes(entry), join(self.url, entry.name))
            if len(shard) != entry.samples:
                raise ShardError(f"{shard.name} holds {len(shard)} samples; the index says {entry.samples}")
            future.set_result(shard)
        except BaseException as error:
            future.set_exception(error)

    def _bytes(self, entry: ShardEntry) -> Bytes:
        copy = self.cache.read(entry) if self.cache else None
        if copy is not None:
            return copy
        data = read_verified(join(self.url, entry.name), entry)
        if self.cache:
            self.cache.keep(entry, data)
        return data


def await_entry(url: str, planned: ShardEntry) -> ShardEntry:
    """What there is to know of a shard as soon as it is made: from its maker, or from the index once the set
    is whole. Raises ShardError if it is another one."""
    while True:
        with suppress(MissingError):
            where = join(url, f"{MAKING}/{planned.name}.json")
            found = parse_entry(_few_bytes(where), where)
            break
        with suppress(MissingError):
            where = join(url, FILE)
            shards = parse_index(_few_bytes(where), where).shards
            found = next((shard for shard in shards if shard.name == planned.name), planned)
            break
        time.sleep(ASK_SECONDS)
    if (found.name, found.samples) != planned[:2] or not found.is_made:
        raise ShardError(
            f"{where} tells of another shard than {planned.name} with {planned.samples} samples; give the "
            "producers a folder of their own in data.shards"
        )
    return found


def _few_bytes(url: str) -> bytes:
    data, _ = _with_patience(url, lambda: _read_at_most(url, MAX_INDEX_BYTES + 1))
    return data.tobytes()


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

    def read(self, entry: ShardEntry) -> Bytes | None:
        """The copy of a shard, if there is one and it is whole; counts as a use of it."""
        path = self._path(entry)
        with suppress(OSError, ShardError):
            os.utime(path)
            return _read(str(path), entry)
        return None

    def keep(self, entry: ShardEntry, data: Bytes) -> None:
        """A full disk is no error here: the next reading fetches again."""
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        with suppress(OSError):
            if self._make_room(entry.bytes):
                try:
                    temporary.write_bytes(data.data)
                    temporary.replace(self._path(entry))
                finally:
                    temporary.unlink(missing_ok=True)

    def _path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.tar"

    def _make_room(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes, after the copies unused for longest are gone."""
        left = self.max_bytes - num_bytes
        copies: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process was faster
                found = path.stat()
                if path.suffix == ".tar":
                    copies.append((found.st_mtime, found.st_size, path))
                elif path.suffix == ".tmp" and time.time() - found.st_mtime > _LEFT_BEHIND_SECONDS:
                    path.unlink()
        for _, size, path in sorted(copies, reverse=True) if num_bytes <= self.max_bytes else []:
            left -= size
            if left < 0:
                path.unlink(missing_ok=True)
        return num_bytes <= self.max_bytes


def read_verified(url: str, entry: ShardEntry) -> Bytes:
    """All bytes of a shard, equal to those that the index knows; else ShardError."""
    return _with_patience(url, lambda: _read(url, entry))


def _with_patience(url: str, read: Callable[[], Result]) -> Result:
    """What ``read`` returns; what fails is tried again, but for a file that is missing, or damaged on this
    machine."""
    pause_seconds = FIRST_PAUSE_SECONDS
    for tries_left in reversed(range(NUM_TRIES)):
        try:
            return read()
        except FileNotFoundError as error:
            raise MissingError(f"{url} is missing") from error
        except ShardError:
            if not tries_left or _is_path(url):
                raise
        except Exception as error:  # every backend of fsspec has errors of its own
            if not tries_left:
                raise ShardError(f"{url} cannot be read ({reason_of(error)})") from error
        time.sleep(pause_seconds)
        pause_seconds *= 2
    raise AssertionError("not reached")


def _read(url: str, entry: ShardEntry) -> Bytes:
    data, sha256 = _read_at_most(url, entry.bytes + 1)
    if len(data) < entry.bytes:
        raise ShardError(f"{url} is truncated: {len(data)} of {entry.bytes} bytes are there")
    if len(data) > entry.bytes:
        raise ShardError(f"{url} is longer than the {entry.bytes} bytes that the index knows")
    if sha256 != entry.sha256:
        raise ShardError(f"{url} is damaged: its SHA-256 differs from the one in the index")
    return data


def _read_at_most(url: str, num_bytes: int) -> tuple[Bytes, str]:
    """The bytes and their SHA-256, found as they arrive; takes no more memory than there are bytes."""
    data, done, found = np.empty(num_bytes, dtype=np.uint8), 0, hashlib.sha256()
    view = data.data
    with open_url(url) as file:
        while done < num_bytes and (size := file.readinto(view[done : done + CHUNK_BYTES])):
            found.update(view[done : done + size])
            done += size
    return data[:done], found.hexdigest()


def open_url(url: str) -> AbstractContextManager[Any]:
    """For reading from start to end; a path is a file of this machine."""
    if _is_path(url):
        return Path(url).open("rb", buffering=0)
    from fsspec.core import url_to_fs

    if urlsplit(url).scheme not in ("http", "https"):
        files, path = url_to_fs(url)
        return files.open(path, "rb", block_size=8 * CHUNK_BYTES)
    import aiohttp

    # One request, as a stream: what is asked for in blocks, or compressed, may come back of any size at once.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    session = {"timeout": timeout, "auto_decompress": False}
    files, path = url_to_fs(url, client_kwargs=session, headers={"Accept-Encoding": "identity"})
    return files.open(path, "rb", block_size=0, size=1)  # any size: it spares the question for it


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _is_path(url: str) -> bool:
    return "://" not in url
