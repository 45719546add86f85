"""How a scan is shared out over a device: where sequences are split, in how many segments."""

import pytest
import torch

from sleeptrain.memory.kernels.check import split_cases
from sleeptrain.memory.kernels.tiles import MULTIPROCESSORS, SEGMENT_CHUNKS, Tiles, choose_tiles


def tiles(num_tokens: int, num_heads: int, num_sequences: int = 1, dim: int = 128) -> Tiles:
    return choose_tiles(num_tokens, num_sequences * num_heads, dim, dim, 2)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "segments"),
    [
        (8192, 16, 4),
        (8192, 8, 8),
        (32768, 1, 16),  # no more, since the walk over segments is serial
        (2048, 8, 8),
        (1024, 8, 4),  # segments of 4 chunks
        (512, 8, 1),
        (8191, 8, 1),  # odd
        (8196, 8, 4),  # not in eight
        (8192, 32, 1),
    ],
)
def test_one_sequence_is_split_where_heads_are_few(num_tokens: int, num_heads: int, segments: int) -> None:
    assert tiles(num_tokens, num_heads).segments == segments


def test_a_batch_is_not_split() -> None:
    assert tiles(8192, 32, num_sequences=4).segments == 1
    assert tiles(2048, 16, num_sequences=8).segments == 1


def test_what_is_not_split_takes_narrower_tiles() -> None:
    assert tiles(8191, 8).scan_values == 32
    assert tiles(8192, 8).scan_values == 64
    assert choose_tiles(8192, 8, 128, 128, 2, max_segments=1) == tiles(8192, 8)._replace(
        scan_values=32, segments=1
    )


def test_segments_are_equal_long_enough_and_fill_the_device_once() -> None:
    for num_tokens in (1, 130, 1024, 1500, 4096, 65536):
        for num_heads in (1, 2, 5, 16, 33, 200):
            for dim in (5, 64, 96, 256):
                found = tiles(num_tokens, num_heads, dim=dim)
                if found.segments > 1:
                    assert num_tokens % found.segments == 0
                    assert num_tokens // found.segments >= SEGMENT_CHUNKS * found.chunk_tokens
                    programs = num_heads * found.segments * -(-dim // found.scan_values)
                    assert programs <= MULTIPROCESSORS


def test_the_check_of_a_device_splits() -> None:
    for case in split_cases(seed=0):
        item_bytes = torch.finfo(case.dtype).bits // 8
        assert (
            choose_tiles(case.num_tokens, case.num_heads, case.key_dim, case.value_dim, item_bytes).segments
            > 1
        )
