"""Which form of the memory rules, and of what stands around them, runs, and why; ``apply`` runs a rule.

``recurrent`` is the reference, ``chunked`` torch on any device, ``triton`` the kernels here, ``fla`` and
``flash_qla`` those of others (``peers.py``). Nothing of a library of kernels is imported before they run.
"""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sleeptrain.memory.chunked import chunked
from sleeptrain.memory.peers import PACKAGES, by_fla, by_flash_qla, obstacle_to_peer
from sleeptrain.memory.rule import recurrent
from sleeptrain.schema import ConfigError

MAX_KEY_DIM = 256  # of the kernels: a program holds all key rows of its part of the state in registers
KERNELS = ("triton", *PACKAGES)  # what kernels/check.py proves on a device
TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """``backend`` is recurrent, chunked or one of KERNELS; ``reason`` completes "runs because"."""

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
    chosen = choose(v.device.type, v.dtype, k.shape[-1], backend, v.shape[-1], rule).backend
    return implementation(chosen)(q, k, v, log_decay, beta, state, rule)


def implementation(backend: str) -> Callable[..., tuple[Tensor | None, Tensor]]:
    """The function that has the contract of ``rule.py``, of a backend that ``choose`` named."""
    if backend == "triton":
        from sleeptrain.memory.kernels.rule import chunked_triton

        return chunked_triton
    return {"recurrent": recurrent, "chunked": chunked, "fla": by_fla, "flash_qla": by_flash_qla}[backend]


def runs_kernels(x: Tensor, backend: str, key_dim: int = 1) -> bool:
    """Whether what stands around the rule (convolution, gates, norm) runs as kernels too, on ``x``: where
    ``choose`` would name ours for the rule, or the rule's are of others. Raises ConfigError as it does."""
    own = "auto" if backend in PACKAGES else backend
    return x.numel() > 0 and choose(x.device.type, x.dtype, key_dim, own).backend == "triton"


@functools.cache
def choose(
    device_type: str,
    dtype: torch.dtype,
    key_dim: int,
    backend: str = "auto",
    value_dim: int | None = None,
    rule: str = "gated_delta",
) -> Choice:
    """The fastest of ours that runs here, or the one asked for. ``dtype`` is that of the values, which are as
    large as the keys if their size is not given.

    Raises ConfigError for one of KERNELS where it cannot run.
    """
    asked = "triton" if backend == "auto" else backend
    found = obstacle(asked, device_type, dtype, key_dim, value_dim or key_dim, rule)
    if backend != "auto":
        if found:
            remedy = "use model.memory_backend=auto or chunked"
            raise ConfigError(f"model.memory_backend={backend} cannot run: {found}; {remedy}")
        return Choice(backend, f"model.memory_backend={backend} asks for it")
    if found:
        return Choice("chunked", found)
    if device_type != "cuda":
        return Choice("chunked", f"Triton is only interpreted on {device_type}")
    return Choice("triton", "the device is CUDA and Triton is installed")


def obstacle(
    backend: str, device_type: str, dtype: torch.dtype, key_dim: int, value_dim: int, rule: str
) -> str | None:
    """Why this backend cannot run, if it cannot."""
    if backend == "triton":
        return _obstacle_to_triton(device_type, dtype, key_dim)
    if backend in PACKAGES:
        return obstacle_to_peer(backend, device_type, dtype, key_dim, value_dim, rule)
    return None


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
