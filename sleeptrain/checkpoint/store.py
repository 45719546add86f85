"""The folder of checkpoints: commit one atomically, keep the right ones, find the newest that is whole.

    checkpoints/step_00000200/   model_00000.safetensors ... trainer.json ... manifest.json
    checkpoints/.tmp_*           being written or deleted
    checkpoints/.failed_step_*   a save that failed: why, until the next one
    checkpoints/.old_step_*      moved aside until its successor has its name
    checkpoints/damaged_step_*   could not be read; the run went on from an earlier one

Tensors are safetensors, everything else is JSON; nothing is pickled. One run writes at a time (the run lock).
"""

import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint

TEMPORARY, FAILED, DAMAGED = ".tmp_", ".failed_", "damaged_"
DELETED = TEMPORARY + "deleted_"


def find_latest(
    checkpoints_dir: Path, report: Callable[[str], None], set_aside: bool = False
) -> Checkpoint | None:
    """The newest whole checkpoint, every byte of which was just read; None if there is none at all.

    ``report`` gets one sentence for each newer one that is damaged. With ``set_aside``, for the owner of the
    run, these are renamed ``damaged_step_*`` once a whole one is found, so that they take no place among
    those kept. Raises CheckpointError if all are damaged: a run must not start again from zero unasked.
    """
    folders = _checkpoints(checkpoints_dir)
    damaged: list[Path] = []
    for folder, following in zip(folders, [*folders[1:], None]):
        try:
            found = Checkpoint(folder)
            found.verify()
        except CheckpointError as error:
            report(
                f"checkpoint skipped: {error}; {f'trying {following.name}' if following else 'none is left'}"
            )
            damaged.append(folder)
            continue
        for path in damaged if set_aside else []:
            target = path.with_name(DAMAGED + path.name.removeprefix(manifest.ASIDE))
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
        return found
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints in {checkpoints_dir} is usable; "
            "move that folder away to start anew"
        )
    return None


def peek(checkpoints_dir: Path) -> Checkpoint | None:
    """The newest whose manifest and documents are whole; nothing is known yet of its tensors."""
    for folder in _checkpoints(checkpoints_dir):
        with suppress(CheckpointError):
            return Checkpoint(folder)
    return None


def begin(checkpoints_dir: Path, step: int) -> Path:
    """Makes the temporary folder of a new save; what an earlier one left loses its name. Raises OSError."""
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    for left in checkpoints_dir.glob(f"{TEMPORARY}step_*"):
        _take_name(left)
    temporary = checkpoints_dir / f"{TEMPORARY}{manifest.step_name(step)}_{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def begun(checkpoints_dir: Path, step: int) -> Path | None:
    """The temporary folder that ``begin`` made for this step, seen from another process."""
    return next(checkpoints_dir.glob(f"{TEMPORARY}{manifest.step_name(step)}_*"), None)


def is_given_up(checkpoints_dir: Path, step: int) -> bool:
    """Whether a save of this step failed before this process looked for it."""
    return any(checkpoints_dir.glob(f"{FAILED}{manifest.step_name(step)}_*"))


def commit(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name, in the place of a checkpoint of the same step. Raises OSError.

    It lasts once the folder of checkpoints is forced to the disk.
    """
    if target.exists():
        target.rename(target.with_name(manifest.ASIDE + target.name))
    temporary.rename(target)


def give_up(temporary: Path) -> Path:
    """The folder to which a failed save goes: without its temporary folder nobody can finish it."""
    failed = temporary.with_name(FAILED + temporary.name.removeprefix(TEMPORARY))
    with suppress(OSError):  # another process was first
        temporary.rename(failed)
    return failed


def settle(checkpoints_dir: Path) -> None:
    """Ends what a crash or a failure interrupted, and removes what is left of it.

    The folder of a save that was begun is left alone. Raises OSError.
    """
    restore(checkpoints_dir)
    for pattern in (f"{DELETED}*", f"{FAILED}step_*"):
        for path in checkpoints_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def restore(checkpoints_dir: Path) -> None:
    """A checkpoint that was moved aside and has no successor gets its name back. Raises OSError."""
    for aside in checkpoints_dir.glob(f"{manifest.ASIDE}step_*"):
        target = aside.with_name(aside.name.removeprefix(manifest.ASIDE))
        if target.exists():
            delete(aside)
        else:
            aside.rename(target)


def retain(checkpoints_dir: Path, newest_step: int, keep_last: int, keep_every_steps: int) -> None:
    """Deletes all but the newest ``keep_last`` and the multiples of ``keep_every_steps`` (0: none).

    Steps after ``newest_step`` are left alone and do not count: the run fell back from them because they are
    damaged. Raises OSError.
    """
    folders = {manifest.named_step(folder) or 0: folder for folder in _checkpoints(checkpoints_dir)}
    for step in outdated(list(folders), newest_step, keep_last, keep_every_steps):
        delete(folders[step])


def outdated(steps: list[int], newest_step: int, keep_last: int, keep_every_steps: int) -> list[int]:
    """Which of the steps, newest first, ``retain`` deletes."""
    old = [step for step in steps if step <= newest_step][keep_last:]
    return [step for step in old if not (keep_every_steps and step % keep_every_steps == 0)]


def delete(folder: Path) -> None:
    """Takes the name away first: a crash leaves no half checkpoint that looks like one. Raises OSError."""
    shutil.rmtree(_take_name(folder), ignore_errors=True)


def _take_name(folder: Path) -> Path:
    nameless = folder.with_name(f"{DELETED}{folder.name.strip('.')}_{uuid.uuid4().hex[:8]}")
    return folder.rename(nameless)


def _checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Newest first. One moved aside counts as long as its successor has not taken its name."""
    if not checkpoints_dir.is_dir():
        return []
    folders = [path for path in checkpoints_dir.iterdir() if manifest.named_step(path) is not None]
    names = {path.name for path in folders}
    current = [
        path
        for path in folders
        if not path.name.startswith(manifest.ASIDE) or path.name.removeprefix(manifest.ASIDE) not in names
    ]
    return sorted(current, key=lambda path: manifest.named_step(path) or 0, reverse=True)
