import os
import random
import resource
import signal
import sys
import threading
import time

import pytest
import torch
from cuts import fill_of, save_filled, save_groups, wholes

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.slices import Slice, whole


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


def test_values_may_change_as_soon_as_save_returns(tmp_path):
    saver, values = Saver(tmp_path, 9, 0), torch.empty(1_000_000)
    for step in range(1, 5):
        values.fill_(step)
        saver.save(step, {"model": [whole("w", values)]}, {})
    values.fill_(0)
    assert saver.wait() is None
    assert saver.committed_step == 4
    for step in range(1, 5):
        assert (Checkpoint(tmp_path / f"step_{step:08d}").read("model", "w") == step).all()


def test_memory_is_taken_again_when_there_is_more_to_save(tmp_path):
    saver = Saver(tmp_path, 9, 0)
    for size in (10, 1000, 3, 0):
        saver.save(size, {"model": [whole("w", torch.full((size,), float(size)))], "none": []}, {})
        assert saver.wait() is None
        back = Checkpoint(tmp_path / f"step_{size:08d}").read("model", "w")
        assert back.tolist() == [size] * size


def test_prepared_memory_costs_the_save_no_page_faults(tmp_path):
    values = torch.randn(4_000_000)

    def faults_of_a_save(saver):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        saver.save(1, {"model": [whole("w", values)]}, {})
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert saver.wait() is None
        return faults

    fresh, prepared = Saver(tmp_path / "fresh", 1, 0), Saver(tmp_path / "prepared", 1, 0)
    prepared.prepare({"model": [whole("w", values)]})
    prepared._memory._preparing.join()
    assert faults_of_a_save(prepared) < faults_of_a_save(fresh) / 2
    assert torch.equal(Checkpoint(tmp_path / "prepared" / "step_00000001").read("model", "w"), values)


def test_result_does_not_block_and_tells_a_failure_once(tmp_path):
    saver, begun, go_on = Saver(tmp_path, 1, 0), threading.Event(), threading.Event()

    def hook(event, arguments):
        if event == "open" and threading.current_thread() is saver._thread and not go_on.is_set():
            begun.set()
            go_on.wait()

    def work():
        sys.addaudithook(hook)
        saver.save(1, wholes({"model": {"w": torch.ones(3)}}), {})
        begun.wait()
        assert saver.result() is None
        assert saver.wait(at_most_seconds=0.01) is None
        assert saver.committed_step == 0
        store.begun(tmp_path, 1).rmdir()
        go_on.set()
        assert "(another process gave it up)" in str(saver.wait())
        assert saver.result() is saver.wait() is None
        return 7

    assert in_child(work) == 7


def test_a_folder_that_cannot_be_made_is_a_failure_of_the_save(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    saver = Saver(tmp_path / "checkpoints", 1, 0)
    saver.save(3, {}, {})
    sentence = str(saver.result())
    assert sentence.startswith(f"saving step_00000003 in {tmp_path / 'checkpoints'} failed (File exists); ")
    assert sentence.endswith("are intact; free some space, or lower checkpoint.keep_last")
    (tmp_path / "checkpoints").unlink()
    saver.save(4, {}, {"trainer": {}})
    assert saver.wait() is None
    assert saver.committed_step == 4


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        ([whole("w", torch.ones(3)), whole("w", torch.ones(3))], "elements are held twice"),
        ([Slice("w", (3,), ((0, 3),), 1, torch.ones(2))], "elements are missing"),
        ([whole("w", torch.ones(3)), whole("w", torch.ones(4))], "held twice|outside of its shape"),
    ],
)
def test_a_tensor_that_is_not_whole_is_not_committed(tmp_path, slices, reason):
    save_filled(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=rf"step_00000002 in .* \(tensor w of model is not whole: {reason}"
    ):
        save_groups(tmp_path, 2, {"model": slices})
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize(
    "wrong",
    [
        Slice("w", (3,), ((0, 3),), 2, torch.ones(2)),
        Slice("w", (3,), ((0, 3),), 0, torch.ones(3, 1)),
        Slice("w", (3,), ((0, 3),), 0, torch.ones(3, dtype=torch.complex128)),
    ],
)
def test_what_cannot_be_a_slice_is_an_error_of_the_caller(tmp_path, wrong):
    with pytest.raises(ValueError, match="tensor w"):
        Saver(tmp_path, 1, 0).save(1, {"model": [wrong]}, {})


@pytest.mark.parametrize(("limit_bytes", "file"), [(1000, "a tensor file"), (80, "the manifest")])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, limit_bytes, file):
    save_filled(tmp_path, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        tensors = {"model": {"w": torch.zeros(1000)}} if file == "a tensor file" else {}
        try:
            save_groups(tmp_path, 2, wholes(tensors), {"trainer": {}})
        except CheckpointError as error:
            return 7 if "step_00000002" in str(error) and "File too large" in str(error) else 8

    assert in_child(work) == 7
    assert names(tmp_path) == ["step_00000001"]
    assert fill_of(latest(tmp_path)[0]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, seed):
    save_filled(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        for step in range(2, 1_000_000):
            save_filled(tmp_path, step - step % 2, fill=step)  # each second one replaces the one before
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0.02, 0.2))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    checkpoint, reports = latest(tmp_path)
    assert fill_of(checkpoint) - checkpoint.step in (0, 1)
    assert reports == []
    save_filled(tmp_path, checkpoint.step + 2)
    assert fill_of(latest(tmp_path)[0]) == checkpoint.step + 2
    assert not [name for name in names(tmp_path) if name.startswith(".")]


FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


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
            save_filled(folder, 20, fill=3, keep_last=1)
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
            save_filled(folder, 10, fill=1)
        existing = save_filled(folder, 20, fill=2)
        if replaced == "invalid":
            os.truncate(existing / "optimizer_00000.safetensors", 50)
        outcomes.append(save_failing_before(len(outcomes) + 1, how, folder))
        checkpoint, _ = latest(folder)
        assert fill_of(checkpoint) in ({1, 3} if replaced == "invalid" else {2, 3})
        assert (outcomes[-1] != 0) or fill_of(checkpoint) == 3
        if replaced != "invalid":
            for path in folder.glob("step_*"):
                Checkpoint(path).verify()  # nothing half deleted under a checkpoint's name
        save_filled(folder, 30, keep_last=1)
        assert names(folder) == ["step_00000030"]
    assert len(outcomes) > 25
    assert set(outcomes) <= ({0, 1} if how == "dies" else {0, 2, 3})
