"""Files that survive a crash of the process, of the machine, and a full disk that says so."""

import os
from pathlib import Path

CHUNK_BYTES = 8 * 2**20


def write_new(path: Path, *parts: bytes | memoryview) -> None:
    """Writes ``parts`` in a row to a file that must not exist yet and forces it to the disk."""
    with path.open("xb", buffering=0) as file:
        for data in parts:
            part, written = memoryview(data), 0
            while written < len(part):
                size = file.write(part[written : written + CHUNK_BYTES]) or 0
                _start_writeback(file.fileno(), size)
                written += size
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


def _start_writeback(descriptor: int, size: int) -> None:
    """Lets the disk begin with what was just written, so that fsync finds little left to do."""
    if size == CHUNK_BYTES and hasattr(os, "posix_fadvise"):
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.posix_fadvise(descriptor, end - size, size, os.POSIX_FADV_DONTNEED)
