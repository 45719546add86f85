"""What each process of a run says, in ``logs/rank_<r>.log``; the first one says it on the terminal too.

Secrets of the environment are left out, as they come in messages of libraries.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sleeptrain.engine.secrets import hide, secrets
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
        before, known = (sys.stdout, sys.stderr), secrets()
        descriptors: list[tuple[int, int]] = []
        if rank == 0:
            sys.stdout, sys.stderr = _Tee(before[0], file, known), _Tee(before[1], file, known)
        else:
            sys.stdout, sys.stderr = _Tee(None, file, known), _Tee(None, file, known)
            descriptors = [(number, os.dup(number)) for number in (1, 2)]
            for number, _ in descriptors:  # also what libraries write past Python
                os.dup2(file.fileno(), number)
        try:
            yield path
        except Exception as error:
            expected = isinstance(error, (ConfigError, RunError))
            file.write(hide(f"error: {error}\n" if expected else traceback.format_exc(), known))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for number, saved in descriptors:
                os.dup2(saved, number)
                os.close(saved)


class _Tee:
    """A stream that also writes to a file, or only there; a progress bar that overwrites itself stays out of
    it."""

    def __init__(self, stream: TextIO | None, file: TextIO, known: dict[str, str]) -> None:
        self._stream, self._file, self._known = stream, file, known

    def write(self, text: str) -> int:
        text = hide(text, self._known)
        if "\r" not in text:
            self._file.write(text)
        return self._stream.write(text) if self._stream else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream or self._file, name)
