"""Files that survive a crash of the process, of the machine, and a full disk that says so."""

import os
from pathlib import Path


def write_new(path: Path, data: bytes) -> None:
    """Writes ``data`` to a file that must not exist yet and forces it to the disk; raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Forces the names inside ``folder`` to the disk: a rename counts only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Puts ``data`` in the place of ``path``: a reader sees the old content or the new. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash
    write_new(temporary, data)
    temporary.replace(path)
    sync_folder(path.parent)
