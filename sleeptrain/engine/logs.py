"""What each process of a run says, in ``logs/rank_<r>.log``; the first one says it on the terminal too."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sleeptrain.schema import ConfigError, RunError


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[Path]:
    """Appends standard output and error to this rank's file, and what ends the run; those of ranks above 0 go
    nowhere else."""
    path = folder / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("a", buffering=1, encoding="utf-8") as file:
        before = sys.stdout, sys.stderr
        if rank == 0:
            sys.stdout, sys.stderr = _Tee(before[0], file), _Tee(before[1], file)
            descriptors: list[tuple[int, int]] = []
        else:  # also what libraries write past Python
            descriptors = [(number, os.dup(number)) for number in (1, 2)]
            for number, _ in descriptors:
                os.dup2(file.fileno(), number)
        try:
            yield path
        except Exception as error:
            expected = isinstance(error, (ConfigError, RunError))
            file.write(f"error: {error}\n" if expected else traceback.format_exc())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for number, saved in descriptors:
                os.dup2(saved, number)
                os.close(saved)


class _Tee:
    """A stream that also writes to a file; a progress bar that overwrites itself stays out of it."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._file.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
