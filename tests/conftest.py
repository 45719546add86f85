"""Every test runs on one thread, with deterministic kernels and the same seed."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic cuBLAS refuses to run

import pytest
import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, so that a test does not depend on the tests before it."""
    torch.manual_seed(0)
