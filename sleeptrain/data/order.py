"""The order of training data, by arithmetic alone: nothing is drawn that is not named by its numbers.

A batch is made by V *logical streams*, each of which fills the same rows of every batch. The shards of a
source form an endless row of epochs, each with all shards in an order of its own; stream v takes the shards
v, v + V, v + 2V, ... of it. So no shard is lost or read twice in an epoch whatever V is, and nothing depends
on how many processes share the streams.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sleeptrain.tasks.base import Ints
from sleeptrain.tasks.counter import random_bits, random_uniform

_GOLDEN = (5**0.5 - 1) / 2


def shuffled(size: int, seed: int, purpose: str, number: int) -> Ints:
    """0..size-1 in an order of its own for each (seed, purpose, number)."""
    bits = random_bits(seed, purpose, np.array([number], dtype=np.int64), size)[0]
    return np.argsort(bits, kind="stable")


def shard_at(place: int, num_shards: int, seed: int, source: int) -> tuple[int, int]:
    """(epoch, shard) at a place of the endless row of a source."""
    epoch, within = divmod(place, num_shards)
    return epoch, int(_epoch(num_shards, seed, source, epoch)[within])


@lru_cache(maxsize=64)
def _epoch(num_shards: int, seed: int, source: int, epoch: int) -> Ints:
    return shuffled(num_shards, seed, f"shards of source {source}", epoch)


def source_at(drawn: int, stream: int, shares: Sequence[float], seed: int) -> int:
    """Which source the next sample of a stream comes from, ``drawn`` samples having come before.

    Multiples of the golden ratio modulo 1 fill [0, 1) more evenly than random numbers: in any stretch each
    source has its share of samples but for a few. ``shares`` add up to 1.
    """
    if len(shares) == 1:
        return 0
    start = random_uniform(seed, "first source", np.array([stream], dtype=np.int64), 1)[0, 0]
    point = (start + drawn * _GOLDEN) % 1.0
    return min(int(np.searchsorted(np.cumsum(shares), point, side="right")), len(shares) - 1)
