"""The small parts of a block: norm, rotary positions, gated MLP.

Shape letters: B batch, T tokens, D model width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, times a weight; zero-centred, times 1 + weight."""

    def __init__(self, dim: int, eps: float, zero_centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centred else torch.ones(dim))
        self.eps, self.zero_centred = eps, zero_centred

    @property
    def factor(self) -> Tensor:
        """What multiplies the normalised input ``[dim]``."""
        return 1 + self.weight if self.zero_centred else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.factor, self.eps)


class Float32Linear(nn.Linear):
    """A linear map in at least float32, also under autocast or with weights of less: for gate logits."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype))


def in_compute_type(x: Tensor) -> Tensor:
    """As autocast would cast it for a linear map: for several of them, once."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = in_compute_type(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign of its half, ``[B, T, 1, rotary_dim]``, at ``positions`` ``[B, T]``."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    angles = positions[..., None, None].to(torch.float64) * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``x`` ``[B, T, H, head_dim]``, halves paired (RoFormer, arXiv 2104.09864). What the
    table is too short for stays as it is."""
    cos, sin = table
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        first = rotate(x[..., :rotary_dim], table) if rotary_dim else x[..., :0]
        return torch.cat([first, x[..., rotary_dim:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)
