import json
import os

import pytest

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.manifest import CheckpointError, Contents, FileEntry, SliceEntry, TensorEntry
from sleeptrain.checkpoint.reader import Checkpoint

DOCUMENT = b'{"a": 1}'
TENSOR_FILE = FileEntry(24, 8, manifest.checksum(b"headhead"))
HALF = SliceEntry("model_00000.safetensors", 8, ((0, 2), (0, 2)), 0, 4, (manifest.checksum(b"x" * 16),))
TENSOR = TensorEntry("float32", (2, 2), [HALF])


def contents(entry=TENSOR):
    files = {"data.json": manifest.document_entry(DOCUMENT), HALF.file: TENSOR_FILE}
    return Contents(files, {"model": {"w": entry}})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step_00000012"
    folder.mkdir()
    (folder / "data.json").write_bytes(DOCUMENT)
    (folder / HALF.file).write_bytes(b"headhead" + b"x" * 16)
    manifest.write(folder, 12, contents())
    return folder


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder).verify()
    return str(caught.value)


def test_a_whole_folder_passes(folder):
    Checkpoint(folder).verify()
    assert manifest.read(folder) == (12, *contents())


def test_the_file_holds_format_step_sizes_and_hashes(folder):
    content = json.loads((folder / manifest.FILE).read_bytes())
    assert (content["format"], content["version"], content["step"]) == ("sleeptrain-checkpoint", 2, 12)
    assert content["files"]["data.json"]["size_bytes"] == 8
    assert content["groups"]["model"]["w"]["slices"][0]["box"] == [[0, 2], [0, 2]]


def test_a_tensor_is_one_line(folder):
    assert any(
        line.startswith('   "w": {"dtype"') for line in (folder / manifest.FILE).read_text().splitlines()
    )


def replace(path, make):
    path.unlink()
    make(path)


def link_to_zero(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "data.json").unlink(), "step_00000012/data.json is missing"),
        (lambda f: (f / "data.json").write_bytes(b""), "data.json is empty: expected 8 bytes, found 0"),
        (lambda f: (f / "data.json").write_bytes(b"{"), "data.json is truncated: expected 8 bytes, found 1"),
        (lambda f: (f / "data.json").write_bytes(b" " * 9), "is too long: expected 8 bytes, found 9"),
        (lambda f: (f / "data.json").write_bytes(b'{"a": 2}'), "data.json is damaged: its checksum differs"),
        (lambda f: (f / "extra.bin").touch(), "extra.bin is not part of the checkpoint"),
        (
            lambda f: (f / "extra").mkdir(),
            "step_00000012/extra is not part of the checkpoint: it is no plain",
        ),
        (
            lambda f: replace(f / "data.json", os.mkfifo),
            "data.json is not part of the checkpoint: it is no plain",
        ),
        (
            lambda f: replace(f / "manifest.json", link_to_zero),
            "manifest.json is not part of the checkpoint: it",
        ),
        (
            lambda f: os.truncate(f / "manifest.json", 2**40),
            "manifest.json is damaged: it is longer than any",
        ),
        (
            lambda f: (f / "manifest.json").write_bytes(b"[" * 100_000),
            "manifest.json is damaged: it is not JSON",
        ),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (
            lambda f: (f / "manifest.json").write_bytes(b""),
            "manifest.json is damaged: it is not JSON (0 bytes)",
        ),
        (lambda f: (f / "manifest.json").write_bytes(b"[]"), "manifest.json is foreign"),
        (lambda f: (f / "manifest.json").write_bytes(b'{"format": "other"}'), "manifest.json is foreign"),
    ],
)
def test_each_damage_is_named(folder, damage, sentence):
    damage(folder)
    assert sentence in refusal(folder)


@pytest.mark.parametrize("key", ["step", "files", "groups", "sha256", "surplus"])
def test_an_edited_manifest_is_noticed(folder, key):
    content = json.loads((folder / manifest.FILE).read_bytes())
    content[key] = 13
    (folder / manifest.FILE).write_text(json.dumps(content, indent=1) + "\n")
    assert "manifest.json is damaged: its content differs from its own hash" in refusal(folder)


def test_a_changed_blank_is_noticed(folder):
    text = (folder / manifest.FILE).read_text()
    (folder / manifest.FILE).write_text(text.replace('": ', '":  ', 1))
    assert "its content differs from its own hash" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 9},
        {"offset": -4},
        {"length": -4},
        {"length": 2.0},
        {"start": 1},
        {"box": [[0, 2], [0, 3]]},
        {"box": [[0, 2]]},
        {"box": [["0", 2], [0, 2]]},
        {"file": "../data.json"},
        {"file": "data.json"},
        {"crc32": []},
        {"surplus": 1},
    ],
)
def test_a_slice_that_cannot_be_is_refused_although_the_hash_of_the_manifest_is_right(folder, change):
    body = {"step": 12, **manifest.to_json(contents())}
    body["groups"]["model"]["w"]["slices"][0] |= change
    (folder / manifest.FILE).write_bytes(manifest.seal(body))
    assert "step_00000012/manifest.json is malformed" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"dtype": "object"}, {"shape": [3, 2]}, {"shape": None}, {"slices": []}),
        *({"shape": [0, -1], "slices": []}, {"shape": [0, 2**70], "slices": []}),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(folder, change):
    body = {"step": 12, **manifest.to_json(contents())}
    body["groups"]["model"]["w"] |= change
    (folder / manifest.FILE).write_bytes(manifest.seal(body))
    assert "step_00000012/manifest.json is malformed" in refusal(folder)


@pytest.mark.parametrize("name", ["../data.json", "model.pt", ".metadata", "a/b.json", ".json"])
def test_a_file_that_no_checkpoint_has_is_refused(folder, name):
    body = {"step": 12, **manifest.to_json(contents())}
    body["files"][name] = body["files"]["data.json"]
    (folder / manifest.FILE).write_bytes(manifest.seal(body))
    assert f"no checkpoint has a file '{name}'" in refusal(folder)


@pytest.mark.parametrize("change", [{"head_bytes": 25}, {"head_bytes": -1}, {"size_bytes": 2.0}, {"mode": 1}])
def test_a_file_entry_that_cannot_be_is_refused(folder, change):
    body = {"step": 12, **manifest.to_json(contents())}
    body["files"][HALF.file] |= change
    (folder / manifest.FILE).write_bytes(manifest.seal(body))
    assert "step_00000012/manifest.json is malformed" in refusal(folder)


def test_a_hole_is_named(folder):
    entry = TENSOR._replace(slices=[HALF._replace(length=3)])
    (folder / manifest.FILE).unlink()
    manifest.write(folder, 12, contents(entry))
    assert "manifest.json is malformed: tensor w of model is not whole: elements are missing" in refusal(
        folder
    )


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_refused(folder, version):
    content = json.loads((folder / manifest.FILE).read_bytes())
    (folder / manifest.FILE).write_text(json.dumps(content | {"version": version}))
    assert f"has format version {version}, and this program reads version 2" in refusal(folder)


def test_the_step_of_the_folder_name_must_agree(folder):
    moved = folder.rename(folder.with_name("step_00000013"))
    assert "belongs to step 12, not to the step in" in refusal(moved)


def test_a_folder_whose_name_tells_no_step_may_hold_any(folder):
    Checkpoint(folder.rename(folder.with_name("best"))).verify()


def test_a_missing_folder_is_refused(tmp_path):
    assert "step_00000001 cannot be read: No such file" in refusal(tmp_path / "step_00000001")


def test_merged_puts_the_slices_of_all_processes_together():
    low, high = (HALF._replace(box=((a, a + 1), (0, 2)), length=2) for a in (0, 1))
    parts = [contents(TENSOR._replace(slices=[part])) for part in (low, high)]
    assert manifest.merged(parts).groups["model"]["w"].slices == [low, high]
    for wrong, reason in (
        (parts[:1], "elements are missing"),
        ([*parts, parts[0]], "elements are held twice"),
    ):
        with pytest.raises(CheckpointError, match=f"tensor w of model is not whole: {reason}"):
            manifest.merged(wrong)
    other = contents(TENSOR._replace(dtype="float16", slices=[high]))
    with pytest.raises(
        CheckpointError, match=r"tensor w of model is float32 \[2, 2\] in one process and float16"
    ):
        manifest.merged([parts[0], other])


def test_differences_lists_changed_and_missing_settings():
    saved = {"sleep": {"num_passes": 2, "gone": None}, "same": [1]}
    current = {"sleep": {"num_passes": 3}, "same": [1], "new": {"name": "depo"}}
    assert manifest.differences(saved, current) == [
        'new.name: saved absent, now "depo"',
        "sleep.gone: saved null, now absent",
        "sleep.num_passes: saved 2, now 3",
    ]
    assert manifest.differences(saved, saved) == []
