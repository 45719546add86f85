"""Random numbers without state: the j-th draw of (seed, stream, index) is a hash of its own name.

The mixer is the finaliser of splitmix64 (Steele, Lea and Flood 2014), on whole arrays, modulo 2^64.
"""

import hashlib

import numpy as np

from sleeptrain.tasks.base import Bits, Bools, Floats, Ints, Split

_GOLDEN = 0x9E3779B97F4A7C15
_SPLIT_KEY = 0x51EE97EA15EED  # never change it: it decides what is held out
_TENTHS: dict[Split, tuple[int, int]] = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}


def mix64(values: Bits) -> Bits:
    """A bijection of the 64-bit numbers that scatters neighbours; any shape."""
    values = values ^ (values >> np.uint64(30))
    values *= 0xBF58476D1CE4E5B9
    values ^= values >> np.uint64(27)
    values *= 0x94D049BB133111EB
    values ^= values >> np.uint64(31)
    return values


def random_bits(seed: int, stream: str, indices: Ints, count: int) -> Bits:
    """64 random bits, [B, count]; row b depends on ``indices[b]`` alone, draw j on nothing drawn after it.

    ``stream`` names the purpose: draws from different streams are independent.
    """
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    key = mix64(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN) + name
    rows = mix64(mix64(key) + indices.astype(np.uint64))
    return mix64(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def random_uniform(seed: int, stream: str, indices: Ints, count: int) -> Floats:
    """Even in [0, 1), [B, count]."""
    return (random_bits(seed, stream, indices, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_below(bound: int, seed: int, stream: str, indices: Ints, count: int) -> Ints:
    """Even in 0..bound-1, [B, count]; the bias is below bound / 2^64."""
    return (random_bits(seed, stream, indices, count) % bound).astype(np.int64)


def random_order(sizes: Ints, seed: int, stream: str, indices: Ints, count: int) -> Ints:
    """Row b starts with a random order of 0..sizes[b]-1 and goes on with the rest; [B, count]."""
    keys = random_bits(seed, stream, indices, count)
    keys[np.arange(count) >= sizes[:, None]] = 2**64 - 1
    return np.argsort(keys, axis=1, kind="stable")


def content_hash(*parts: int | Bits) -> Bits:
    """A keyed hash of one or more numbers, elementwise over their shape (one dimension or more)."""
    state = np.array([_SPLIT_KEY], dtype=np.uint64)
    for part in parts:
        state = mix64(state + _GOLDEN) ^ np.asarray(part, dtype=np.uint64)
    return mix64(state + _GOLDEN)


def in_split(hashes: Bits, split: Split) -> Bools:
    """Whether each content hash belongs to ``split``: 80 % train, 10 % validation, 10 % test."""
    least, end = _TENTHS[split]
    tenths = hashes % 10
    return (tenths >= least) & (tenths < end)
