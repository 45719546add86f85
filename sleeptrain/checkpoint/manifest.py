"""``manifest.json``: what a checkpoint consists of, so that every damage is noticed and named.

It holds the format's name and version, the step, size and SHA-256 of each other file, and the hash of
itself. It is written last: a folder without it is no checkpoint.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from sleeptrain.checkpoint.durable import write_new
from sleeptrain.schema import RunError, flatten

FILE = "manifest.json"
FORMAT = "sleeptrain-checkpoint"
VERSION = 1
ASIDE = ".old_"  # prefix of a checkpoint that was moved aside while its successor takes its name


class CheckpointError(RunError):
    """A checkpoint cannot be written or used; the message names the file and says what is wrong with it."""


class FileEntry(NamedTuple):
    """What the manifest knows about one file."""

    size_bytes: int
    sha256: str


class Manifest(NamedTuple):
    """The parsed manifest: the optimizer step, and the entry of each file."""

    step: int
    files: dict[str, FileEntry]


def step_name(step: int) -> str:
    """Folder name of a checkpoint: 12 -> ``step_00000012``."""
    return f"step_{step:08d}"


def named_step(folder: Path) -> int | None:
    """The step that the folder's name tells, moved aside or not; None for any other name."""
    match = re.fullmatch(r"step_(\d+)", folder.name.removeprefix(ASIDE), re.ASCII)
    return int(match[1]) if match else None


def entry_of(data: bytes) -> FileEntry:
    """The entry of a file with content ``data``."""
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def write(folder: Path, step: int, files: dict[str, FileEntry]) -> None:
    """Writes the manifest of ``folder`` and forces it to the disk; raises OSError."""
    write_new(folder / FILE, _render(step, files))


def read(folder: Path) -> Manifest:
    """Reads the manifest and compares it with the folder's name and file list; raises CheckpointError.

    The contents of the files are not read yet: see ``read_file`` and ``verify``.
    """
    try:
        present = {path.name for path in folder.iterdir()}
        data = (folder / FILE).read_bytes() if FILE in present else None
    except OSError as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error.strerror}") from error
    if data is None:
        raise CheckpointError(f"{folder.name}/{FILE} is missing, so this is no complete checkpoint")
    manifest = _parse(data, f"{folder.name}/{FILE}")
    if named_step(folder) not in (None, manifest.step):
        raise CheckpointError(
            f"{folder.name}/{FILE} belongs to step {manifest.step}, not to the step in the folder's name"
        )
    for name in sorted(manifest.files.keys() - present):
        raise CheckpointError(f"{folder.name}/{name} is missing")
    for name in sorted(present - manifest.files.keys() - {FILE}):
        raise CheckpointError(f"{folder.name}/{name} is not part of the checkpoint (not listed in {FILE})")
    return manifest


def read_file(folder: Path, name: str, entry: FileEntry) -> bytes:
    """The content of one file, equal to what was saved; raises CheckpointError."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder.name}/{name} cannot be read: {error.strerror}") from error
    if len(data) != entry.size_bytes:
        kind = "empty" if not data else "truncated" if len(data) < entry.size_bytes else "too long"
        raise CheckpointError(
            f"{folder.name}/{name} is {kind}: expected {entry.size_bytes} bytes, found {len(data)}"
        )
    if entry_of(data) != entry:
        raise CheckpointError(f"{folder.name}/{name} is damaged: its hash differs from the one in {FILE}")
    return data


def verify(folder: Path) -> None:
    """Reads every file of a checkpoint once and compares it with the manifest; raises CheckpointError."""
    for name, entry in read(folder).files.items():
        read_file(folder, name, entry)


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for each setting that differs in two nested dicts: ``sleep.num_passes: saved 2, now 3``."""
    old, new = flatten(saved), flatten(current)
    return [
        f"{key}: saved {_show(old, key)}, now {_show(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def _show(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "absent"


def _render(step: int, files: dict[str, FileEntry]) -> bytes:
    entries = {name: entry._asdict() for name, entry in sorted(files.items())}
    body = {"format": FORMAT, "version": VERSION, "step": step, "files": entries}
    own_hash = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": own_hash}, indent=2).encode() + b"\n"


def _parse(data: bytes, where: str) -> Manifest:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: it is not JSON ({len(data)} bytes)") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{where} is foreign: its format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has format version {content.get('version')!r}, and this program reads version {VERSION}"
        )
    try:
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(content["step"], files)
        intact = _render(*manifest) == data  # also notices a changed blank or the order of keys
    except (AttributeError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{where} is damaged: its content differs from its own hash")
    return manifest
