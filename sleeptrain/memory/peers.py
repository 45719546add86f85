"""The rules by kernels that others wrote, where they are installed: ``fla`` (flash-linear-attention, package
fla-core) and ``flash_qla`` (FlashQLA, package flash-qla). Nothing of them is imported before they run.

Both take what the contract of ``rule.py`` hands over as it is: log decays, value heads in consecutive groups,
the state [B, Hv, K, V] in float32 with gradients at both ends. Both would scale q, so they are told not to,
and neither can leave the reading out, so without queries it reads by the keys and what it read is dropped.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

PACKAGES = {"fla": "fla-core==0.6.0", "flash_qla": "flash-qla==0.1.3"}  # the module, what pip calls it
TYPES = (torch.float16, torch.bfloat16)  # float32 they would multiply as TF32, or not at all
MAX_FLA_KEY_DIM = 256
FLASH_QLA_DIM = 128
FLASH_QLA_DEVICES = ((9, 0), (10, 0), (10, 3), (12, 0), (12, 1))  # compute capabilities: Hopper, Blackwell


def obstacle_to_peer(
    name: str, device_type: str, dtype: torch.dtype, key_dim: int, value_dim: int, rule: str
) -> str | None:
    """Why the library of this name cannot run, if it cannot."""
    if device_type != "cuda":
        return f"{name} needs a CUDA device, and the tensors are on {device_type}"
    if find_spec(name) is None:
        return f"{name} is not installed (pip install {PACKAGES[name]})"
    if dtype not in TYPES:
        return f"{name} takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if name == "fla":
        too_large = key_dim > MAX_FLA_KEY_DIM
        return f"fla takes key sizes up to {MAX_FLA_KEY_DIM}, not {key_dim}" if too_large else None
    if (key_dim, value_dim) != (FLASH_QLA_DIM, FLASH_QLA_DIM):
        return f"flash_qla takes keys and values of size {FLASH_QLA_DIM}, not {key_dim} and {value_dim}"
    if rule != "gated_delta":
        return f"flash_qla has the rule gated_delta, not {rule}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() not in FLASH_QLA_DEVICES:
        return f"flash_qla is for Hopper and Blackwell, and the device is {torch.cuda.get_device_name()}"
    return None


def by_fla(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str = "gated_delta",
) -> tuple[Tensor | None, Tensor]:
    """The contract of ``rule.py`` by fla's chunked forms of the three rules; it tunes itself by timing."""
    # fla hands its calls to FlashQLA and TileLang where it finds them: here it means its own kernels.
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")
    if rule == "gated_delta":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return _call(chunk_gated_delta_rule, q, k, v, state, g=log_decay.float(), beta=beta.float())
    groups = v.shape[2] // k.shape[2]  # these two know no shared keys
    q, k = None if q is None else _for_value_heads(q, groups), _for_value_heads(k, groups)
    if rule == "delta":
        from fla.ops.delta_rule import chunk_delta_rule

        return _call(chunk_delta_rule, q, k, v, state, beta=beta.float())
    from fla.ops.simple_gla import chunk_simple_gla

    return _call(chunk_simple_gla, q, k, (beta[..., None] * v).to(v.dtype), state, g=log_decay.float())


def by_flash_qla(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    rule: str = "gated_delta",
) -> tuple[Tensor | None, Tensor]:
    """The contract of ``rule.py`` for the rule gated_delta. Of a single sequence it may scan parts side by
    side, and then leaves out what decays have brought below e^-10."""
    from flash_qla import chunk_gated_delta_rule

    assert rule == "gated_delta"
    return _call(chunk_gated_delta_rule, q, k, v, state, g=log_decay.float(), beta=beta.float())


def _call(
    function: Callable, q: Tensor | None, k: Tensor, v: Tensor, state: Tensor, **gates: Tensor
) -> tuple[Tensor | None, Tensor]:
    if v.shape[1] == 0:
        return (None if q is None else torch.zeros_like(v)), state
    k = k.to(v.dtype)
    reads = k.detach() if q is None else q.to(v.dtype)
    ends = {"initial_state": state.float(), "output_final_state": True}
    out, last_state = function(q=reads, k=k, v=v, scale=1.0, **gates, **ends)
    return (None if q is None else out), last_state


def _for_value_heads(x_BTHK: Tensor, groups: int) -> Tensor:
    """A copy of each key head for every value head of its group."""
    return x_BTHK.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3)
