"""Checkpoints on disk: commit one atomically, keep the right ones, find the newest that is whole.

    checkpoints/step_00000200/   model.safetensors ... trainer.json ... manifest.json
    checkpoints/.tmp_*           being written or deleted
    checkpoints/.old_step_*      moved aside until its successor has its name
    checkpoints/damaged_step_*   could not be read; the run went on from an earlier one

Tensors are safetensors, everything else is JSON; nothing is pickled. One process writes at a time (the run
lock).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.durable import sync_folder, write_new
from sleeptrain.checkpoint.manifest import CheckpointError

TEMPORARY, DAMAGED = ".tmp_", "damaged_"
TENSORS, DOCUMENT = ".safetensors", ".json"


class Checkpoint(NamedTuple):
    """A verified checkpoint: tensors and documents by file name without its ending."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, dict[str, Any]]
    path: Path


def save(
    checkpoints_dir: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    documents: dict[str, dict[str, Any]],
    keep_last: int,
    keep_every_steps: int,
) -> Path:
    """Commits a checkpoint of ``step``, deletes those no longer kept, and returns the new folder.

    ``tensors["model"]`` becomes ``model.safetensors`` (any dtype, shape and device; bits are kept) and
    ``documents["trainer"]`` becomes ``trainer.json`` (string keys; floats are kept exactly). A checkpoint of
    the same step is replaced. Kept are the newest ``keep_last`` (at least 1) and the multiples of
    ``keep_every_steps`` (0: none). Raises CheckpointError when the disk refuses: the earlier checkpoints are
    then as they were.
    """
    target = checkpoints_dir / manifest.step_name(step)
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        sync_folder(checkpoints_dir.parent)  # its own name must last, too
        _settle(checkpoints_dir)
        try:
            temporary = checkpoints_dir / f"{TEMPORARY}{target.name}_{os.getpid()}"
            _write(temporary, step, _encoded(tensors, documents))
            _commit(temporary, target)
        finally:
            _settle(checkpoints_dir)
        _retain(checkpoints_dir, step, keep_last, keep_every_steps)
    except OSError as error:
        raise CheckpointError(
            f"saving {target.name} in {checkpoints_dir} failed ({error.strerror or error}); "
            "the earlier checkpoints are intact; free some space, or lower checkpoint.keep_last"
        ) from error
    return target


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads a checkpoint folder, each file once, onto ``device``; raises CheckpointError if not whole."""
    step, files = manifest.read(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, dict[str, Any]] = {}
    for name, entry in files.items():
        data = manifest.read_file(path, name, entry)
        if name.endswith(TENSORS):
            group = safetensors.torch.load(data)
            tensors[name.removesuffix(TENSORS)] = {key: t.to(device) for key, t in group.items()}
        else:
            documents[name.removesuffix(DOCUMENT)] = json.loads(data)
    return Checkpoint(step, tensors, documents, path)


def find_latest(
    checkpoints_dir: Path, report: Callable[[str], None], set_aside: bool = False
) -> Checkpoint | None:
    """The newest whole checkpoint, on the CPU; None if there is none at all.

    ``report`` gets one sentence for each newer one that is damaged. With ``set_aside``, for the owner of the
    run, these are renamed ``damaged_step_*`` once a whole one is found, so that they take no place among
    those kept. Raises CheckpointError if all are damaged: a run must not start again from zero unasked.
    """
    folders = _checkpoints(checkpoints_dir)
    damaged: list[Path] = []
    for folder, following in zip(folders, [*folders[1:], None]):
        try:
            found = load(folder)
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


def _encoded(
    tensors: dict[str, dict[str, Tensor]], documents: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, bytes]]:
    """(file name, content), one at a time: it takes the memory of two copies of one group of tensors."""
    for name, group in tensors.items():
        copies = {  # safetensors takes neither strided tensors nor two that share memory
            key: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, t in group.items()
        }
        yield name + TENSORS, safetensors.torch.save(copies)
    for name, document in documents.items():
        yield name + DOCUMENT, json.dumps(document, indent=2).encode()


def _write(folder: Path, step: int, contents: Iterator[tuple[str, bytes]]) -> None:
    folder.mkdir()
    entries = {}
    for name, data in contents:
        write_new(folder / name, data)
        entries[name] = manifest.entry_of(data)
    manifest.write(folder, step, entries)
    sync_folder(folder)


def _commit(temporary: Path, target: Path) -> None:
    if target.exists():
        target.rename(target.with_name(manifest.ASIDE + target.name))
    temporary.rename(target)
    sync_folder(target.parent)


def _settle(checkpoints_dir: Path) -> None:
    """Ends what a crash or a failure interrupted: an old checkpoint without successor gets its name back."""
    for aside in checkpoints_dir.glob(f"{manifest.ASIDE}step_*"):
        target = aside.with_name(aside.name.removeprefix(manifest.ASIDE))
        if target.exists():
            _delete(aside)
        else:
            aside.rename(target)
    for temporary in checkpoints_dir.glob(f"{TEMPORARY}step_*"):
        shutil.rmtree(temporary, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Takes the name away first, so that a crash leaves no half checkpoint that looks like one."""
    doomed = folder.with_name(TEMPORARY + folder.name.removeprefix(manifest.ASIDE))
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _retain(checkpoints_dir: Path, newest_step: int, keep_last: int, keep_every_steps: int) -> None:
    """Later steps are left alone and do not count: the run fell back from them because they are damaged."""
    steps = {folder: manifest.named_step(folder) or 0 for folder in _checkpoints(checkpoints_dir)}
    for folder in [folder for folder, step in steps.items() if step <= newest_step][keep_last:]:
        if not (keep_every_steps and steps[folder] % keep_every_steps == 0):
            _delete(folder)
