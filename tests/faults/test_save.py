"""R2, R9: a crash or a full disk at any point of a save.

``tests/distributed/test_checkpoint.py`` does the same to one of several processes that save together.
"""

import contextlib
import ctypes
import errno
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from cuts import fill_of, save_filled
from e2e_runs import compare_runs
from fault_runs import EVERY_STEPS, Moment, before_step, output_path, train

from sleeptrain.checkpoint import store
from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint

# What the interpreter is asked for, by the names of its functions in C.
OPERATIONS = {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "scandir", "listdir"}
UNDISTURBED, ENDED_BY_FAULT, TOLD, WITHOUT_EFFECT = 0, 1, 2, 3
NO_MOUNT = 4
LIMIT_BYTES = 8000  # more than the metrics of such a run, less than its weights


def in_child(work: Callable[[], int | None]) -> int:
    """Runs ``work`` in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def latest(folder: Path) -> Checkpoint:
    found = store.find_latest(folder, print)
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def profiled(see: Callable[[str, Any], None]) -> None:
    """``see`` hears of every file operation of this process before it, with the object it is a method of."""

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in OPERATIONS:
            see(function.__name__, function.__self__)

    threading.setprofile(profile)
    sys.setprofile(profile)


def save_disturbed(operation: int, act: Callable[[], Any], folder: Path) -> int:
    """Saves step 20 in a child that does ``act`` before its ``operation``-th file operation."""

    def work() -> int:
        count = 0

        def see(name: str, owner: Any) -> None:
            nonlocal count
            count += 1
            if count == operation:
                act()

        os.fsync = fsync
        profiled(see)
        try:
            save_filled(folder, 20, fill=3, keep_last=1)
        except CheckpointError:
            return TOLD
        return UNDISTURBED if count < operation else WITHOUT_EFFECT

    return in_child(work)


fsync = os.fsync


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, not its children, leaves it to the system when to write: hundreds of saves are faster."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def die() -> None:
    os._exit(ENDED_BY_FAULT)


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.more
@pytest.mark.parametrize("act", [die, fill_the_disk])
@pytest.mark.parametrize("replaced", ["invalid", "valid", "only"])
def test_no_file_operation_can_lose_the_last_whole_checkpoint(
    tmp_path: Path, act: Callable[[], None], replaced: str, unforced: None
) -> None:
    """R2, R9: the process dies, or the disk is full, before each operation of a save in turn.

    The save takes the place of a checkpoint of the same step: a damaged one, a whole one beside an earlier
    one, or the only one.
    """
    outcomes: list[int] = []
    if replaced != "only":
        save_filled(tmp_path / "before", 10, fill=1)
    existing = save_filled(tmp_path / "before", 20, fill=2)
    if replaced == "invalid":
        os.truncate(existing / "optimizer_00000.safetensors", 50)
    while UNDISTURBED not in outcomes:
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / str(len(outcomes))))
        outcomes.append(save_disturbed(len(outcomes) + 1, act, folder))
        fill = fill_of(latest(folder))
        assert fill in ({1, 3} if replaced == "invalid" else {2, 3})
        assert outcomes[-1] != UNDISTURBED or fill == 3
        if replaced != "invalid":
            for path in folder.glob("step_*"):
                Checkpoint(path).verify()  # nothing half written or deleted has a checkpoint's name
        save_filled(folder, 30, keep_last=1)
        assert names(folder) == ["step_00000030"]  # what was left over is gone
    assert len(outcomes) > 40
    wanted = {UNDISTURBED, ENDED_BY_FAULT} if act is die else {UNDISTURBED, TOLD, WITHOUT_EFFECT}
    assert set(outcomes) == wanted


def test_the_walk_through_the_operations_notices_a_careless_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unforced: None
) -> None:
    """Negative control of R2: one that removes the old checkpoint and then renames the new one loses both."""

    def commit(temporary: Path, target: Path) -> None:
        if target.exists():
            store.delete(target)
        temporary.rename(target)

    monkeypatch.setattr(store, "commit", commit)
    outcomes, num_lost = [], 0
    while UNDISTURBED not in outcomes:
        folder = tmp_path / str(len(outcomes))
        save_filled(folder, 20, fill=2)
        outcomes.append(save_disturbed(len(outcomes) + 1, die, folder))
        num_lost += store.find_latest(folder, print) is None
    assert num_lost > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, seed: int) -> None:
    """R2: from outside, while saves follow each other; each second one replaces the one before."""
    save_filled(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        for step in range(2, 1_000_000):
            save_filled(tmp_path, step - step % 2, fill=step)
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0.02, 0.2))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    checkpoint = latest(tmp_path)
    assert fill_of(checkpoint) - checkpoint.step in (0, 1)
    save_filled(tmp_path, checkpoint.step + 2)
    assert fill_of(latest(tmp_path)) == checkpoint.step + 2
    assert not [name for name in names(tmp_path) if name.startswith(".")]


Log = list[tuple[str, Path]]


def log_of_a_save(folder: Path, lost: str = "") -> Log:
    """What is written, forced to the disk and renamed, in order; without what the disk forgets: the forcing
    of paths that end in ``lost``."""
    log: Log = []
    rename = os.rename

    def see(name: str, owner: Any) -> None:
        if name == "write":
            log.append(("write", Path(owner.name)))

    def logged_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not lost or not path.match(lost):
            log.append(("fsync", path))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", Path(target)))
        rename(source, target)

    os.fsync, os.rename = logged_fsync, logged_rename  # type: ignore[assignment]
    profiled(see)
    try:
        save_filled(folder, 20)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        os.fsync, os.rename = fsync, rename
    return log


def check_order(log: Log, folder: Path) -> None:
    """A file is on the disk with its last byte, then the names in its folder, then that folder is named, and
    then its name is on the disk."""
    committed = log.index(("rename", folder / "step_00000020"))
    written = [path for what, path in log[:committed] if what == "write" and path.suffix != ""]
    files = {path for path in written if not path.name.startswith(".written")}
    assert {path.name for path in files} >= {"manifest.json", "trainer.json", "model_00000.safetensors"}
    [temporary] = {path.parent for path in files}
    for path in files:
        last_write = max(i for i, entry in enumerate(log) if entry == ("write", path))
        forced = log.index(("fsync", path), last_write)
        assert forced < log.index(("fsync", temporary), forced) < committed
    assert ("fsync", folder) in log[committed:]
    assert ("fsync", folder.parent) in log[:committed]


@pytest.mark.parametrize("lost", ["", "manifest.json", "model_*", ".tmp_step_*", "checkpoints"])
def test_what_a_commit_names_is_on_the_disk_before(tmp_path: Path, lost: str) -> None:
    """R2, for a crash of the machine, which forgets all that was not forced to the disk. ``lost``: the
    negative controls, in which one kind of file or folder is not."""
    folder = tmp_path / "checkpoints"
    log = log_of_a_save(folder, lost)
    if lost:
        with pytest.raises((AssertionError, ValueError)):
            check_order(log, folder)
    else:
        check_order(log, folder)


FIRST_FULL_STEP, LAST_FULL_STEP = 7, 17  # the saves of steps 10 and 15 fail


def check_the_run_went_on(folder: Path, reference: Path, reason: str) -> None:
    output = output_path(folder).read_text()
    for step in (10, 15):
        assert re.search(
            rf"warning: saving step_{step:08d} in .* failed \({reason}\).*training goes on", output
        )
    assert output.count("warning:") == 2
    assert (folder / "seen_while_full").read_text() == "['step_00000005']"  # whole, and nothing beside it
    assert compare_runs(folder, reference) == ""


def look_at_checkpoints(folder: Path) -> None:
    """While the disk is full: which names are there, after a look at the only checkpoint."""
    found = latest(folder / "checkpoints")
    assert found.step == EVERY_STEPS
    (folder / "seen_while_full").write_text(str(names(folder / "checkpoints")))


@pytest.mark.more
def test_a_run_goes_on_while_no_file_can_grow(tmp_path: Path, reference: Path) -> None:
    """R9: ``RLIMIT_FSIZE`` cuts every write short for ten steps. The run warns, keeps its old checkpoint and
    no part of a new one, and saves again at the next occasion."""
    folder = tmp_path / "run"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, unlimited[1]))

    def lift() -> None:
        look_at_checkpoints(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    def sabotage(moment: Moment) -> None:
        before_step(FIRST_FULL_STEP, limit)
        before_step(LAST_FULL_STEP, lift)

    assert train(folder, sabotage=sabotage) == 0
    check_the_run_went_on(folder, reference, "File too large")


@pytest.mark.more
def test_a_run_goes_on_while_its_disk_is_full(tmp_path: Path, reference: Path) -> None:
    """R9: the same on a small disk that is really full."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    ballast = folder / "checkpoints" / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free() -> None:
        ballast.unlink()
        look_at_checkpoints(folder)

    def sabotage(moment: Moment) -> None:
        before_step(FIRST_FULL_STEP, fill)
        before_step(LAST_FULL_STEP, free)

    def on_a_small_disk() -> int:
        if not mount_small_disk(folder / "checkpoints"):
            return NO_MOUNT
        assert train(folder, sabotage=sabotage) == 0
        check_the_run_went_on(folder, reference, "No space left on device")
        return 0

    code = in_child(on_a_small_disk)
    if code == NO_MOUNT:
        pytest.skip("this system lets nobody mount a file system")
    assert code == 0, output_path(folder).read_text()


def mount_small_disk(folder: Path) -> bool:
    """Visible to this process and its children alone; False where the system does not allow it."""
    libc, ids = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000
    if libc.unshare(new_mounts) != 0:
        if libc.unshare(new_mounts | new_user) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        for name, own in zip(("uid_map", "gid_map"), ids):
            Path(f"/proc/self/{name}").write_text(f"0 {own} 1")
    libc.mount(b"none", b"/", None, private, None)
    return libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=1m") == 0
