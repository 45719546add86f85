"""Writes a set of tar shards and their index.json, from the examples of a task or from a folder of texts.

``python tools/make_shards.py OUT --num-examples 100000 experiment=depo_small task.max_hops=8`` writes the
first 100 000 training examples of that task with run.seed. ``python tools/make_shards.py OUT
experiment=text_small task.folder=FOLDER`` writes each file of the training split as a document, tokenized, in
an order shuffled by run.seed. Train on them with data.shards=[OUT]; webdataset reads them, too.

OUT is a folder, or any URL that fsspec can write. A shard depends on the settings and its number alone, so
the bytes are the same for any number of processes. Files appear whole, and index.json last. After an
interruption the same command goes on: shards that are there are compared with their hash and kept. A set that
was made with other settings is never touched.

exit code: 0 the set is whole, 1 it could not be made, 2 a setting is wrong.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import get_args

import numpy as np
from fsspec.core import url_to_fs
from shard_plan import Plan, Sample, describe, make_plan
from tqdm import tqdm

from sleeptrain.data.fetch import join, read_verified
from sleeptrain.data.index import FILE, ShardEntry, ShardError, parse_index
from sleeptrain.data.shards import write_shard
from sleeptrain.schema import ConfigError, RunError, flatten
from sleeptrain.tasks import Split

MAKING = ".making"  # in OUT until the set is whole: what it will be, which shards it has, files half written
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
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RunError(
                f"OUT={self.url} cannot {what} ({reason}); when it can, the same command goes on"
            ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the set, or what is missing of it; returns the exit code."""
    options = parse(arguments)
    try:
        print(make(make_plan(options), options.num_procs))
    except (ConfigError, RunError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s OUT [--num-examples N] [--shard-samples N] [--split SPLIT] [--num-procs N] "
        "[KEY=VALUE ...]",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    each = "samples of a shard; of documents, which are spread evenly, at most (default 2000)"
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("out", metavar="OUT", help="folder or URL of the set; each split needs its own")
    parser.add_argument("--num-examples", type=_count, metavar="N", help="how many; a text is written whole")
    parser.add_argument("--shard-samples", type=_count, default=2000, metavar="N", help=each)
    parser.add_argument("--split", choices=get_args(Split), default="train", help="(default train)")
    parser.add_argument("--num-procs", type=_count, default=cores, metavar="N", help=f"(default {cores})")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as for sleeptrain.pretrain")
    return parser.parse_intermixed_args(arguments)


def make(plan: Plan, num_procs: int) -> str:
    """Makes the shards that are not there, then the index; returns a line on what was done."""
    folder, start = Folder(plan.url), time.perf_counter()
    plan, known = claim(plan, folder)
    entries: list[ShardEntry] = []
    made: list[ShardEntry] = []
    with tqdm(total=plan.borders[-1], unit=" samples", dynamic_ncols=True, disable=None) as bar:
        for entry, is_new in finish_all(plan, known, num_procs):
            entries.append(entry)
            made += [entry] * is_new
            bar.update(entry.samples)
    index = replace(plan.head, shards=tuple(entries))
    if folder.read(FILE) != index.to_json():
        folder.write(FILE, index.to_json())
    folder.forget_making()
    seconds = time.perf_counter() - start
    num_samples, num_bytes = (sum(getattr(e, size) for e in made) for size in ("samples", "bytes"))
    return (
        f"{plan.url}: {index.num_samples:,} samples with {index.num_tokens:,} tokens in {len(entries)} "
        f"shards, {len(entries) - len(made)} kept and {len(made)} made in {seconds:.1f} s: "
        f"{num_samples / seconds:,.0f} samples/s, {num_bytes / 1e6 / seconds:,.1f} MB/s"
    )


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
            f"OUT={plan.url} holds another set of shards: {differing}; give another folder, or remove it"
        )
    head = replace(plan.head, code_version=there["code_version"])
    return replace(plan, head=head), {entry.name: entry for entry in known}


def finish_all(plan: Plan, known: dict[str, ShardEntry], num_procs: int) -> Iterator[tuple[ShardEntry, bool]]:
    """All shards in order, and of each whether it is new."""
    work = [(shard, known.get(plan.name(shard))) for shard in range(plan.num_shards)]
    if num_procs == 1:
        yield from (finish(plan, *item) for item in work)
        return
    context = multiprocessing.get_context("spawn")  # fsspec may have threads by now, which a fork loses
    pool = ProcessPoolExecutor(min(num_procs, len(work)), context, _begin_worker, (plan,))
    try:
        with _no_interrupts():
            results = pool.map(_work, work)
        yield from results
    except BrokenProcessPool as error:
        raise RunError(
            "a process was killed, perhaps for want of memory; the same command goes on, with a lower "
            "--num-procs if it happens again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """A Ctrl-C comes afterwards; a process started meanwhile never hears of one: its parent decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_plan: Plan  # of a worker, which gets it once


def _begin_worker(plan: Plan) -> None:
    global _plan
    _plan = plan
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Or else workers would wait for work for ever after a SIGKILL."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _work(item: tuple[int, ShardEntry | None]) -> tuple[ShardEntry, bool]:
    return finish(_plan, *item)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
