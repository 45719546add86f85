"""A test file as a script: Triton reads TRITON_INTERPRET when it is imported, so all problems of a file run
in one process of its own, which prints what it found as JSON."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any


def interpreted(file: str, *arguments: str) -> Any:
    """What the script finds where Triton interprets its kernels; a warning is an error."""
    return _run(["-W", "error", file, *arguments], {"TRITON_INTERPRET": "1"})


def compiled(file: str) -> Any:
    """What it finds where Triton compiles them anew."""
    with tempfile.TemporaryDirectory() as folder:
        return _run([file], {"TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"})


def _run(arguments: list[str], environment: dict[str, str]) -> Any:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
