"""Makes sets of shards, in any number of processes and after any interruption the same bytes.

A shard depends on the plan and its number alone. Files appear whole and index.json last; until then the
folder ``.making`` knows the plan and which shards are there. A set that was made otherwise is never touched.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
from fsspec.core import url_to_fs

from sleeptrain.data.fetch import join, read_verified
from sleeptrain.data.index import FILE, MAKING, Index, ShardEntry, ShardError, parse_index
from sleeptrain.data.shard_plan import Plan, Sample, describe
from sleeptrain.data.shards import write_shard
from sleeptrain.schema import ConfigError, RunError, flatten, reason_of

PLAN = f"{MAKING}/plan.json"


class Folder:
    """Where the set goes, here or behind a URL. Files appear whole or not at all; what cannot be done raises
    RunError."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self._saying("be used"):
            self.files, self.path = url_to_fs(url)

    def read(self, name: str) -> bytes | None:
        """None if there is no such file."""
        with self._saying("be read"), suppress(FileNotFoundError):
            return self.files.cat_file(join(self.path, name))
        return None

    def write(self, name: str, data: bytes) -> None:
        temporary = join(self.path, f"{MAKING}/{uuid.uuid4().hex}.tmp")
        with self._saying("be written"):
            self.files.makedirs(join(self.path, MAKING), exist_ok=True)
            self.files.pipe_file(temporary, data)
            self.files.mv(temporary, join(self.path, name))

    def finished(self) -> Iterator[ShardEntry]:
        """The shards that are there although there is no index yet."""
        with self._saying("be read"):
            for path in self.files.ls(join(self.path, MAKING), detail=False):
                if path.endswith(".tar.json"):
                    yield ShardEntry(**json.loads(self.files.cat_file(path)))

    def forget_making(self) -> None:
        with self._saying("be written"), suppress(FileNotFoundError):
            self.files.rm(join(self.path, MAKING), recursive=True)

    @contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every backend of fsspec has errors of its own
            raise RunError(
                f"{self.url} cannot {what} ({reason_of(error)}); when it can, the same command goes on"
            ) from error


def claim(plan: Plan, folder: Folder) -> tuple[Plan, dict[str, ShardEntry]]:
    """The plan with the code version that began it, and the shards that were there before, by name. Raises
    ConfigError if the folder is that of another set."""
    known: Sequence[ShardEntry]
    if (found := folder.read(FILE)) is not None:
        index = parse_index(found, join(plan.url, FILE))
        there, known = describe(index, index.num_samples, len(index.shards)), index.shards
    elif (found := folder.read(PLAN)) is not None:
        there, known = json.loads(found), list(folder.finished())
    else:
        folder.write(PLAN, json.dumps(plan.describe(), indent=2).encode())
        return plan, {}
    a, b = flatten(there), flatten(plan.describe())
    names = [name for name in sorted(a | b) if a.get(name) != b.get(name) and name != "code_version"]
    if names:
        differing = ", ".join(f"{name} is {a.get(name)} there and {b.get(name)} here" for name in names)
        raise ConfigError(
            f"{plan.url} holds another set of shards: {differing}; give another folder, or remove it"
        )
    head = replace(plan.head, code_version=there["code_version"])
    return replace(plan, head=head), {entry.name: entry for entry in known}


def finish(plan: Plan, shard: int, known: ShardEntry | None) -> tuple[ShardEntry, bool]:
    """Makes the shard unless it is there, whole. Raises RunError if it can no longer be made."""
    name, folder = plan.name(shard), Folder(plan.url)
    if known:
        with suppress(ShardError):
            read_verified(join(plan.url, name), known)
            return known, False
    data, entry = build(plan, shard)
    if known and entry != known:
        raise RunError(
            f"{join(plan.url, name)} is missing or damaged, and what is made now differs from what it was: "
            "the code has changed since; remove the set and make it again"
        )
    folder.write(name, data)
    folder.write(f"{MAKING}/{name}.json", json.dumps(entry._asdict()).encode())
    return entry, True


def build(plan: Plan, shard: int) -> tuple[bytes, ShardEntry]:
    """The bytes of a shard, and its row of the index."""
    file, places, num_tokens = io.BytesIO(), plan.places(shard), 0

    def counted() -> Iterator[Sample]:
        nonlocal num_tokens
        for meta, tokens in plan.source.samples(places):
            num_tokens += int(np.count_nonzero(tokens[0] >= 0)) if tokens.ndim == 2 else len(tokens)
            yield meta, tokens

    write_shard(file, counted(), places.start)
    data = file.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    return data, ShardEntry(plan.name(shard), len(places), num_tokens, len(data), sha256)


def complete(plan: Plan, folder: Folder, entries: Sequence[ShardEntry]) -> Index:
    """Writes the index of a set all of whose shards are there, in their order."""
    index = replace(plan.head, shards=tuple(entries))
    if folder.read(FILE) != index.to_json():
        folder.write(FILE, index.to_json())
    folder.forget_making()
    return index
