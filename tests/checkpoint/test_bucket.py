"""Copies of checkpoints in a bucket, of each kind of file system that fsspec has on this machine."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from sleeptrain.checkpoint import manifest, store
from sleeptrain.checkpoint.bucket import Bucket
from sleeptrain.checkpoint.manifest import FILE, CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.slices import whole
from sleeptrain.schema import ConfigError


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        name = uuid.uuid4().hex
        yield f"memory://{name}/runs/a"
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
    else:
        yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/bucket/runs/a"


def save(folder: Path, bucket: Bucket, *steps: int, keep: tuple[int, int] = (2, 0)) -> str:
    """What the last save said, if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    saver = Saver(folder, *keep, bucket=bucket)
    for step in steps:
        saver.save(
            step, {"model": [whole("w", torch.full((3, 5), float(step)))]}, {"trainer": {"step": step}}
        )
        failure = saver.wait()
    return str(failure or "")


def silent(text: str) -> None:
    """For reports that a test does not look at."""


def remote(url: str, path: str) -> str:
    return f"{url}/{path}"


def test_what_is_saved_is_there_and_comes_back(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    assert bucket.steps() == []
    assert save(tmp_path / "here", bucket, 1, 2, 3) == ""
    assert bucket.steps() == [3, 2]
    said: list[str] = []
    bucket.fetch_newer(tmp_path / "there", than_step=0, report=said.append)
    found = store.find_latest(tmp_path / "there", said.append)
    assert found is not None
    assert found.step == found.documents["trainer"]["step"] == 3
    assert found.read("model", "w").tolist() == [[3.0] * 5] * 3
    assert said == [f"step_00000003 was fetched from {url}"]


def test_what_is_as_new_here_is_not_fetched(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    save(tmp_path / "here", bucket, 1, 2)
    bucket.fetch_newer(tmp_path / "there", than_step=2, report=silent)
    assert not (tmp_path / "there").exists()


def test_those_kept_for_ever_stay_also_after_the_disk_is_gone(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    save(tmp_path / "here", bucket, 1, 2, 3, 4, keep=(1, 2))
    save(tmp_path / "there", bucket, 5, keep=(1, 2))
    assert bucket.steps() == [5, 4, 2]


def test_a_copy_of_the_same_step_is_replaced(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    save(tmp_path / "here", bucket, 1)
    with fsspec.open(remote(url, "step_00000001/model_00007.safetensors"), "wb") as file:
        file.write(b"of more processes")
    bucket.put(tmp_path / "here" / "step_00000001")
    bucket.fetch_newer(tmp_path / "there", 0, silent)
    assert Checkpoint(tmp_path / "there" / "step_00000001").step == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_copy_is_told_and_the_one_before_is_taken(url: str, tmp_path: Path, damage: str) -> None:
    bucket = Bucket(url)
    save(tmp_path / "here", bucket, 1, 2)
    files, path = fsspec.core.url_to_fs(remote(url, "step_00000002/model_00000.safetensors"))
    data = files.cat_file(path)
    files.rm_file(path)
    if damage != "missing":
        files.pipe_file(path, data[:-1] + (b"" if damage == "cut" else bytes([data[-1] ^ 1])))
    said: list[str] = []
    bucket.fetch_newer(tmp_path / "there", 0, said.append)
    assert "step_00000002" in said[0]
    assert "skipped" in said[0]
    found = store.find_latest(tmp_path / "there", silent)
    assert found is not None
    assert found.step == 1


def test_without_its_manifest_a_copy_is_none(url: str, tmp_path: Path) -> None:
    """As after a crash amid the copying."""
    bucket = Bucket(url)
    save(tmp_path / "here", bucket, 1, 2)
    files, path = fsspec.core.url_to_fs(remote(url, f"step_00000002/{FILE}"))
    files.rm_file(path)
    assert bucket.steps() == [1]
    bucket.put(tmp_path / "here" / "step_00000002")
    assert bucket.steps() == [2, 1]


def test_foreign_files_are_left_where_they_are(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    save(tmp_path / "here", bucket, 1)
    for name in ("step_00000001/evil.pkl", "notes.txt"):
        with fsspec.open(remote(url, name), "wb") as file:
            file.write(b"x")
    assert bucket.steps() == [1]
    bucket.fetch_newer(tmp_path / "there", 0, silent)
    fetched = tmp_path / "there" / "step_00000001"
    assert {path.name for path in fetched.iterdir()} == {
        path.name for path in (tmp_path / "here" / "step_00000001").iterdir()
    }


def test_the_manifest_is_put_last_and_removed_first(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, done = Bucket(url), []
    files = bucket._files
    for name in ("put_file", "rm_file"):
        original = getattr(files, name)

        def operate(*arguments: str, name: str = name, original: object = original) -> None:
            done.append((name, arguments[-1].rpartition("/")[2]))
            original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(files, name, operate)
    save(tmp_path / "here", bucket, 1, 1)
    puts, removals, again = done[:3], done[3:6], done[6:]
    assert [name for _, name in puts].index(FILE) == 2
    assert removals[0] == ("rm_file", FILE)
    assert again == puts


def test_a_bucket_that_fails_costs_the_copy_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("no folder")
    said = save(tmp_path / "here", Bucket(str(blocked / "a")), 1)
    assert said.startswith("step_00000001 is on this disk alone: checkpoint.bucket=")
    assert Checkpoint(tmp_path / "here" / manifest.step_name(1)).step == 1


def test_a_bucket_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A newer checkpoint may be there."""
    bucket = Bucket("http://127.0.0.1:9/runs/a")
    with pytest.raises(CheckpointError, match=r"cannot be listed .*when it can, the same command goes on"):
        bucket.fetch_newer(tmp_path, 0, silent)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.bucket=nowhere://x cannot be used"):
        Bucket("nowhere://x")
