"""What is written is what every reader of tar files finds; what is not such a file is refused."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tar_files
from tar_files import base_256, member, npy, sample, tar
from webdataset import TarWriter, WebDataset

from sleeptrain.data.index import ShardError
from sleeptrain.data.shards import Shard, Tokens, write_shard

Samples = list[tuple[dict[str, Any], Tokens]]


def random_samples(seed: int, num_samples: int) -> Samples:
    """Examples and documents of all types and sizes, some of them empty."""
    rng = np.random.default_rng(seed)
    samples: Samples = []
    for i in range(num_samples):
        dtype = rng.choice([np.int16, np.uint16, np.int32, np.uint32])
        size = int(rng.integers(0, 700))
        shape = (2, size) if rng.integers(2) else (size,)
        tokens = rng.integers(0, 2**15, shape).astype(dtype)
        name = "ünïcode/" + "x" * int(rng.integers(0, 600))
        samples.append(({"name": name, "num_bytes": i} if len(shape) == 1 else {"index": i}, tokens))
    return samples


def written(samples: Samples, first: int = 0) -> bytes:
    file = io.BytesIO()
    write_shard(file, samples, first)
    return file.getvalue()


def shard(data: bytes) -> Shard:
    return Shard(np.frombuffer(data, np.uint8), "x-000000.tar")


def assert_holds(found: Shard, samples: Samples) -> None:
    assert len(found) == len(samples)
    for i, (meta, tokens) in enumerate(samples):
        assert found.meta(i) == meta
        assert found.tokens(i).dtype == tokens.dtype
        assert np.array_equal(found.tokens(i), tokens)
        assert found.tokens(i).shape == tokens.shape


@pytest.mark.parametrize("seed", range(5))
def test_samples_are_read_back_as_they_were_written(seed: int) -> None:
    samples = random_samples(seed, 40)
    found = shard(written(samples, first=1000 * seed))
    assert_holds(found, samples)
    assert found.keys == [f"{1000 * seed + i:09d}" for i in range(40)]


@pytest.mark.parametrize("seed", range(5))
def test_tarfile_finds_the_same_bytes(seed: int) -> None:
    data = written(random_samples(seed, 20))
    found = shard(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar_file:
        members = tar_file.getmembers()
        assert all(m.isreg() and m.mode == 0o444 and m.mtime == 0 for m in members)
        bytes_of = {m.name: tar_file.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    expected = {}
    for i, key in enumerate(found.keys):
        meta, tokens = found.members(i)
        expected |= {f"{key}.json": bytes(meta), f"{key}.tokens.npy": bytes(tokens)}
    assert bytes_of == expected
    assert list(bytes_of) == list(expected)


def test_webdataset_decodes_the_same_samples(tmp_path: Path) -> None:
    """Several shards, read as its users read them."""
    all_samples = [random_samples(seed, 15) for seed in range(3)]
    paths = [tmp_path / f"x-{i:06d}.tar" for i in range(3)]
    for i, (path, samples) in enumerate(zip(paths, all_samples)):
        path.write_bytes(written(samples, first=15 * i))
    found = list(WebDataset([str(path) for path in paths], shardshuffle=False).decode())
    assert [f["__key__"] for f in found] == [f"{i:09d}" for i in range(45)]
    for f, (meta, tokens) in zip(found, (s for samples in all_samples for s in samples)):
        assert f["json"] == meta
        assert f["tokens.npy"].dtype == tokens.dtype
        assert np.array_equal(f["tokens.npy"], tokens)


@pytest.mark.parametrize("writer", ["webdataset", "tarfile"])
def test_other_writers_of_plain_tar_files_are_read(writer: str) -> None:
    samples, file = random_samples(0, 20), io.BytesIO()
    members = {}
    for i, (meta, tokens) in enumerate(samples):
        array = io.BytesIO()
        np.save(array, tokens)
        members[f"{i:09d}"] = {"json": json.dumps(meta).encode(), "tokens.npy": array.getvalue()}
    if writer == "webdataset":
        with TarWriter(file, encoder=False, mtime=0) as shards:
            for key, parts in members.items():
                shards.write({"__key__": key, **parts})
    else:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar_file:
            for key, parts in members.items():
                for suffix, data in parts.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.uname, info.mtime = len(data), "somebody", 1_700_000_000
                    tar_file.addfile(info, io.BytesIO(data))
    assert_holds(shard(file.getvalue()), samples)


@pytest.mark.parametrize("shape", [(0,), (7,), (123456,), (2, 0), (2, 9), (2, 1234567)])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16, np.uint32])
def test_arrays_have_the_bytes_of_numpy(shape: tuple[int, ...], dtype: type[np.integer]) -> None:
    tokens, file = np.ones(shape, dtype), io.BytesIO()
    np.save(file, tokens)
    assert bytes(shard(written([({}, tokens)])).members(0)[1]) == file.getvalue()


def test_equal_samples_make_equal_bytes() -> None:
    first, second = (written(random_samples(3, 10), first=7) for _ in range(2))
    assert first == second
    assert len(first) % 10240 == 0


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(3), np.zeros((1, 2, 3), np.int16), np.zeros(3, np.int64), np.zeros(3, object), np.int16(4)],
)
def test_only_tokens_are_written(tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"are no integers \[n\] or \[2, n\]"):
        written([({}, tokens)])


def test_tokens_are_a_view_that_cannot_be_changed() -> None:
    data = np.frombuffer(written([({}, np.arange(5, dtype=np.int16))]), np.uint8).copy()
    tokens = Shard(data, "x").tokens(0)
    assert np.shares_memory(tokens, data)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 9


@pytest.mark.parametrize("inner_size", [0, 100, 512, 8**11 - 1])
def test_a_header_inside_of_a_member_is_data(inner_size: int) -> None:
    """A document about tar files: its blocks look like headers, with any size."""
    inside = tar_files.header(b"000000009.json", inner_size)
    text = bytes(384) + inside * 3  # the first 128 bytes of the block are the header of the .npy
    samples = [({"index": i}, np.frombuffer(text, "<u2")) for i in range(3)]
    data = written(samples)
    assert np.frombuffer(data, np.uint8).reshape(-1, 512)[:, 257:262].tobytes().count(b"ustar") == 3 * 2 + 9
    assert_holds(shard(data), samples)


def good() -> list[bytes]:
    return [part for key in range(3) for part in sample(key)]


def test_the_tar_files_of_these_tests_are_good_but_for_what_they_change() -> None:
    found = shard(tar(good()))
    assert found.keys == ["000000000", "000000001", "000000002"]
    assert found.meta(2) == {"difficulty": 1, "index": 2}
    assert found.tokens(1).tolist() == np.arange(12).reshape(2, 6).tolist()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no tar file"),
        (bytes(100), "multiple of 512"),
        (bytes(10240), "block 0 is no header"),
        (b"x" * 10240, "block 0 is no header"),
        (bytes(512) + tar(good()), "block 0 is no header"),
        (tar(good())[512:], "block 0 is no header"),
        (tar(good()[:1]), "1 members"),
        (tar(good()[:5]), "5 members"),
        (b"".join(good())[:-512], "larger than the file"),
        (b"".join(good()) + b"y" * 512, "block 12 is no header"),
        (tar(good()) + bytes(511) + b"y", "block 12 is no header|block 20 is no header"),
    ],
)
def test_what_is_no_plain_tar_file_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ShardError, match=rf"x-000000.tar .*({reason})"):
        shard(data)


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(51200)])
def test_the_zeros_at_the_end_may_be_many_or_none(end: bytes) -> None:
    assert len(shard(b"".join(good()) + end)) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": b"1", "link": b"/etc/passwd"}, "no plain file"),
        ({"type": b"2", "link": b"/etc/passwd"}, "no plain file"),
        ({"type": b"3"}, "no plain file"),
        ({"type": b"4"}, "no plain file"),
        ({"type": b"5"}, "no plain file"),
        ({"type": b"6"}, "no plain file"),
        ({"type": b"7"}, "no plain file"),
        ({"type": b"L"}, "no plain file"),
        ({"type": b"K"}, "no plain file"),
        ({"type": b"S"}, "no plain file"),
        ({"type": b"g"}, "no plain file"),
        ({"type": b"x"}, "no plain file"),
        ({"type": b"\0"}, "no plain file"),
        ({"prefix": b".."}, "no plain file"),
        ({"magic": b"ustar  \0"}, "no header"),  # GNU's
        ({"magic": bytes(8)}, "no header"),
        ({"size": base_256(2**40)}, "no size"),
        ({"size": base_256(36)}, "no size"),
        ({"size": b"\xff" * 12}, "no size"),  # -1 of GNU
        ({"size": b"-0000000044\0"}, "no size"),
        ({"size": b"0000000004x\0"}, "no size"),
        ({"size": b"000000000044"}, "no size"),
        ({"size": b"        44 \0"}, "no size"),
        ({"size": 8**11 - 1}, "larger than the file"),
        ({"size": 10**6}, "larger than the file"),
    ],
)
def test_every_member_must_be_a_plain_file(change: dict, reason: str) -> None:
    for place in range(6):
        parts = good()
        name, data = parts[place][:100].rstrip(b"\0"), parts[place][512:]
        parts[place] = member(name, data, **({"size": 36} | change))
        with pytest.raises(ShardError, match=reason):
            shard(tar(parts))


@pytest.mark.parametrize("place", range(5))
def test_a_size_that_ends_amid_another_member_is_refused(place: int) -> None:
    parts = good()
    parts[place] = tar_files.header(parts[place][:100].rstrip(b"\0"), 600) + parts[place][512:]
    with pytest.raises(ShardError, match="is no header of a member"):
        shard(tar(parts))


@pytest.mark.parametrize(
    "name",
    [
        b"../000000001.json",
        b"/000000001.json",
        b"/tmp/canary",
        b"000000001.pickle",
        b"000000001.pyd",
        b"000000001.json\0.npy",
        b"000000001.json ",
        b"000000001.JSON",
        b"000000001",
        b"00000001.json",
        b"0000000001.json",
        b"00000000a.json",
        b"-00000001.json",
        b".json",
        b"",
        b"\xff" * 100,
        b"000000009.json",
        b"000000007.tokens.npy",
    ],
)
def test_every_name_must_be_the_next(name: bytes) -> None:
    for place in range(6):
        parts = good()
        parts[place] = member(name, parts[place][512:])
        with pytest.raises(ShardError, match="where a sample of the next number is expected"):
            shard(tar(parts))


@pytest.mark.parametrize("keys", [(0, 0), (1, 0), (0, 1, 1), (5, 7, 6), (0, 1, 0)])
def test_numbers_ascend_so_that_none_comes_twice(keys: tuple[int, ...]) -> None:
    with pytest.raises(ShardError, match="next number"):
        shard(tar(part for key in keys for part in sample(key)))


def test_numbers_may_have_gaps() -> None:
    assert shard(tar(part for key in (3, 5, 999999999) for part in sample(key))).keys[-1] == "999999999"


@pytest.mark.parametrize(
    "array",
    [
        b"",
        npy()[:100],
        npy(data=bytes(22)),
        npy(data=bytes(26)),
        npy("(2, 7)"),
        npy("(9999999999, 9999999999)"),
        npy("(99999999999,)"),
        npy("(-1,)"),
        npy("(12)"),
        npy("()"),
        npy("(1, 2, 6)"),
        npy("(12, )"),
        npy("(1_2,)"),
        npy("(12,) + (__import__('os').abort(),)"),
        npy(order="True"),
        npy(descr="'|O'"),
        npy(descr="'<f2'"),
        npy(descr="'>i2'"),
        npy(descr="'|i1'", data=bytes(12)),
        npy(descr="'<i8'", data=bytes(96)),
        npy(descr="[('a', '<i2')]"),
        npy().replace(b"NUMPY\x01", b"NUMPY\x02"),
        npy().replace(b"\x93", b"\x92"),
        npy().replace(b"\x76\x00", b"\xff\xff"),
        npy().replace(b"'descr'", b"'DESCR'"),
        b"PK\x03\x04" + bytes(148),
    ],
)
def test_what_is_no_array_of_integers_is_refused(array: bytes) -> None:
    found = shard(tar(sample(0) + sample(1, tokens=array)))
    assert found.tokens(0).shape == (2, 6)
    with pytest.raises(ShardError, match=r"x-000000.tar: the .npy of 000000001 is no plain array"):
        found.tokens(1)


@pytest.mark.parametrize(
    "meta",
    [
        b" ",
        b"[]",
        b"3",
        b"null",
        b"{",
        b"{} {}",
        b"\xff",
        b"[" * 60000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 9223372036854775808}',
        b'{"a": NaN}',
        b'{"a": 0.5}',
        b'{"a": true}',
        b'{"a": null}',
        b'{"a": {}}',
        b'{"a": [1]}',
        b'{"a": "' + b"x" * 2**16 + b'"}',
    ],
)
def test_what_is_no_plain_object_is_refused(meta: bytes) -> None:
    found = shard(tar(sample(0) + sample(1, meta=meta)))
    assert found.meta(0) == {"difficulty": 1, "index": 0}
    with pytest.raises(ShardError, match=r"x-000000.tar: the .json of 000000001 is no object"):
        found.meta(1)
