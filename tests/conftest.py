"""Every test runs on one thread, with deterministic kernels and the same seed."""

import os
import signal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic cuBLAS refuses to run

import pytest
import torch

torch.set_num_threads(1)
# In a forked child, two threads that are the first to use torch at once break its pool.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore what tests send
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, so that a test does not depend on the tests before it."""
    torch.manual_seed(0)
