import json

import pytest

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.manifest import CheckpointError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step_00000012"
    folder.mkdir()
    (folder / "data.json").write_bytes(b'{"a": 1}')
    manifest.write(folder, 12, {"data.json": manifest.entry_of(b'{"a": 1}')})
    return folder


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(folder)
    return str(caught.value)


def test_a_whole_folder_passes(folder):
    manifest.verify(folder)
    assert manifest.read(folder) == (12, {"data.json": manifest.entry_of(b'{"a": 1}')})


def test_the_file_holds_format_step_sizes_and_hashes(folder):
    content = json.loads((folder / manifest.FILE).read_bytes())
    assert (content["format"], content["version"], content["step"]) == ("sleeptrain-checkpoint", 1, 12)
    assert content["files"]["data.json"]["size_bytes"] == 8


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "data.json").unlink(), "step_00000012/data.json is missing"),
        (lambda f: (f / "data.json").write_bytes(b""), "data.json is empty: expected 8 bytes, found 0"),
        (lambda f: (f / "data.json").write_bytes(b"{"), "data.json is truncated: expected 8 bytes, found 1"),
        (lambda f: (f / "data.json").write_bytes(b" " * 9), "is too long: expected 8 bytes, found 9"),
        (lambda f: (f / "data.json").write_bytes(b'{"a": 2}'), "data.json is damaged: its hash differs"),
        (lambda f: (f / "extra.bin").touch(), "extra.bin is not part of the checkpoint"),
        (lambda f: (f / "extra").mkdir(), "step_00000012/extra is not part of the checkpoint"),
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


@pytest.mark.parametrize("key", ["step", "files", "sha256", "surplus"])
def test_an_edited_manifest_is_noticed(folder, key):
    content = json.loads((folder / manifest.FILE).read_bytes())
    content[key] = 13
    (folder / manifest.FILE).write_text(json.dumps(content, indent=2) + "\n")
    assert "manifest.json is damaged: its content differs from its own hash" in refusal(folder)


def test_a_later_format_version_is_refused(folder):
    content = json.loads((folder / manifest.FILE).read_bytes())
    (folder / manifest.FILE).write_text(json.dumps(content | {"version": 2}))
    assert "has format version 2, and this program reads version 1" in refusal(folder)


def test_the_step_of_the_folder_name_must_agree(folder):
    assert "belongs to step 12, not to the step in" in refusal(
        folder.rename(folder.with_name("step_00000013"))
    )


def test_a_folder_whose_name_tells_no_step_may_hold_any(folder):
    manifest.verify(folder.rename(folder.with_name("best")))


def test_a_missing_folder_is_refused(tmp_path):
    assert "step_00000001 cannot be read: No such file" in refusal(tmp_path / "step_00000001")


def test_differences_lists_changed_and_missing_settings():
    saved = {"sleep": {"num_passes": 2, "gone": None}, "same": [1]}
    current = {"sleep": {"num_passes": 3}, "same": [1], "new": {"name": "depo"}}
    assert manifest.differences(saved, current) == [
        'new.name: saved absent, now "depo"',
        "sleep.gone: saved null, now absent",
        "sleep.num_passes: saved 2, now 3",
    ]
    assert manifest.differences(saved, saved) == []
