"""What megatron-core and DeepSpeed need for a run on the CPU, whatever else the machine has; nothing of this
is entered on CUDA.

First the official ways: a TorchFunctionMode for the schedules' ``device="cuda"``, a communicator of our
own, a compatibility table of DeepSpeed. One function has to be patched, for sequence parallelism alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` of factory calls."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@contextmanager
def cuda_means_cpu(device: torch.device) -> Iterator[None]:
    """Around calls of megatron-core that allocate on "cuda" or on the current CUDA device, where the run's
    ``device`` is another."""
    if device.type == "cuda":
        yield
        return
    with _CudaMeansCpu(), mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")):
        yield


def prepare_deepspeed(device: torch.device) -> None:
    """Before the first import of ``deepspeed``'s engine: without this it takes a GPU where it finds one, and
    for a run on the CPU compiles a collective that training does not use, for a minute, and fails where there
    is no compiler."""
    import os

    if device.type == "cuda":
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
