"""The small parts of a block: norm, table of rotary positions, gated MLP.

Shape letters: B batch, T tokens, D model width, H heads.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleeptrain.model.pointwise import UsesPointwise


class RMSNorm(UsesPointwise):
    """Root-mean-square norm over the last dimension, times a weight; zero-centred, times 1 + weight.
    ``is_cast``: for linear maps alone, in the type in which they multiply; none casts it for itself."""

    def __init__(self, dim: int, eps: float, zero_centred: bool = False, is_cast: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centred else torch.ones(dim))
        self.eps, self.zero_centred, self.is_cast = eps, zero_centred, is_cast

    @property
    def factor(self) -> Tensor:
        """What multiplies the normalised input ``[dim]``."""
        return 1 + self.weight if self.zero_centred else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise.rms_norm(x, self.factor, self.eps, compute_type(x) if self.is_cast else None)


class Float32Linear(nn.Linear):
    """A linear map in at least float32, also under autocast or with weights of less: for gate logits."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype))


def cast_linear_maps(module: nn.Module, dtype: torch.dtype) -> None:
    """For inference: the weights of linear maps once, where autocast would cast them for every pass. What
    they compute stays the same; a head that was tied to the embedding has a weight of its own then."""
    for _, linear in linear_maps(module):
        for name, weight in list(linear.named_parameters(recurse=False)):
            setattr(linear, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))


def linear_maps(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Those that autocast lets multiply in its type, by name."""
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear) and not isinstance(each, Float32Linear):
            yield name, each


def compute_type(x: Tensor) -> torch.dtype:
    """What autocast would cast it to for a linear map."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


class GatedMLP(UsesPointwise):
    """SwiGLU: down(silu(gate(x)) * up(x)), ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.pointwise.swiglu(self.gate_proj(x), self.up_proj(x)))


def rotary_table(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the sign of its half, ``[B, T, 1, rotary_dim]``, at ``positions`` ``[B, T]``."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    angles = positions[..., None, None].to(torch.float64) * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
