"""Shards arrive whole from wherever they are, or not at all; copies of them stay within their bounds."""

import contextlib
import gzip
import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import web_server
from shard_sets import examples_set
from web_server import Server, broken, damaged, endless, instead, refused, serving, silent

from sleeptrain.config import Rule110Config
from sleeptrain.data import fetch
from sleeptrain.data.fetch import Cache, ShardReader, read_index, read_verified
from sleeptrain.data.index import FILE, Index, ShardEntry, ShardError
from sleeptrain.data.shards import Shard
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

NUM_SHARDS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four shards, not to be changed."""
    path = tmp_path_factory.mktemp("sets") / "set"
    examples_set(path, make_task(Rule110Config(width=6, num_strings=2, steps=1)), NUM_SHARDS, 50)
    return path


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket/set"
    files.rm("/bucket", recursive=True)


def bytes_of(shard: Shard) -> list[bytes]:
    return [bytes(part) for sample in range(len(shard)) for part in shard.members(sample)]


def assert_reads(url: str, folder: Path) -> None:
    index = read_index(url)
    reader = ShardReader(url, index, cache=None)
    futures = [reader.fetch(number) for number in range(NUM_SHARDS)]
    for entry, future in zip(index.shards, futures):
        expected = Shard(np.fromfile(folder / entry.name, np.uint8), "")
        assert bytes_of(future.result()) == bytes_of(expected)


def test_a_set_is_read_from_anywhere(folder: Path, server: Server, in_memory: str) -> None:
    for url in (str(folder), f"{folder}/", f"file://{folder}", in_memory, server.url, f"{server.url}/"):
        assert_reads(url, folder)
    assert server.asked == dict.fromkeys([path.name for path in folder.iterdir()], 2)


@pytest.mark.parametrize("number_of_bytes", [0, 1, 511, fetch.CHUNK_BYTES, 3 * fetch.CHUNK_BYTES + 7])
def test_bytes_of_any_number_arrive(tmp_path: Path, number_of_bytes: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, number_of_bytes).astype(np.uint8).tobytes()
    (tmp_path / "x").write_bytes(data)
    entry = ShardEntry("x", 1, 1, len(data), hashlib.sha256(data).hexdigest())
    with serving(tmp_path) as server:
        for url in (str(tmp_path), f"file://{tmp_path}", server.url):
            assert read_verified(f"{url}/x", entry).tobytes() == data


@pytest.mark.parametrize("says_length", [True, False])
def test_a_connection_that_breaks_twice_is_tried_again(
    server: Server, folder: Path, says_length: bool
) -> None:
    for name in (FILE, "set-000001.tar"):
        server.answers[name] = broken(2, says_length or name == FILE)
    assert_reads(server.url, folder)
    assert (server.asked[FILE], server.asked["set-000001.tar"], server.asked["set-000002.tar"]) == (3, 3, 1)


@pytest.mark.parametrize("answer", [broken(99), broken(99, says_length=False), refused, damaged(99)])
def test_a_connection_that_always_breaks_is_an_error(server: Server, answer: web_server.Answer) -> None:
    server.answers["set-000001.tar"] = answer
    reader = ShardReader(server.url, read_index(server.url), cache=None)
    bad, good = reader.fetch(1), reader.fetch(0)
    with pytest.raises(
        ShardError, match=rf"{server.url}/set-000001.tar (cannot be read|is truncated|is damaged)"
    ):
        bad.result()
    assert len(good.result()) == 50
    assert server.asked["set-000001.tar"] == fetch.NUM_TRIES


def test_damage_on_the_way_is_tried_again(server: Server, folder: Path) -> None:
    server.answers["set-000000.tar"] = damaged(2)
    entry = read_index(server.url).shards[0]
    assert read_verified(f"{server.url}/{entry.name}", entry).tobytes() == (folder / entry.name).read_bytes()
    assert server.asked[entry.name] == 3


def test_damage_on_this_machine_is_final(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.time, "sleep", lambda _: pytest.fail("tried again"))
    entry = read_index(str(folder)).shards[0]
    damage(folder / entry.name, tmp_path / entry.name)
    with pytest.raises(ShardError, match="is damaged"):
        read_verified(f"{tmp_path}/{entry.name}", entry)


def damage(source: Path, target: Path) -> None:
    data = bytearray(source.read_bytes())
    data[700] ^= 1
    target.write_bytes(data)


def test_nothing_listens(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.shards holds http://127.0.0.1:9, whose index.json cannot be read"
    ):
        read_index("http://127.0.0.1:9")


@pytest.mark.parametrize("scheme", ["path", "file", "memory", "http", "unknown"])
def test_a_set_that_is_not_there_is_a_wrong_setting(scheme: str, server: Server, tmp_path: Path) -> None:
    urls = {
        "path": f"{tmp_path}/no",
        "file": f"file://{tmp_path}/no",
        "memory": "memory://no",
        "http": f"{server.url}/no",
        "unknown": "nowhere://no",
    }
    with pytest.raises(ConfigError) as refusal:
        read_index(urls[scheme])
    assert urls[scheme] in str(refusal.value)
    assert "tools/make_shards.py" in str(refusal.value)
    assert server.asked.total() == (scheme == "http")  # missing is missing: asked for once


def test_a_shard_that_is_missing_names_itself(
    folder: Path, server: Server, in_memory: str, tmp_path: Path
) -> None:
    index = read_index(str(folder))
    (tmp_path / "empty").mkdir()
    with serving(tmp_path / "empty") as empty:
        for url in (str(tmp_path), f"file://{tmp_path}", "memory://bucket", empty.url):
            with pytest.raises(ShardError, match=rf"{url}/set-000002.tar is missing"):
                ShardReader(url, index, cache=None).fetch(2).result()
        assert empty.asked.total() == 1


def test_a_shard_stays_while_somebody_holds_it(folder: Path) -> None:
    reader = ShardReader(str(folder), read_index(str(folder)), cache=None)
    first = reader.fetch(0)
    assert reader.fetch(0) is first
    assert first.result() is reader.fetch(0).result()
    del first
    wait_until(
        lambda: not len(reader._running)
    )  # its thread lets go of it a moment after the result is there


def test_few_shards_are_read_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "NUM_THREADS", 2)
    index = read_index(server.url)
    server.answers |= {entry.name: silent for entry in index.shards}
    reader = ShardReader(server.url, index, cache=None)
    futures = [reader.fetch(number) for number in range(NUM_SHARDS)]
    wait_until(lambda: server.asked.total() == 3)  # the index and two shards
    time.sleep(0.2)
    assert server.asked.total() == 3
    assert not any(future.done() for future in futures)


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_true():
            return
        time.sleep(0.01)
    pytest.fail("it did not come true")


def test_an_exit_does_not_wait_for_a_connection_that_is_stuck(server: Server) -> None:
    server.answers["set-000000.tar"] = silent
    script = f"""
from sleeptrain.data.fetch import ShardReader, read_index
future = ShardReader({server.url!r}, read_index({server.url!r}), None).fetch(0)
input()
print("over")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: server.asked["set-000000.tar"] == 1)
    output, _ = process.communicate("\n", timeout=fetch.SILENCE_SECONDS / 2)
    assert output == "over\n"
    assert process.returncode == 0


def test_compressed_answers_are_not_unpacked(server: Server, folder: Path) -> None:
    """A server that compresses although it was asked not to."""
    data = (folder / "set-000000.tar").read_bytes()
    server.answers["set-000000.tar"] = instead(gzip.compress(data), Content_Encoding="gzip")
    with pytest.raises(ShardError, match="is truncated"):
        ShardReader(server.url, read_index(server.url), cache=None).fetch(0).result()


def test_more_bytes_than_the_index_knows_are_not_read(server: Server) -> None:
    server.answers["set-000000.tar"] = endless
    with pytest.raises(ShardError, match="is longer than the"):
        ShardReader(server.url, read_index(server.url), cache=None).fetch(0).result()


def test_a_shard_with_another_number_of_samples_is_refused(folder: Path) -> None:
    index = read_index(str(folder))
    shards = (index.shards[0]._replace(samples=49), *index.shards[1:])
    reader = ShardReader(str(folder), replace(index, shards=shards), cache=None)
    with pytest.raises(ShardError, match=r"set-000000.tar holds 50 samples; the index says 49"):
        reader.fetch(0).result()


def test_importing_it_brings_no_heavy_library() -> None:
    heavy = {"fsspec", "aiohttp", "webdataset", "torch", "hydra"}
    script = "import sys, sleeptrain.data.fetch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert heavy & set(done.stdout.split()) == set()


def in_cache(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def read_all(url: str, index: Index, cache: Cache, order: Sequence[int]) -> None:
    """One after the other, and each with the right samples."""
    for number in order:
        shard = ShardReader(url, index, cache).fetch(number).result()
        assert [shard.meta(i)["index"] for i in range(50)] == list(range(50 * number, 50 * number + 50))


def test_what_is_in_the_cache_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    index = read_index(server.url)
    read_all(server.url, index, Cache(tmp_path / "a" / "cache", 10**9), [0, 1, 2, 3, 3, 2, 1, 0])
    assert server.asked.total() == 1 + NUM_SHARDS
    assert in_cache(tmp_path / "a" / "cache") == {f"{e.sha256}.tar": e.bytes for e in index.shards}


def test_the_cache_stays_below_its_size_and_keeps_what_was_used_last(server: Server, tmp_path: Path) -> None:
    index = read_index(server.url)
    cache = Cache(tmp_path, 2 * index.shards[0].bytes)
    for number in (0, 1, 0, 2):  # 2 takes the place of 1
        read_all(server.url, index, cache, [number])
        assert sum(in_cache(tmp_path).values()) <= cache.max_bytes
        time.sleep(0.02)  # the clock of the file system ticks
    assert in_cache(tmp_path).keys() == {f"{index.shards[number].sha256}.tar" for number in (0, 2)}


def test_what_is_larger_than_the_cache_takes_no_place_in_it(server: Server, tmp_path: Path) -> None:
    index = read_index(server.url)
    read_all(server.url, index, Cache(tmp_path, index.shards[0].bytes), [0])
    read_all(server.url, index, Cache(tmp_path, index.shards[0].bytes - 1), [1])
    assert in_cache(tmp_path).keys() == {f"{index.shards[0].sha256}.tar"}


@pytest.mark.parametrize("change", ["flipped", "truncated", "longer", "empty"])
def test_a_copy_gone_bad_is_fetched_again(server: Server, folder: Path, tmp_path: Path, change: str) -> None:
    index, cache = read_index(server.url), Cache(tmp_path, 10**9)
    read_all(server.url, index, cache, [0])
    copy, data = tmp_path / f"{index.shards[0].sha256}.tar", (folder / "set-000000.tar").read_bytes()
    if change == "flipped":
        damage(folder / "set-000000.tar", copy)
    else:
        copy.write_bytes({"truncated": data[:5000], "longer": data + b"x", "empty": b""}[change])
    read_all(server.url, index, cache, [0, 0])
    assert server.asked["set-000000.tar"] == 2
    assert copy.read_bytes() == data


def test_files_left_half_written_are_removed_when_they_are_old(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".old.tmp").write_bytes(b"x")
    (tmp_path / ".new.tmp").write_bytes(b"x")
    os.utime(tmp_path / ".old.tmp", (0, 0))
    read_all(server.url, read_index(server.url), Cache(tmp_path, 10**9), [0])
    assert (tmp_path / ".new.tmp").exists()
    assert not (tmp_path / ".old.tmp").exists()


def test_a_full_disk_is_no_error(server: Server, tmp_path: Path) -> None:
    """No file may grow beyond 5000 bytes, in a child: the next reading fetches again."""
    index = read_index(server.url)
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            read_all(server.url, index, Cache(tmp_path, 10**9), [0, 1, 0])
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (server.asked["set-000000.tar"], server.asked["set-000001.tar"]) == (2, 1)
    assert in_cache(tmp_path) == {}


def test_a_cache_that_cannot_be_a_folder_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*/file/cache cannot be made a folder"):
        Cache(tmp_path / "file" / "cache", 1)


def test_processes_share_a_cache(folder: Path, tmp_path: Path) -> None:
    """Four of them, with room for two of four shards: each reads the right bytes, and little is left over."""
    size = read_index(str(folder)).shards[0].bytes
    script = f"""
import numpy as np, sys
from pathlib import Path
from sleeptrain.data.fetch import Cache, ShardReader, read_index
index = read_index({str(folder)!r})
cache = Cache(Path({str(tmp_path)!r}), {2 * size})
for number in np.random.default_rng(int(sys.argv[1])).integers(0, {NUM_SHARDS}, 200).tolist():
    shard = ShardReader({str(folder)!r}, index, cache).fetch(number).result()
    assert [shard.meta(i)["index"] for i in range(50)] == list(range(50 * number, 50 * number + 50))
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(seed)]) for seed in range(4)]
    assert [process.wait(120) for process in processes] == [0, 0, 0, 0]
    left = in_cache(tmp_path)
    assert 0 < sum(left.values()) <= 5 * size  # each may have made room before another wrote
    assert all(name.endswith(".tar") for name in left)
