"""Saves by several real processes: one checkpoint, or none and a word to every process."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.slices import Slice, whole

ROWS, COLUMNS = 24, 5
MATRIX = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)


def start(num_ranks, work):
    """Forks ``work(rank, barrier)``; what it returns becomes the exit code."""
    barrier = multiprocessing.get_context("fork").Barrier(num_ranks, timeout=60)
    children = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = work(rank, barrier) or 0
            finally:
                os._exit(code)
        children.append(pid)
    return children


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(num_ranks, work):
    return [exit_code(child) for child in start(num_ranks, work)]


def slices(rank, num_ranks, fill):
    """Of the matrix each process has a range of a box of columns; the last one alone has the vector."""
    left = num_ranks // 2
    columns = (0, COLUMNS) if num_ranks == 1 else (0, 2) if rank < left else (2, COLUMNS)
    group = [r for r in range(num_ranks) if (r < left) == (rank < left)]
    values = (MATRIX + fill)[:, slice(*columns)].reshape(-1)
    edges = [len(values) * i // len(group) for i in range(len(group) + 1)]
    own = slice(edges[group.index(rank)], edges[group.index(rank) + 1])
    found = {"model": [Slice("w", (ROWS, COLUMNS), ((0, ROWS), columns), own.start, values[own])]}
    if rank == num_ranks - 1:
        found["optimizer"] = [whole("w/m", torch.full((7,), float(fill)))]
    return found


def saver_of(folder, rank, num_ranks, barrier, **options):
    return Saver(folder, 2, 0, rank, num_ranks, barrier.wait, **options)


def save(saver, step, fill=None):
    fill = step if fill is None else fill
    saver.save(step, slices(saver.rank, saver.world_size, fill), {"trainer": {"fill": fill}})
    return saver.wait()


def save_by_all(folder, num_ranks, step, fill=None):
    def work(rank, barrier):
        saver = saver_of(folder, rank, num_ranks, barrier)
        return save(saver, step, fill) is not None or saver.committed_step != step

    assert run(num_ranks, work) == [0] * num_ranks


def fill_of(checkpoint):
    """What all of it holds; fails if its parts disagree."""
    fill = checkpoint.documents["trainer"]["fill"]
    assert torch.equal(checkpoint.read("model", "w"), MATRIX + fill)
    assert torch.equal(checkpoint.read("optimizer", "w/m"), torch.full((7,), float(fill)))
    return fill


def latest(folder):
    return store.find_latest(folder, print)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_what_several_processes_hold_becomes_one_checkpoint(tmp_path, num_ranks):
    save_by_all(tmp_path, num_ranks, 3)
    checkpoint = latest(tmp_path)
    assert fill_of(checkpoint) == checkpoint.step == 3
    assert names(tmp_path) == ["step_00000003"]
    tensors = [f"model_{rank:05d}.safetensors" for rank in range(num_ranks)]
    tensors.append(f"optimizer_{num_ranks - 1:05d}.safetensors")
    assert names(checkpoint.path) == ["manifest.json", *tensors, "trainer.json"]


def test_nothing_but_names_of_files_tells_how_many_wrote(tmp_path):
    for num_ranks in (1, 4):
        save_by_all(tmp_path / str(num_ranks), num_ranks, 3)
    one, four = (json.loads((tmp_path / n / "step_00000003/manifest.json").read_text()) for n in "14")
    assert one.keys() == four.keys()
    for group, tensors in one["groups"].items():
        for name, entry in tensors.items():
            other = four["groups"][group][name]
            assert (entry["shape"], entry["dtype"]) == (other["shape"], other["dtype"])
            assert entry["slices"][0].keys() == other["slices"][0].keys()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_full_disk_of_one_is_told_to_all_and_the_next_save_works(tmp_path, failing):
    folder = tmp_path / "checkpoints"
    save_by_all(folder, 3, 1)

    def work(rank, barrier):
        saver = saver_of(folder, rank, 3, barrier)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, unlimited[1]))
        failure = save(saver, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert saver.committed_step == 0
        (tmp_path / f"said_{rank}").write_text(str(failure))
        barrier.wait()
        if rank == 0:
            assert fill_of(latest(folder)) == 1
        return save(saver, 3) is not None

    assert run(3, work) == [0] * 3
    own = (tmp_path / f"said_{failing}").read_text()
    assert own.startswith(f"saving step_00000002 in {folder} failed in process {failing} (File too large); ")
    for rank in range(3):
        said = (tmp_path / f"said_{rank}").read_text()
        assert said == own or "another process gave it up" in said  # there was no room for the reason
    assert names(folder) == ["step_00000001", "step_00000003"]
    assert fill_of(latest(folder)) == 3


def test_the_reason_of_one_is_told_by_all(tmp_path):
    """A slice that two processes claim is found by the first alone; each tells the same sentence."""

    def work(rank, barrier):
        saver = saver_of(tmp_path / "checkpoints", rank, 3, barrier)
        saver.save(2, {"model": [whole("w", torch.ones(3))] if rank else []}, {})
        (tmp_path / f"said_{rank}").write_text(str(saver.wait()))

    assert run(3, work) == [0] * 3
    [said] = {(tmp_path / f"said_{rank}").read_text() for rank in range(3)}
    assert "failed in process 0 (tensor w of model is not whole: elements are held twice)" in said


def test_a_folder_that_cannot_be_made_is_told_by_all(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")

    def work(rank, barrier):
        failure = save(saver_of(tmp_path / "checkpoints", rank, 2, barrier), 2)
        return 0 if ("File exists" if rank == 0 else "process 0 could not begin it") in str(failure) else 1

    assert run(2, work) == [0, 0]


def test_a_process_killed_in_the_middle_commits_nothing_and_the_others_do_not_wait_for_ever(tmp_path):
    save_by_all(tmp_path, 3, 1)

    def work(rank, barrier):
        saver = saver_of(tmp_path, rank, 3, barrier, patience_seconds=1.0)
        if rank == 1:
            kill_before_operation(2, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
        failure = str(save(saver, 2))
        return 0 if "written_00001.json did not come in time" in failure else 1

    assert run(3, work) == [0, -signal.SIGKILL, 0]
    assert fill_of(latest(tmp_path)) == 1
    save_by_all(tmp_path, 2, 2)  # as a smaller group
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert fill_of(latest(tmp_path)) == 2


@pytest.mark.parametrize("seed", range(4))
def test_all_killed_at_any_moment_leave_a_whole_checkpoint(tmp_path, seed):
    save_by_all(tmp_path, 2, 1)

    def work(rank, barrier):
        saver = saver_of(tmp_path, rank, 2, barrier)
        for step in range(2, 1_000_000):
            assert save(saver, step - step % 2, fill=step) is None  # each second one replaces the one before

    children = start(2, work)
    time.sleep(random.Random(seed).uniform(0.02, 0.2))
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert [exit_code(child) for child in children] == [-signal.SIGKILL] * 2
    checkpoint = latest(tmp_path)
    assert fill_of(checkpoint) - checkpoint.step in (0, 1)
    save_by_all(tmp_path, 3, checkpoint.step + 2)
    assert fill_of(latest(tmp_path)) == checkpoint.step + 2
    assert not [name for name in names(tmp_path) if name.startswith(".")]


FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def kill_before_operation(number, folder, act):
    """Runs ``act`` in this process before its ``number``-th file operation below ``folder``."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in FILE_OPERATIONS and str(folder) in str(arguments[0]):
            count += 1
            if count == number:
                act()

    sys.addaudithook(hook)  # cannot be removed, hence only in children
    return lambda: count


def full_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["dies", "fails"])
@pytest.mark.parametrize("failing", [0, 1])
def test_no_file_operation_of_any_process_can_lose_the_last_whole_checkpoint(tmp_path, how, failing):
    """As in tests/checkpoint/test_saver.py; when one process dies, its launcher ends the other."""
    codes, number = [], 0
    while codes != [0, 0]:
        number += 1
        folder = tmp_path / str(number)
        save_by_all(folder, 2, 20, fill=1)
        codes = save_with_one_failing(folder, failing, number, how)
        fill = fill_of(latest(folder))
        assert fill in (1, 3)
        if how == "fails" and codes[1 - failing] == 2:
            assert fill == 1  # the other was told that there is no checkpoint, and there is none
        for path in folder.glob("step_*"):
            Checkpoint(path).verify()
        save_by_all(folder, 2, 30)
        assert [name for name in names(folder) if name != "step_00000020"] == ["step_00000030"]
    assert fill_of(Checkpoint(folder / "step_00000030")) == 30
    assert number > (15 if failing == 0 else 3)


def save_with_one_failing(folder, failing, number, how):
    """Exit codes: 0 nothing failed, 2 told of a failure, 3 it failed where failing does not matter."""

    def work(rank, barrier):
        saver = saver_of(folder, rank, 2, barrier)
        count = int
        if rank == failing:
            act = full_disk if how == "fails" else lambda: os._exit(1)
            count = kill_before_operation(number, folder, act)
        if save(saver, 20, fill=3) is not None:
            return 2
        return 3 if count() >= number else 0

    children = start(2, work)
    code = exit_code(children[failing])
    if code == 1:
        os.kill(children[1 - failing], signal.SIGKILL)
    codes = {failing: code, 1 - failing: exit_code(children[1 - failing])}
    return [codes[0], codes[1]]
