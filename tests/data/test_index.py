"""An index is read back as it was written; what is not whole and plain is refused with its reason."""

import json
from dataclasses import replace

import pytest

from sleeptrain.data.index import (
    MAX_INDEX_BYTES,
    MAX_SHARD_BYTES,
    Index,
    ShardEntry,
    ShardError,
    parse_index,
    require_plain_url,
)
from sleeptrain.schema import ConfigError

SHARDS = tuple(ShardEntry(f"depo-{i:06d}.tar", 4, 100 + i, 20480, f"{i:064x}") for i in range(3))
TASK = {"name": "depo", "max_hops": 8, "suffixes": [".txt", ".md"], "seed": 3, "share": 0.5, "note": None}
INDEX = Index("examples", "train", 62, 30, TASK, "", "5231ea0", SHARDS)


def values() -> dict:
    return json.loads(INDEX.to_json())


def parse(changed: object) -> Index:
    return parse_index(json.dumps(changed).encode(), "somewhere/index.json")


def test_it_is_read_back_as_it_was_written() -> None:
    assert parse_index(INDEX.to_json(), "") == INDEX
    assert INDEX.num_samples == 12
    assert INDEX.num_tokens == 303


def test_its_hash_does_not_depend_on_its_layout() -> None:
    assert parse(values()).sha256 == INDEX.sha256
    assert b'\n    {"name": "depo-000001.tar"' in INDEX.to_json()  # a line for each shard


@pytest.mark.parametrize(
    "other",
    [
        replace(INDEX, task=TASK | {"seed": 4}),
        replace(INDEX, shards=SHARDS[::-1]),
        replace(INDEX, shards=(SHARDS[0]._replace(sha256="f" * 64), *SHARDS[1:])),
    ],
)
def test_another_set_has_another_hash(other: Index) -> None:
    assert other.sha256 != INDEX.sha256


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", INDEX.to_json()[:-9]]
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"somewhere/index.json is no index of shards"):
        parse_index(data, "somewhere/index.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "sleeptrain shards 2"}, "not of the format 'sleeptrain shards 1'"),
        ({"kind": "pictures"}, "kind 'pictures'"),
        ({"split": "../train"}, "split '../train'"),
        ({"sequence_tokens": 62.0}, "not a whole number"),
        ({"sequence_tokens": True}, "not a whole number"),
        ({"vocab_size": -1}, "not a whole number"),
        ({"vocab_size": 10**12}, "too large"),
        ({"sequence_tokens": 10**4000}, "too large"),
        ({"tokenizer_sha256": None}, "wrong type"),
        ({"code_version": 5}, "wrong type"),
        ({"task": []}, "wrong type"),
        ({"task": {"a": {"b": 1}}}, "nested"),
        ({"task": {"a": [[1]]}}, "nested"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"shards": []}, "names no shard"),
        ({"shards": [5]}, "no index of shards"),
        ({"shards": {"name": "x"}}, "no index of shards"),
    ],
)
def test_a_wrong_value_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ShardError, match=reason):
        parse(values() | change)


@pytest.mark.parametrize("name", ["format", "kind", "split", "vocab_size", "task", "shards", "code_version"])
def test_a_missing_value_is_refused(name: str) -> None:
    with pytest.raises(ShardError, match=name):
        parse({key: value for key, value in values().items() if key != name})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "../depo-000001.tar"}, r"names a shard '\.\./depo"),
        ({"name": "/etc/depo-000001.tar"}, "names a shard"),
        ({"name": "a/depo-000001.tar"}, "names a shard"),
        ({"name": "http://x/depo-000001.tar"}, "names a shard"),
        ({"name": "pipe:true-000001.tar"}, "names a shard"),
        ({"name": "-depo-000001.tar"}, "names a shard"),
        ({"name": "depo-000001.tar\n"}, "names a shard"),
        ({"name": "depo-000001.tar\0"}, "names a shard"),
        ({"name": "depo-1.tar"}, "names a shard"),
        ({"name": "d" * 65 + "-000001.tar"}, "names a shard"),
        ({"name": "depo-000000.tar"}, "names a shard twice"),
        ({"name": None}, "wrong type"),
        ({"sha256": "F" * 64}, "gives depo-000001.tar no SHA-256"),
        ({"sha256": "0" * 63}, "gives depo-000001.tar no SHA-256"),
        ({"bytes": 20481}, "20481 bytes"),
        ({"bytes": 0}, "0 bytes"),
        ({"bytes": MAX_SHARD_BYTES + 512}, "at most"),
        ({"bytes": 10**15}, "at most"),
        ({"bytes": "20480"}, "not a whole number"),
        ({"samples": 0}, "0 samples"),
        ({"samples": 11}, "11 samples"),  # 10 would fit
        ({"samples": 10**18}, "samples"),
        ({"tokens": 20481}, "20481 tokens"),
        ({"tokens": -1}, "not a whole number"),
        ({"url": "x"}, "unexpected keyword"),
    ],
)
def test_a_wrong_shard_is_refused(change: dict, reason: str) -> None:
    rows = values()["shards"]
    rows[1] |= change
    with pytest.raises(ShardError, match=reason):
        parse(values() | {"shards": rows})


def test_as_many_samples_as_fit_are_taken() -> None:
    rows = values()["shards"]
    rows[1] |= {"samples": 10, "tokens": 20480}
    assert parse(values() | {"shards": rows}).num_samples == 18


@pytest.mark.parametrize("depth", [10, 10_000, 1_000_000])
def test_deep_json_is_refused(depth: int) -> None:
    deep = b'{"format": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(ShardError, match=r"no index of shards|not of the format"):
        parse_index(deep, "index.json")


def test_what_is_too_large_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr("sleeptrain.data.index.json.loads", never)
    for data in (b" " * (MAX_INDEX_BYTES + 1), b"[" + b"[]," * 10_000, b'{"":0},' * 10_000):
        with pytest.raises(ShardError, match="too many"):
            parse_index(data, "index.json")


def test_an_index_as_large_as_allowed_is_read() -> None:
    row = json.dumps(SHARDS[0]._replace(samples=10, tokens=20480)._asdict(), separators=(",", ":"))
    num_shards = (MAX_INDEX_BYTES - 1000) // (len(row) + 1)
    rows = ",".join(row.replace("000000.tar", f"{i:06d}.tar") for i in range(num_shards))
    head = json.dumps({name: value for name, value in values().items() if name != "shards"})
    data = f'{head[:-1]}, "shards": [{rows}]}}'.encode()
    assert MAX_INDEX_BYTES - 2000 < len(data) <= MAX_INDEX_BYTES
    assert parse_index(data, "").num_samples == 10 * num_shards


@pytest.mark.parametrize(
    "url",
    [
        "data",
        "/data/a b/depo",
        "~/x",
        "file:///data",
        "s3://bucket/folder",
        "memory://x",
        "http://host:80/x",
        ".",
    ],
)
def test_plain_urls_are_taken(url: str) -> None:
    require_plain_url(url, "data.shards")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("pipe:cat x", "could run commands"),
        (" pipe:cat x", "could run commands"),
        ("zip://x::s3://y", "could run commands"),
        ("simplecache::http://x", "could run commands"),
        ("https://me:canary@host/x", "would end up in config.yaml"),
        ("https://canary@host/x", "would end up in config.yaml"),
        ("https://host/x?signature=canary", "would end up in config.yaml"),
        ("http://[", "no URL"),
    ],
)
def test_urls_that_run_something_or_hold_a_secret_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        require_plain_url(url, "data.shards")
    assert "data.shards" in str(refusal.value)
    assert "canary" not in str(refusal.value)
