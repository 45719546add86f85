"""Every test runs on one thread, with deterministic kernels and the same seed."""

import os
import signal
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic cuBLAS refuses to run

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

torch.set_num_threads(1)
# In a forked child, two threads that are the first to use torch at once break its pool.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore what tests send
torch.use_deterministic_algorithms(True)


class ByFile(LoadScopeScheduling):
    """The tests of a file run in one process, since they share what it starts; and those of all files that
    start Ray, since what runs on a node may want no other Ray there."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if "_ray" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, so that a test does not depend on the tests before it."""
    torch.manual_seed(0)
