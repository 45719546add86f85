"""The gates of a memory rule from their logits.

Shape letters: B batch, T tokens, H value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.memory.dispatch import runs_kernels


def gates_of_logits(
    b_BTH: Tensor,
    decay: tuple[Tensor, Tensor, Tensor] | None,
    valid: Tensor | None,
    negative_eigenvalues: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """log_decay = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), or 2 sigmoid(b) with
    ``negative_eigenvalues`` (method: a = exp(-exp(A_log) softplus(W_a x + dt_bias))).

    ``decay`` is (a ``[B, T, H]``, A_log ``[H]``, dt_bias ``[H]``); None where nothing decays: log_decay is 0.
    Where ``valid`` ``[B, T]`` is False, a pad, both gates are 0. They are ``[B, T, H]`` in the type of
    ``b_BTH``, which is at least float32. Raises ConfigError as ``choose`` does.
    """
    if runs_kernels(b_BTH, backend):
        from sleeptrain.memory.kernels.gates import fused_gates

        return fused_gates(b_BTH, decay, valid, negative_eigenvalues)
    beta = torch.sigmoid(b_BTH)
    log_decay = torch.zeros_like(beta)
    if decay is not None:
        a_BTH, A_log, dt_bias = decay
        rates = F.softplus(a_BTH + dt_bias.to(beta.dtype))
        log_decay = -A_log.to(beta.dtype).exp() * rates
    if negative_eigenvalues:
        beta = 2 * beta
    if valid is not None:
        beta, log_decay = (g.masked_fill(~valid[..., None], 0.0) for g in (beta, log_decay))
    return log_decay, beta
