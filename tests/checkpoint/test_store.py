import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import CheckpointError, verify


def save(folder, step, fill=None, keep_last=2, keep_every_steps=0):
    """A small checkpoint every value of which is ``fill`` (the step unless told)."""
    fill = step if fill is None else fill
    tensors = {
        "model": {"w": torch.full((300,), float(fill)), "b": torch.tensor(fill)},
        "optim": {"m": torch.full((7, 5), float(fill))},
    }
    return store.save(folder, step, tensors, {"trainer": {"fill": fill}}, keep_last, keep_every_steps)


def fill_of(checkpoint):
    """The value all of the checkpoint holds; fails if its parts disagree."""
    values = {
        v for group in checkpoint.tensors.values() for t in group.values() for v in t.flatten().tolist()
    }
    assert values == {checkpoint.documents["trainer"]["fill"]}
    return values.pop()


def latest(folder):
    reports = []
    return store.find_latest(folder, reports.append), reports


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_child(work):
    """Runs ``work`` in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_tensors_and_documents_come_back_bit_for_bit(tmp_path):
    payload = torch.tensor([0x7FC01234, 0x7F800001, -0x3FEDCC], dtype=torch.int32).view(torch.float32)
    shared = torch.randn(4, 6)
    groups = {
        "model": {
            "nan": payload,
            "special": torch.tensor([-0.0, math.inf, -math.inf, 1e-45]),
            "scalar": torch.tensor(0.1),
            "empty": torch.empty(0, 3),
            "shared": shared,
            "transposed": shared.T,
            "expanded": torch.ones(1).expand(5),
            "trained": torch.nn.Parameter(torch.randn(3)),
        },
        "data": {"index": torch.tensor(2**62 + 1), "random": torch.get_rng_state()},
    }
    trainer = {
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "zero": -0.0,
        "inf": math.inf,
        "big": 2**70,
        "list": [None, "ß"],
    }
    path = store.save(tmp_path / "checkpoints", 7, groups, {"trainer": trainer, "config": {}}, 1, 0)
    loaded = store.load(path)
    assert (loaded.step, loaded.path, path.name) == (7, path, "step_00000007")
    assert loaded.tensors.keys() == groups.keys()
    for group, tensors in groups.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, t in tensors.items():
            back = loaded.tensors[group][name]
            assert (back.dtype, back.shape) == (t.dtype, t.shape)
            assert back.numpy().tobytes() == t.detach().contiguous().numpy().tobytes(), name
    assert repr(loaded.documents) == repr({"config": {}, "trainer": trainer})


def test_every_flipped_byte_is_noticed_and_its_file_named(tmp_path):
    path = save(tmp_path, 3)
    chance = random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for offset in chance.sample(range(len(content)), 30 if len(content) > 30 else len(content)):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name):
                store.load(path)
        file.write_bytes(content)
    assert fill_of(store.load(path)) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "extra", "swapped"])
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    file = newest / "model.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        file = newest / "model.safetensors.1"
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
        save(tmp_path, step)
    assert latest(tmp_path)[0].step == 100_000_000


def test_retention_keeps_the_newest_and_the_multiples(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step, keep_last=2, keep_every_steps=30)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (30, 60, 70)]


def test_damaged_later_checkpoints_do_not_push_out_good_ones(tmp_path):
    (tmp_path / "step_00000020").mkdir()
    save(tmp_path, 12, keep_last=1)
    assert names(tmp_path) == ["step_00000012", "step_00000020"]
    assert fill_of(latest(tmp_path)[0]) == 12


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, fill=1)
    save(tmp_path, 5, fill=2)
    assert fill_of(latest(tmp_path)[0]) == 2
    assert names(tmp_path) == ["step_00000005"]


def test_leftovers_of_a_crash_are_removed_and_foreign_names_left(tmp_path):
    for name in (".tmp_step_00000009_1234", ".old_step_00000005", "step_00000005", ".old_notes", "notes"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path, 6)
    assert names(tmp_path) == [".old_notes", "notes", "step_00000005", "step_00000006"]


@pytest.mark.parametrize(("limit_bytes", "file"), [(1000, "a tensor file"), (80, "the manifest")])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, limit_bytes, file):
    save(tmp_path, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        tensors = {"model": {"w": torch.zeros(1000)}} if file == "a tensor file" else {}
        try:
            store.save(tmp_path, 2, tensors, {"trainer": {}}, 1, 0)
        except CheckpointError as error:
            return 7 if "step_00000002" in str(error) and "File too large" in str(error) else 8

    assert in_child(work) == 7
    assert names(tmp_path) == ["step_00000001"]
    assert fill_of(latest(tmp_path)[0]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, seed):
    save(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        for step in range(2, 1_000_000):
            save(tmp_path, step - step % 2, fill=step)  # each second one replaces the one before
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0.02, 0.2))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    checkpoint, reports = latest(tmp_path)
    assert fill_of(checkpoint) - checkpoint.step in (0, 1)
    assert reports == []
    save(tmp_path, checkpoint.step + 2)
    assert fill_of(latest(tmp_path)[0]) == checkpoint.step + 2
    assert not [name for name in names(tmp_path) if name.startswith(".")]


FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def save_failing_before(operation, how, folder):
    """Saves step 20 in a child that dies or meets a full disk before its ``operation``-th file operation."""

    def work():
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in FILE_OPERATIONS and str(folder) in str(arguments[0]):
                count += 1
                if count == operation and how == "dies":
                    os._exit(1)
                if count == operation:
                    raise OSError(28, "No space left on device")

        sys.addaudithook(hook)  # fires before the operation; cannot be removed, hence the child
        try:
            save(folder, 20, fill=3, keep_last=1)
        except CheckpointError:
            return 2
        return 0 if count < operation else 3  # 3: it failed where failing does not matter

    return in_child(work)


@pytest.mark.parametrize("how", ["dies", "fails"])
@pytest.mark.parametrize("replaced", ["invalid", "valid", "only"])
def test_no_file_operation_of_a_save_can_lose_the_last_whole_checkpoint(tmp_path, how, replaced):
    outcomes = []
    while 0 not in outcomes:
        folder = tmp_path / str(len(outcomes))
        if replaced != "only":
            save(folder, 10, fill=1)
        existing = save(folder, 20, fill=2)
        if replaced == "invalid":
            os.truncate(existing / "optim.safetensors", 50)
        outcomes.append(save_failing_before(len(outcomes) + 1, how, folder))
        checkpoint, _ = latest(folder)
        assert fill_of(checkpoint) in ({1, 3} if replaced == "invalid" else {2, 3})
        assert (outcomes[-1] != 0) or fill_of(checkpoint) == 3
        if replaced != "invalid":
            for path in folder.glob("step_*"):
                verify(path)  # nothing half deleted under a checkpoint's name
        save(folder, 30, keep_last=1)
        assert names(folder) == ["step_00000030"]
    assert len(outcomes) > 10
    assert set(outcomes) <= ({0, 1} if how == "dies" else {0, 2, 3})


def test_load_refuses_what_verify_refuses(tmp_path):
    path = save(tmp_path, 2)
    verify(path)
    (path / "trainer.json").write_text(json.dumps({"fill": 9}))
    for read in (verify, store.load):
        with pytest.raises(CheckpointError, match=r"step_00000002/trainer\.json"):
            read(path)


def test_damaged_checkpoints_set_aside_take_no_place_among_those_kept(tmp_path):
    save(tmp_path, 5)
    (save(tmp_path, 7) / "model.safetensors").unlink()
    assert store.find_latest(tmp_path, print, set_aside=True).step == 5
    save(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged_step_00000007",
        "step_00000005",
        "step_00000010",
    ]
    (tmp_path / "step_00000010" / "model.safetensors").unlink()
    (tmp_path / "step_00000005" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2"):
        store.find_latest(tmp_path, print, set_aside=True)
    assert (tmp_path / "step_00000010").exists()  # nothing is renamed where nothing whole is left
