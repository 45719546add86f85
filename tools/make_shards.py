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
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import get_args

from tqdm import tqdm

from sleeptrain.data.index import ShardEntry, ShardError, require_plain_url
from sleeptrain.data.shard_maker import Folder, claim, complete, finish
from sleeptrain.data.shard_plan import Plan, Sizes, make_plan
from sleeptrain.schema import ConfigError, RunError
from sleeptrain.tasks import Split


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the set, or what is missing of it; returns the exit code."""
    options = parse(arguments)
    try:
        print(make(plan_of(options), options.num_procs))
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


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises ConfigError where the options do not fit together."""
    from sleeptrain.pretrain import compose_config  # workers start sooner without hydra

    require_plain_url(options.out, "OUT")
    if options.out.startswith("memory://") and options.num_procs > 1:
        raise ConfigError(f"OUT={options.out} is memory of one process; use --num-procs 1")
    sizes = Sizes(options.num_examples, options.shard_samples, ("--num-examples", "--shard-samples"))
    return make_plan(compose_config(options.settings), options.out, options.split, sizes)


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
    index = complete(plan, folder, entries)
    seconds = time.perf_counter() - start
    num_samples, num_bytes = (sum(getattr(e, size) for e in made) for size in ("samples", "bytes"))
    return (
        f"{plan.url}: {index.num_samples:,} samples with {index.num_tokens:,} tokens in {len(entries)} "
        f"shards, {len(entries) - len(made)} kept and {len(made)} made in {seconds:.1f} s: "
        f"{num_samples / seconds:,.0f} samples/s, {num_bytes / 1e6 / seconds:,.1f} MB/s"
    )


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
