"""The process that trains under a worker of Ray: ``python -m sleeptrain.cluster.training_process RUN.json``.

It reads what the driver composed, and dies with the worker.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from sleeptrain.cluster.launch import work
from sleeptrain.config import Config
from sleeptrain.schema import from_dict

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(path: str) -> int:
    """Returns the exit code of the training."""
    die_with_parent()
    run = json.loads(Path(path).read_text())
    return work(from_dict(Config, run["config"]), run["frozen"])


def die_with_parent() -> None:
    """Linux kills this process when the thread that started it is gone, however that went."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went a moment earlier
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
