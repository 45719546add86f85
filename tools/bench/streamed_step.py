"""What streaming costs a training step: batches from shards against the same batches ready in memory.

The quickstart model takes blocks of steps in turn on batches that lie in memory, on batches that are streamed
(shards fetched ahead by threads, rows made in the trainer's process), and on batches that a worker process
makes ahead. All sides see the same batches and end with equal weights. The ratio is streamed / in memory.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from itertools import count
from pathlib import Path

import measure
import numpy as np
import torch

from sleeptrain.config import Config, DataConfig, RunConfig
from sleeptrain.data.batch import Batch
from sleeptrain.data.index import FILE, Index, ShardEntry
from sleeptrain.data.mixture import open_mixture
from sleeptrain.data.shards import write_shard
from sleeptrain.data.stream import TrainStream
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.tasks import Task, make_task

SIDES = {"memory": "in memory", "streamed": "streamed", "worker": "streamed by a worker"}
BLOCK_STEPS, BAR = 5, 1.02


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=15).parse_args()
    measure.begin()
    report(options)


def report(options: argparse.Namespace) -> None:
    """Measures and prints; also a part of ``shards.py``."""
    config = Config(run=RunConfig(device="cpu", num_threads=1))
    if options.quick:
        config = replace(config, data=DataConfig(batch_sequences=4))
    task = make_task(config.task)
    with tempfile.TemporaryDirectory() as name:
        write_set(Path(name), task, 2 if options.quick else 20, 8 if options.quick else 500)
        config = replace(config, data=replace(config.data, shards=(name,)))
        num_batches = (options.rounds + 2) * BLOCK_STEPS
        ready = batches(config, task, num_workers=0)
        sources = {
            "memory": iter([next(ready) for _ in range(num_batches)]),
            "streamed": batches(config, task, num_workers=0),
            "worker": batches(config, task, num_workers=1),
        }
        backends = {side: LocalBackend(config, task.vocab_size) for side in SIDES}
        calls = {side: block(backends[side], sources[side], config.sleep.num_passes) for side in SIDES}
        times = measure.interleaved(calls, options.rounds)
    weights = [torch.cat([p.flatten() for p in b.model.parameters()]) for b in backends.values()]
    if not all(torch.equal(weights[0], other) for other in weights[1:]):
        sys.exit("the sides ended with other weights: they did not see the same batches")
    print(f"\nequal weights; milliseconds per step over {options.rounds} blocks of {BLOCK_STEPS}")
    rows = [
        (
            label,
            f"{1e3 * measure.median_wall(times[side]) / BLOCK_STEPS:.2f}",
            f"{1e3 * measure.least_cpu(times[side]) / BLOCK_STEPS:.2f}",
        )
        for side, label in SIDES.items()
    ]
    measure.show(("", "median", "least cpu"), rows)
    for side in ("streamed", "worker"):
        ratio = measure.ratio(times[side], times["memory"])
        print(f"ratio step {SIDES[side]} / {SIDES['memory']}: {ratio}")
        if not options.quick:
            measure.judge(f"step {SIDES[side]} / {SIDES['memory']}", ratio.wall, at_most=BAR)


def batches(config: Config, task: Task, num_workers: int) -> Iterator[Batch]:
    stream = TrainStream(
        task,
        config.run.seed,
        config.data.batch_sequences,
        config.sleep.window_tokens,
        mixture=open_mixture(config, task),
        num_workers=num_workers,
    )
    return (stream.batch(step) for step in count())


def block(backend: LocalBackend, source: Iterator[Batch], num_passes: int) -> Callable[[], None]:
    """Some training steps on the next batches."""

    def run() -> None:
        for _ in range(BLOCK_STEPS):
            loss = backend.forward_backward(next(source), num_passes).loss
            backend.step(1.0, loss)

    return run


def write_set(folder: Path, task: Task, num_shards: int, shard_samples: int) -> None:
    """The first examples of a task, as tools/make_shards.py writes them."""
    entries = []
    for number in range(num_shards):
        indices = np.arange(number * shard_samples, (number + 1) * shard_samples)
        e = task.examples(0, indices)
        tokens = np.stack([np.where(e.valid, e.ids, -1), np.where(e.loss_mask, e.targets, -1)], axis=1)
        meta = [{"difficulty": int(d), "index": int(i)} for d, i in zip(e.difficulty, indices)]
        file = BytesIO()
        write_shard(file, zip(meta, tokens.astype(np.int16)), first=int(indices[0]))
        data, name = file.getvalue(), f"set-{number:06d}.tar"
        (folder / name).write_bytes(data)
        size = (len(indices), tokens.shape[0] * tokens.shape[2], len(data), sha256(data).hexdigest())
        entries.append(ShardEntry(name, *size))
    head = ("examples", "train", task.sequence_tokens, task.vocab_size, task.fingerprint(), "", "")
    (folder / FILE).write_bytes(Index(*head, shards=tuple(entries)).to_json())


if __name__ == "__main__":
    main()
