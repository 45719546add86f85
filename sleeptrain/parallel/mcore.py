"""The door to megatron-core: what is used of it, without what its import brings along.

It hands kernels to torch.compile that nothing here calls, and loads wandb for a server that nothing here
starts: half of the time that its import takes, in every process of a run.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def _as_it_is(function: Callable | None = None, **options: Any) -> Callable:
    """In place of torch.compile, called as a decorator with or without options."""
    return function if function is not None else _as_it_is


@contextmanager
def _without_ballast() -> Iterator[None]:
    wandb, there = "wandb", "wandb" in sys.modules
    if not there:
        sys.modules[wandb] = None  # type: ignore[assignment]  # an import of it fails, which is expected there
    try:
        with mock.patch.object(torch, "compile", _as_it_is):
            yield
    finally:
        if not there:
            del sys.modules[wandb]


with _without_ballast():
    from megatron.core import ModelParallelConfig as ModelParallelConfig
    from megatron.core import parallel_state as parallel_state
    from megatron.core import tensor_parallel as tensor_parallel
    from megatron.core.enums import ModelType as ModelType
    from megatron.core.pipeline_parallel import schedules as schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator as P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection as ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig as TransformerConfig
