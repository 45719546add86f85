"""The training stream is a counter: a batch depends on its step alone."""

import torch

from sleeptrain.config import Rule110Config
from sleeptrain.data.stream import TrainStream
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
