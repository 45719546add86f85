"""R13: hostile shards, indexes, servers and URLs.

They are read in a child, which tells the error and the memory that it took beyond what it had.
"""

import gzip
import json
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tar_files import base_256, header, member, npy, sample, tar
from web_server import Answer, broken, endless, instead, serving

from sleeptrain.data import fetch
from sleeptrain.data.fetch import ShardReader, read_index
from sleeptrain.data.index import FILE, MAX_INDEX_BYTES, MAX_SHARD_BYTES, Index, ShardEntry, ShardError
from sleeptrain.pretrain import main
from sleeptrain.schema import ConfigError

MAX_EXTRA_MB = 100  # R13


class Outcome(NamedTuple):
    error: str  # with its type
    extra_mb: float


def in_child(action: Callable[[], object]) -> Outcome:
    """What ``action`` raised in a child, and the memory that it took."""
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
            before, error = peak_mb(), "nothing"
            try:
                action()
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            os.write(outlet, json.dumps([error[:4000], peak_mb() - before]).encode())
        finally:
            os._exit(0)
    os.close(outlet)
    with open(inlet) as pipe:  # noqa: PTH123
        text = pipe.read()
    os.waitpid(pid, 0)
    return Outcome(*json.loads(text))


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10


def assert_refused(outcome: Outcome, reason: str, kind: type[Exception] = ShardError) -> None:
    assert outcome.error.startswith(f"{kind.__name__}: "), outcome
    assert reason in outcome.error
    assert outcome.extra_mb < MAX_EXTRA_MB


def test_memory_is_measured() -> None:
    """R13, the control of its bound."""
    assert in_child(lambda: np.ones(15 * 2**20)).extra_mb == pytest.approx(120, abs=15)
    assert in_child(lambda: np.ones(15 * 2**10)) == Outcome("nothing", pytest.approx(0, abs=15))


def read_all(url: str) -> None:
    """All that the set at ``url`` holds."""
    index = read_index(url)
    reader = ShardReader(url, index, cache=None)
    for number in range(len(index.shards)):
        shard = reader.fetch(number).result()
        for i in range(len(shard)):
            shard.meta(i)
            shard.tokens(i)


def write_hostile(folder: Path, data: bytes, **entry: Any) -> None:
    """A set of one shard with these bytes, and an index that tells their size and hash."""
    row = ShardEntry("set-000000.tar", 3, 18, len(data), sha256(data).hexdigest())
    index = Index("examples", "train", 6, 9, {"name": "x"}, "", "", (row._replace(**entry),))
    folder.mkdir()
    (folder / row.name).write_bytes(data)
    (folder / FILE).write_bytes(index.to_json())


class Canary:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def object_array(canary: Path) -> bytes:
    file = BytesIO()
    np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return file.getvalue()


def good(num_samples: int = 3) -> list[bytes]:
    return [part for key in range(num_samples) for part in sample(key)]


def instead_of(place: int, *parts: bytes) -> bytes:
    """A good tar file but for one member."""
    members = good()
    return tar([*members[:place], *parts, *members[place + 1 :]])


JSON, NPY = b"000000001.json", b"000000001.tokens.npy"
NEXT, PLAIN, ARRAY, OBJECT = (
    "sample of the next number is expected",
    "no plain file",
    "no plain array",
    "no object",
)

# By name: which member they take the place of, themselves, and what is said.
MEMBERS: dict[str, tuple[int, list[bytes], str]] = {
    "an array of more than there is": (3, [member(NPY, npy("(2, 9999999999)"))], ARRAY),
    "deep json": (2, [member(JSON, b'{"a":' * 10_000)], OBJECT),
    "a name above": (2, [member(b"../canary", b"x")], NEXT),
    "an absolute name": (2, [member(b"/tmp/canary", b"x")], NEXT),
    "a name with a prefix": (2, [member(JSON, b"{}", prefix=b"..")], PLAIN),
    "the same sample twice": (5, [sample(2)[1], *sample(2)], NEXT),
    "the same member twice": (3, [sample(1)[0]], NEXT),
    "a member without its sample": (3, [], "5 members"),
    "a size of 1 TB": (2, [header(JSON, base_256(2**40))], "no size"),
    "a size in base 256": (2, [member(JSON, b"{}", size=base_256(2))], "no size"),
    "a size below 0": (2, [header(JSON, b"\xff" * 12)], "no size"),
    "a size of 8 GB": (2, [header(JSON, 8**11 - 1)], "larger than the file"),
    "a size beyond the end": (5, [header(b"000000002.tokens.npy", 10**6)], "larger than the file"),
    "a header of GNU": (2, [member(JSON, b"{}", magic=b"ustar  \0")], "no header"),
    "pax before a member": (
        2,
        [member(b"x", b"30 path=../../canary-canary\n", type=b"x"), sample(1)[0]],
        PLAIN,
    ),
}
TYPES = {
    **{"a hard link": b"1", "a symbolic link": b"2", "a character device": b"3", "a block device": b"4"},
    **{"a folder": b"5", "a pipe": b"6", "a sparse file": b"S", "a volume": b"V", "a file of old": b"\0"},
    **{"a long name of GNU": b"L", "a long link of GNU": b"K", "pax": b"x", "global pax": b"g"},
}
MEMBERS |= {what: (2, [member(JSON, b"", type=t, link=b"/etc/passwd")], PLAIN) for what, t in TYPES.items()}


@pytest.mark.parametrize("what", list(MEMBERS))
def test_a_hostile_member_is_refused(tmp_path: Path, what: str) -> None:
    """R13: with an index that fits it. No file is made, memory stays."""
    place, parts, reason = MEMBERS[what]
    assert_refuses_file(tmp_path, instead_of(place, *parts), reason)


PICKLES: dict[str, tuple[bytes, str]] = {
    "a member": (b"000000001.pickle", NEXT),
    ".pyd": (b"000000001.pyd", NEXT),
    ".pth": (b"000000001.pth", NEXT),
    ".npy": (NPY, ARRAY),
    ".json": (JSON, NEXT),
}


@pytest.mark.parametrize("suffix", list(PICKLES))
def test_a_pickle_is_refused(tmp_path: Path, suffix: str) -> None:
    """R13: no code runs."""
    name, reason = PICKLES[suffix]
    pickled = pickle.dumps(Canary(tmp_path / "canary"))
    assert_refuses_file(tmp_path, instead_of(3, member(name, pickled)), reason)


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    """R13: numpy would unpickle it."""
    assert_refuses_file(tmp_path, instead_of(3, member(NPY, object_array(tmp_path / "canary"))), ARRAY)


LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "json of 30 MB": (lambda: instead_of(2, member(JSON, b"[" + b"[]," * 10**7 + b"0]")), OBJECT),
    "a tar file compressed": (lambda: padded(gzip.compress(tar(good()))), "no header"),
    "100 MB of zeros compressed": (lambda: padded(compressed_zeros(100)), "no header"),
    "no member": (lambda: bytes(10240), "no header"),
    "40 000 empty samples": (lambda: empty_samples(40_000), "holds 40000 samples; the index says 3"),
}


@pytest.mark.parametrize("what", list(LARGE))
def test_a_hostile_file_is_refused(tmp_path: Path, what: str) -> None:
    """R13."""
    make, reason = LARGE[what]
    assert_refuses_file(tmp_path, make(), reason)


def assert_refuses_file(folder: Path, data: bytes, reason: str) -> None:
    write_hostile(folder / "set", data)
    before = sorted(folder.rglob("*"))
    outcome = in_child(lambda: read_all(str(folder / "set")))
    assert_refused(outcome, reason)
    assert "set-000000.tar" in outcome.error
    assert sorted(folder.rglob("*")) == before


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 10240)


def compressed_zeros(num_mb: int) -> bytes:
    compress = zlib.compressobj(wbits=31)
    return b"".join(compress.compress(bytes(2**20)) for _ in range(num_mb)) + compress.flush()


def empty_samples(number: int) -> bytes:
    keys = (b"%09d" % key for key in range(number))
    return tar(header(key + suffix, 0) for key in keys for suffix in (b".json", b".tokens.npy"))


def test_what_makes_them_hostile_is_the_change_alone(tmp_path: Path) -> None:
    """R13, a control: the file that all are made from is read."""
    write_hostile(tmp_path / "set", tar(good()))
    assert in_child(lambda: read_all(str(tmp_path / "set"))).error == "nothing"


@pytest.mark.parametrize("load", [pickle.loads, lambda data: np.load(BytesIO(data), allow_pickle=True)])
def test_their_pickles_bite(tmp_path: Path, load: Callable[[bytes], object]) -> None:
    """R13, a control: loaded as a pickle, what the shards hold makes the file."""
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary)) if load is pickle.loads else object_array(canary)
    in_child(lambda: load(data))
    assert canary.exists()


@lru_cache(maxsize=1)
def hostile_indexes() -> dict[str, bytes]:
    row = ShardEntry("set-000000.tar", 3, 18, 10240, "0" * 64)
    index = Index("examples", "train", 6, 9, {"name": "x"}, "", "", (row,))

    def with_row(**values: Any) -> bytes:
        return replace(index, shards=(row._replace(**values),)).to_json()

    large = MAX_INDEX_BYTES - 100
    whole = json.loads(index.to_json())
    return {
        "deep": b"[" * large,
        "deep in a value": index.to_json().replace(b'"x"', b"[" * 50_000 + b"]" * 50_000),
        "deep in the task": index.to_json().replace(b'"x"', b"[" * 300 + b"]" * 300),
        "empty lists": b"[" + b"[]," * (large // 3) + b"0]",
        "empty objects": b"[" + b"{}," * (large // 3) + b"0]",
        "texts": b'["' + b'","'.join([b"ab"] * (large // 5)) + b'"]',
        "many keys": b"{" + b",".join(b'"%x":0' % i for i in range(large // 10)) + b"}",
        "one long text": b'{"format": "' + b"x" * (large - 20) + b'"}',
        "a long number": b'{"format": ' + b"9" * (large - 20) + b"}",
        "more than allowed": b" " * (MAX_INDEX_BYTES + 1),
        "a shard of 1 TB": with_row(bytes=2**40),
        "a shard of 10^400 bytes": with_row(bytes=512 * 10**400),
        "10^18 samples": with_row(samples=10**18),
        "a token number beyond all": with_row(tokens=10**18),
        "a shard above": with_row(name="../set-000000.tar"),
        "a shard anywhere": with_row(name="/set-000000.tar"),
        "a shard elsewhere": with_row(name="http://host/set-000000.tar"),
        "a shard of a command": with_row(name="pipe:touch canary; -000000.tar"),
        "a field more": json.dumps(whole | {"url": "pipe:touch canary"}).encode(),
        "a pickle": pickle.dumps(Canary(Path("canary"))),
    }


@pytest.mark.parametrize("what", list(hostile_indexes()))
def test_a_hostile_index_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """R13."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / FILE).write_bytes(hostile_indexes()[what])
    assert_refused(in_child(lambda: read_all("set")), "set/index.json")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "set", tmp_path / "set" / FILE]


def test_what_an_index_claims_takes_no_memory(tmp_path: Path) -> None:
    """R13: 4 GiB in the index, 10 kB on the disk."""
    write_hostile(tmp_path / "set", tar(good()), bytes=MAX_SHARD_BYTES)
    assert_refused(in_child(lambda: read_all(str(tmp_path / "set"))), "is truncated")


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """200 MB of zeros."""
    return compressed_zeros(200)


def hostile_answers(bomb: bytes) -> dict[str, tuple[str, Answer, str]]:
    """By name: the file, what the server does instead, and what is said."""
    compressed = instead(bomb, Content_Encoding="gzip")
    deflated = instead(zlib.compress(bytes(2**20)), Content_Encoding="deflate")
    shard = "set-000000.tar"
    return {
        "an index that explodes": (FILE, compressed, "no index of shards"),
        "a shard that explodes": (shard, compressed, "set-000000.tar"),
        "a shard that explodes a little": (shard, deflated, "is truncated"),
        "an index without end": (FILE, endless, "no index of shards"),
        "a shard without end": (shard, endless, "is longer"),
        "an index of 1 TB that breaks off": (FILE, instead(b"{", Content_Length=2**40), "cannot be read"),
        "a shard that breaks off": (shard, broken(99), "cannot be read"),
    }


@pytest.mark.parametrize("what", list(hostile_answers(b"")))
def test_a_hostile_server_is_refused(
    tmp_path: Path, bomb: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R13. The index allows 200 MB where the answer would unpack to as much, so that its size alone does not
    give it away."""
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.01)
    name, answer, reason = hostile_answers(bomb)[what]
    size = {"bytes": 200 * 2**20} if answer is not endless else {}
    write_hostile(tmp_path / "set", tar(good()), **size)
    with serving(tmp_path / "set") as server:
        server.answers[name] = answer
        outcome = in_child(lambda: read_all(server.url))
    is_setting = name == FILE and reason == "cannot be read"
    assert_refused(outcome, reason, ConfigError if is_setting else ShardError)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch canary",
        "pipe:touch canary; cat index.json",
        "file://x::pipe:touch canary",
        "zip://*::x.zip",
    ],
)
def test_urls_that_run_commands_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """R13: by the command line as a wrong setting, and by the reader itself as no set."""
    monkeypatch.chdir(tmp_path)
    assert (
        main(["experiment=quickstart", f"data.shards=['{url}']", f"run.dir={tmp_path}/runs", "dry_run=true"])
        == 2
    )
    assert "data.shards holds a chained or pipe URL" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be read"):
        read_index(url)
    assert not (tmp_path / "canary").exists()
