"""R12: a shard that is truncated, changed, missing or extra, as the reader of shards sees it.

What a run makes of its errors is in ``tests/data/test_rows.py``.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sets import examples_set
from tar_files import sample, tar

from sleeptrain.config import Rule110Config
from sleeptrain.data.fetch import ShardReader, read_index
from sleeptrain.data.index import ShardError
from sleeptrain.data.shards import Shard
from sleeptrain.tasks import make_task

NUM_SHARDS = 4
TASK = make_task(Rule110Config(width=6, num_strings=2, steps=1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four shards with 20 samples each, not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    examples_set(folder, TASK, NUM_SHARDS, 20)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"set-{number:06d}.tar"


def samples_read(folder: Path) -> list[list[Any] | str]:
    """Of every shard its samples, or the error."""
    reader = ShardReader(str(folder), read_index(str(folder)), cache=None)
    found: list[list[Any] | str] = []
    for number in range(NUM_SHARDS):
        try:
            shard = reader.fetch(number).result()
            found.append([(shard.meta(i), shard.tokens(i).tolist()) for i in range(len(shard))])
        except ShardError as error:
            found.append(str(error))
    return found


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(50))
def test_a_flipped_bit_is_found_before_any_sample(folder: Path, seed: int) -> None:
    """R12, in any place of any shard; the other shards are as before."""
    good = samples_read(folder)
    rng = np.random.default_rng(seed)
    number = int(rng.integers(NUM_SHARDS))
    path = shard_path(folder, number)
    flip(path, int(rng.integers(8 * path.stat().st_size)))
    found = samples_read(folder)
    assert found.pop(number) == f"{path} is damaged: its SHA-256 differs from the one in the index"
    assert found == good[:number] + good[number + 1 :]


def test_most_flipped_bits_would_pass_without_the_hash(folder: Path) -> None:
    """R12, the control: the parser alone, as any reader of tar files, takes other tokens for right."""
    path, num_passed = shard_path(folder, 0), 0
    for seed in range(50):
        data = np.fromfile(path, np.uint8)
        bit = int(np.random.default_rng(seed).integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        try:
            shard = Shard(data, "")
            num_passed += bool([(shard.meta(i), shard.tokens(i)) for i in range(len(shard))])
        except ShardError:
            pass
    assert num_passed > 10


@pytest.mark.parametrize("seed", range(10))
def test_a_truncated_shard_is_found(folder: Path, seed: int) -> None:
    """R12; whole blocks and whole samples may be missing, too."""
    rng = np.random.default_rng(seed)
    number, step = int(rng.integers(NUM_SHARDS)), int(rng.choice([1, 512, 2048, 10240]))
    path = shard_path(folder, number)
    size = int(rng.integers(path.stat().st_size // step)) * step
    path.write_bytes(path.read_bytes()[:size])
    found = samples_read(folder)
    assert (
        found[number]
        == f"{path} is truncated: {size} of {read_index(str(folder)).shards[0].bytes} bytes are there"
    )
    assert sum(type(shard) is str for shard in found) == 1


@pytest.mark.parametrize("more", [b"\0", bytes(512), bytes(10240), tar(sample())])
def test_a_shard_that_grew_is_found(folder: Path, more: bytes) -> None:
    """R12."""
    path = shard_path(folder, 2)
    path.write_bytes(path.read_bytes() + more)
    found = samples_read(folder)
    assert "set-000002.tar is longer than the" in found[2]
    assert sum(type(shard) is str for shard in found) == 1


def test_a_missing_shard_is_found(folder: Path) -> None:
    """R12."""
    good = samples_read(folder)
    shard_path(folder, 1).unlink()
    assert samples_read(folder) == [good[0], f"{shard_path(folder, 1)} is missing", *good[2:]]


def test_an_extra_shard_changes_nothing(folder: Path) -> None:
    """R12: what the index does not name is not read."""
    good = samples_read(folder)
    for name in ("set-000004.tar", "a-000000.tar", "set-000000.tar.json"):
        (folder / name).write_bytes(b"not a tar file")
    assert samples_read(folder) == good


@pytest.mark.parametrize("how", ["swapped", "repeated", "of another set"])
def test_a_whole_shard_in_the_place_of_another_is_found(folder: Path, tmp_path: Path, how: str) -> None:
    """R12: all are good tar files of the right size."""
    data = [shard_path(folder, number).read_bytes() for number in range(2)]
    examples_set(tmp_path / "other", TASK, NUM_SHARDS, 20, seed=1)
    other = shard_path(tmp_path / "other", 0).read_bytes()
    new = {"swapped": data[::-1], "repeated": [data[1], data[1]], "of another set": [other, data[1]]}[how]
    for number in range(2):
        shard_path(folder, number).write_bytes(new[number])
    found = samples_read(folder)
    assert "is damaged" in found[0]
    assert [type(shard) is str for shard in found[1:]] == [how == "swapped", False, False]
