"""What becomes of the reads of a memory rule: a root-mean-square norm, times a gate.

Shape letters: B batch, T tokens, H value heads, V value size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.memory.dispatch import runs_kernels


def gated_rms_norm(
    x_BTHV: Tensor, gate_BTHV: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * ``weight`` * SiLU(gate), the mean over the V columns of a head; ``weight``
    is ``[V]``. In the type of x. Raises ConfigError as ``choose`` does."""
    if runs_kernels(x_BTHV, backend):
        from sleeptrain.memory.kernels.gated_norm import fused_gated_norm

        return fused_gated_norm(x_BTHV, gate_BTHV, weight, eps)
    x = x_BTHV.to(torch.promote_types(x_BTHV.dtype, weight.dtype))  # torch's fast form wants one type
    return (F.rms_norm(x, weight.shape, weight, eps) * F.silu(gate_BTHV)).to(x_BTHV.dtype)
