"""A batch of a task depends on its step alone; one of shards on all before it, and on nothing else."""

import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from shard_sets import examples_set

from sleeptrain.config import Config, DataConfig, Rule110Config, RunConfig, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.data.mixture import open_mixture
from sleeptrain.data.stream import ORDER_BITS, TrainStream
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task


def stream(seed: int = 0, batch_sequences: int = 4) -> TrainStream:
    return TrainStream(make_task(Rule110Config()), seed, batch_sequences, 12)


def test_a_batch_depends_on_its_step_alone() -> None:
    first, second = stream(), stream()
    in_order = [first.batch(step).ids for step in range(4)]
    backward = [second.batch(step).ids for step in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(in_order, backward))
    assert len({ids.numpy().tobytes() for ids in in_order}) == 4
    assert not torch.equal(stream(seed=1).batch(0).ids, in_order[0])


def test_batches_cut_one_sequence_of_examples() -> None:
    small = [stream(batch_sequences=2).batch(step).ids for step in range(4)]
    large = [stream(batch_sequences=4).batch(step).ids for step in range(2)]
    assert torch.equal(torch.cat(small), torch.cat(large))


def test_it_reads_the_train_split() -> None:
    task = make_task(Rule110Config())
    ids = stream().batch(0).ids
    assert torch.equal(ids, torch.from_numpy(task.examples(0, torch.arange(4).numpy(), "train").ids))


def sharded(
    folder: Path, rank: int = 0, num_replicas: int = 1, num_workers: int = 0, num_streams: int = 4
) -> TrainStream:
    task = make_task(Rule110Config(width=6, num_strings=2, steps=1))
    if not folder.exists():
        examples_set(folder, task, 5, 6)
    data = DataConfig(shards=(str(folder),), batch_sequences=8, num_streams=num_streams)
    sleep = SleepConfig(window_tokens=6)
    mixture = open_mixture(Config(RunConfig(seed=3), sleep=sleep, task=task.config, data=data), task)
    return TrainStream(task, 3, 8, 6, rank, num_replicas, mixture, num_workers)


def equal(a: Batch, b: Batch) -> bool:
    tensors = ("ids", "targets", "loss_mask", "difficulty", "example_keys")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def joined(parts: list[Batch]) -> Batch:
    tensors = ("ids", "targets", "loss_mask", "difficulty", "example_keys")
    return replace(parts[0], **{name: torch.cat([getattr(p, name) for p in parts]) for name in tensors})


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_replicas_share_the_rows_of_one_stream(tmp_path: Path, num_replicas: int) -> None:
    whole = sharded(tmp_path / "set")
    parts = [sharded(tmp_path / "set", rank, num_replicas) for rank in range(num_replicas)]
    for step in range(12):
        assert equal(whole.batch(step), joined([part.batch(step) for part in parts]))
    order = sum(part.state()["order"] for part in parts) % 2**ORDER_BITS
    assert order == whole.state()["order"] != 0


def test_any_number_of_replicas_goes_on_where_another_stopped(tmp_path: Path) -> None:
    whole, step = sharded(tmp_path / "set"), 0
    states = None
    for num_replicas in (2, 1, 4, 2):
        parts = [sharded(tmp_path / "set", rank, num_replicas) for rank in range(num_replicas)]
        if states:
            for part in parts:
                part.load(states, step)
        for _ in range(4):
            assert equal(whole.batch(step), joined([part.batch(step) for part in parts]))
            step += 1
        states = [part.state() for part in parts]
    assert sum(state["order"] for state in states) % 2**ORDER_BITS == whole.state()["order"]


@pytest.mark.more  # the workers import torch
@pytest.mark.parametrize("source", ["task", "shards"])
def test_workers_only_read_ahead(tmp_path: Path, source: str) -> None:
    """Equal batches, and the state is that of the last one handed out, however far the workers are."""
    task = make_task(Rule110Config())
    if source == "task":
        alone, ahead = TrainStream(task, 3, 8, 12), TrainStream(task, 3, 8, 12, num_workers=2)
    else:
        alone, ahead = sharded(tmp_path / "set"), sharded(tmp_path / "set", num_workers=2)
    try:
        for step in range(6):
            assert equal(alone.batch(step), ahead.batch(step))
            time.sleep(0.05)  # they go ahead meanwhile
            assert ahead.state() == alone.state()
        ahead.load([ahead.state()], 6)
        assert equal(alone.batch(6), ahead.batch(6))
    finally:
        ahead.close()
        forkserver._forkserver._stop()  # a process that is forked from this one starts its own


def test_batches_of_shards_cannot_be_skipped(tmp_path: Path) -> None:
    stream = sharded(tmp_path / "set")
    stream.batch(0)
    with pytest.raises(ValueError, match="expected 1, got 5"):
        stream.batch(5)


def test_streams_that_replicas_cannot_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_streams=4 cannot be shared evenly by 8 replicas"):
        sharded(tmp_path / "set", 0, 8)
    stream = sharded(tmp_path / "set", num_streams=2)
    with pytest.raises(ConfigError, match="num_streams=2, and the checkpoint has 4; set it"):
        stream.load([sharded(tmp_path / "set").state()], 3)
