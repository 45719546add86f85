"""The pointwise work between a block's matrix products: plain torch, or each function one kernel.

``compiled`` has torch.compile fuse every function here, with its gradient, so that what enters is read once
and what leaves is written once; in plain torch a norm and its cast, or the rotation of queries, pass over
memory up to six times. ``use`` says which of the two a model runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_FORMS = 64  # of one function that torch.compile may make


def rms_norm(x: Tensor, factor: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * ``factor`` over the last dimension, in ``dtype``, or the type of x."""
    wide = x.to(torch.promote_types(x.dtype, factor.dtype))  # torch's fast form wants one type
    return F.rms_norm(wide, factor.shape, factor, eps).to(dtype or x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


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


class Pointwise(NamedTuple):
    """The three functions above, in one of their forms."""

    rms_norm: Callable[..., Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


PLAIN = Pointwise(rms_norm, swiglu, rotate)


class UsesPointwise(nn.Module):
    """A module that calls them as ``self.pointwise``."""

    pointwise = PLAIN


def compiled(**options: Any) -> Pointwise:
    """Each of them by torch.compile, whose ``options`` these are."""
    # One more form for each size of heads, type, and with and without gradients: more than the default of 8.
    torch._dynamo.config.recompile_limit = max(MAX_FORMS, torch._dynamo.config.recompile_limit)
    return Pointwise(*(torch.compile(function, fullgraph=True, **options) for function in PLAIN))


def use(model: nn.Module, pointwise: Pointwise) -> None:
    """From now on the model's modules call these."""
    for module in model.modules():
        if isinstance(module, UsesPointwise):
            module.pointwise = pointwise
