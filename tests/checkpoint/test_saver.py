import os
import resource
import sys
import threading

import pytest
import torch
from cuts import save_filled, save_groups, wholes

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
    values = torch.randn(12_000_000)  # above what malloc keeps and hands out again

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
