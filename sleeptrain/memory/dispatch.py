"""Which form of the memory rules, and of what stands around them, runs, and why; ``apply`` runs a rule.

``recurrent`` is the reference, ``chunked`` torch on any device, ``triton`` the kernels. Nothing of triton is
imported before its kernels run.
"""

import functools
import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sleeptrain.memory.chunked import chunked
from sleeptrain.memory.rule import recurrent
from sleeptrain.schema import ConfigError

MAX_KEY_DIM = 256  # of the kernels: a program holds all key rows of its part of the state in registers
TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """``backend`` is recurrent, chunked or triton; ``reason`` completes the sentence "runs because"."""

    backend: str
    reason: str


def apply(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str = "gated_delta",
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """The contract of ``rule.py`` by the backend that ``choose`` names; raises ConfigError as it does."""
    chosen = choose(v.device.type, v.dtype, k.shape[-1], backend).backend
    if chosen == "triton":
        from sleeptrain.memory.kernels.rule import chunked_triton

        return chunked_triton(q, k, v, log_decay, beta, state, rule)
    function = chunked if chosen == "chunked" else recurrent
    return function(q, k, v, log_decay, beta, state, rule)


def runs_kernels(x: Tensor, backend: str, key_dim: int = 1) -> bool:
    """Whether what stands around the rule (convolution, gates, norm) runs as kernels too, on ``x``: where
    ``choose`` would name them for the rule. Raises ConfigError as it does."""
    return x.numel() > 0 and choose(x.device.type, x.dtype, key_dim, backend).backend == "triton"


@functools.cache
def choose(device_type: str, dtype: torch.dtype, key_dim: int, backend: str = "auto") -> Choice:
    """The fastest backend that runs here, or the one asked for. ``dtype`` is that of the values.

    Raises ConfigError for ``triton`` where it cannot run.
    """
    obstacle = _obstacle_to_triton(device_type, dtype, key_dim)
    if backend == "triton" and obstacle:
        raise ConfigError(
            f"model.memory_backend=triton cannot run: {obstacle}; use model.memory_backend=auto or chunked"
        )
    if backend != "auto":
        return Choice(backend, f"model.memory_backend={backend} asks for it")
    if obstacle:
        return Choice("chunked", obstacle)
    if device_type != "cuda":
        return Choice("chunked", f"Triton is only interpreted on {device_type}")
    return Choice("triton", "the device is CUDA and Triton is installed")


def _obstacle_to_triton(device_type: str, dtype: torch.dtype, key_dim: int) -> str | None:
    """Why the kernels cannot run, if they cannot."""
    if device_type != "cuda" and not _is_interpreted():
        return f"Triton kernels need a CUDA device, and the tensors are on {device_type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in TRITON_TYPES:
        return f"Triton kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if key_dim > MAX_KEY_DIM:
        return f"Triton kernels take key sizes up to {MAX_KEY_DIM}, not {key_dim}"
    return None


def _is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
