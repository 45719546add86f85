import os
import shutil

import pytest
from cuts import fill_of, save_filled

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint


def latest(folder):
    reports = []
    return store.find_latest(folder, reports.append), reports


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing", "extra", "swapped"])
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage):
    save_filled(tmp_path, 10)
    newest = save_filled(tmp_path, 20)
    file = newest / "model_00000.safetensors"
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        file = newest / "model_00001.safetensors"
        file.touch()
    else:
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "step_00000010", newest)
        file = newest / "manifest.json"
    checkpoint, reports = latest(tmp_path)
    assert fill_of(checkpoint) == checkpoint.step == 10
    assert len(reports) == 1
    assert f"step_00000020/{file.name} " in reports[0]
    assert reports[0].endswith("trying step_00000010")
    assert (damage == "flipped") == ("damaged in tensor w:" in reports[0])


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path):
    assert latest(tmp_path / "absent") == (None, [])
    assert latest(tmp_path) == (None, [])
    (tmp_path / "step_00000004").mkdir()
    with pytest.raises(
        CheckpointError, match=r"none of the 1 checkpoints in .* move that folder away to start anew"
    ):
        latest(tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_filled(tmp_path, step)
    assert latest(tmp_path)[0].step == 100_000_000


def test_retention_keeps_the_newest_and_the_multiples(tmp_path):
    for step in range(10, 80, 10):
        save_filled(tmp_path, step, keep_last=2, keep_every_steps=30)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (30, 60, 70)]


def test_damaged_later_checkpoints_do_not_push_out_good_ones(tmp_path):
    (tmp_path / "step_00000020").mkdir()
    save_filled(tmp_path, 12, keep_last=1)
    assert names(tmp_path) == ["step_00000012", "step_00000020"]
    assert fill_of(latest(tmp_path)[0]) == 12


def test_saving_a_step_again_replaces_it(tmp_path):
    save_filled(tmp_path, 5, fill=1)
    save_filled(tmp_path, 5, fill=2)
    assert fill_of(latest(tmp_path)[0]) == 2
    assert names(tmp_path) == ["step_00000005"]


def test_leftovers_of_a_crash_are_removed_and_foreign_names_left(tmp_path):
    left = (".tmp_step_00000009_1234", ".tmp_deleted_step_00000001_12", ".failed_step_00000003_12")
    for name in (*left, ".old_step_00000005", "step_00000005", ".old_notes", "notes"):
        (tmp_path / name / "inside").mkdir(parents=True)
    save_filled(tmp_path, 6)
    assert names(tmp_path) == [".old_notes", "notes", "step_00000005", "step_00000006"]


def test_a_begun_save_takes_nothing_over_from_one_that_was_killed(tmp_path):
    store.begin(tmp_path, 6)
    killed = store.begun(tmp_path, 6)
    (killed / "model_00007.safetensors").write_bytes(b"of the killed one")
    store.begin(tmp_path, 6)
    assert store.begun(tmp_path, 6) != killed
    assert not killed.exists()  # so a process that outlived the kill cannot write there
    path = save_filled(tmp_path, 6)
    assert names(path) == [
        "manifest.json",
        "model_00000.safetensors",
        "optimizer_00000.safetensors",
        "trainer.json",
    ]
    assert names(tmp_path) == ["step_00000006"]


def test_one_moved_aside_counts_until_its_successor_has_its_name(tmp_path):
    save_filled(tmp_path, 4).rename(tmp_path / ".old_step_00000004")
    assert fill_of(latest(tmp_path)[0]) == 4
    store.restore(tmp_path)
    assert names(tmp_path) == ["step_00000004"]


def test_damaged_checkpoints_set_aside_take_no_place_among_those_kept(tmp_path):
    save_filled(tmp_path, 5)
    (save_filled(tmp_path, 7) / "model_00000.safetensors").unlink()
    assert store.find_latest(tmp_path, print, set_aside=True).step == 5
    save_filled(tmp_path, 10)
    assert names(tmp_path) == ["damaged_step_00000007", "step_00000005", "step_00000010"]
    (tmp_path / "step_00000010" / "model_00000.safetensors").unlink()
    (tmp_path / "step_00000005" / "model_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2"):
        store.find_latest(tmp_path, print, set_aside=True)
    assert (tmp_path / "step_00000010").exists()  # nothing is renamed where nothing whole is left


def test_the_one_found_can_be_read_after_a_newer_one_came(tmp_path):
    save_filled(tmp_path, 5)
    found, _ = latest(tmp_path)
    save_filled(tmp_path, 6)
    assert fill_of(found) == 5
    assert isinstance(found, Checkpoint)
