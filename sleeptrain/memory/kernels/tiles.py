"""Sizes of the kernels' tiles: a plain table, no autotuning, so that a run repeats bit for bit."""

from typing import NamedTuple

# Of tiles of 64 key columns Triton 3.4 to 3.7.0 makes wrong gradients on Hopper, in another project's
# backward (flash-linear-attention, issue 640): gradients.py takes 32. The proof for a device is check.py.
MULTIPROCESSORS = 132  # of an H200: with fewer programs than these, a scan is split or takes narrower tiles
SEGMENT_CHUNKS = 4  # at least
MIN_SEGMENTS = 4  # that pay for the walk before
MAX_SEGMENTS = 16  # the walk over them is serial; a step of it costs about what a chunk or two do


class Tiles(NamedTuple):
    """``chunk_tokens`` is 16, 32 or 64; columns are powers of 2, at least 16; ``segments`` divides the
    tokens."""

    chunk_tokens: int
    factor_keys: int  # key columns at a time, factors.py
    scan_values: int  # value columns of a program, scan.py: it holds key_dim x scan_values floats
    gradient_keys: int  # gradients.py
    gradient_values: int
    scan_warps: int = 4
    scan_stages: int = 2  # chunks that are loaded ahead
    warps: int = 4  # of the other two kernels
    stages: int = 3
    segments: int = 1  # of a sequence, scanned side by side: split.py


def choose_tiles(
    num_tokens: int,
    num_states: int,
    key_dim: int,
    value_dim: int,
    item_bytes: int,
    max_segments: int = MAX_SEGMENTS,
) -> Tiles:
    """``num_states``: sequences x value heads; ``item_bytes``: of the type that is multiplied. Not tuned on a
    GPU yet, but test_kernels_compile.py shows that all fit."""
    if item_bytes == 4:
        longest, values, keys, stages = 32, 16 if key_dim > 128 else 32, 32, 1
    else:
        longest, values, keys, stages = 64, 32 if key_dim > 128 else 64, 64, 3
    chunk_tokens, programs = min(longest, power_of_2(num_tokens)), num_states * -(-value_dim // values)
    segments = choose_segments(num_tokens, chunk_tokens, programs, max_segments)
    if segments == 1 and programs < MULTIPROCESSORS:
        values = min(values, 32)
    return Tiles(
        chunk_tokens=chunk_tokens,
        factor_keys=min(keys, power_of_2(key_dim)),
        scan_values=min(values, power_of_2(value_dim)),
        gradient_keys=min(32, power_of_2(key_dim)),
        gradient_values=min(keys, power_of_2(value_dim)),
        scan_stages=min(2, stages),
        stages=stages,
        segments=segments,
    )


def choose_segments(num_tokens: int, chunk_tokens: int, num_programs: int, max_segments: int) -> int:
    """Parts into which to split a sequence: a power of 2 with which ``num_programs``, those of a scan that is
    not split, fill the device about once.

    A split scan takes two walks over T / P tokens where one over T would do. The first has no reads but K
    columns more, so it makes up to 1.3 times the products and twice the programs: two segments cannot pay.
    By counting (docs/performance.md), not by measuring.
    """
    segments = 1
    while (
        2 * segments <= max_segments
        and 2 * segments * num_programs <= MULTIPROCESSORS
        and 2 * segments * SEGMENT_CHUNKS * chunk_tokens <= num_tokens
        and num_tokens % (2 * segments) == 0
    ):
        segments *= 2
    return segments if segments >= MIN_SEGMENTS else 1


def power_of_2(number: int) -> int:
    """The next one, at least 16: what a tile may measure."""
    return max(16, 1 << (number - 1).bit_length())
