"""A sequence as P segments that are scanned side by side, where too few sequences and heads would leave most
of the device idle.

The state after a segment is linear in the state before it, and so are their gradients, in reverse:

    S' = M S + B          B from the scan that starts at 0, M from one that starts at I and writes no values
    dS = M^T dS' + E      E from the reverse scan that starts at 0

These scans need no state of another segment, and with them a short walk finds each segment's own. Then
every segment is scanned as a sequence of its own: ``[B, T, ...]`` is looked at as ``[B * P, T / P, ...]``.
``choose_segments`` in ``tiles.py`` says where that should pay.

Shape letters as in ``matrix.py``, with B batch, P segments, H value heads.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
from torch import Tensor

from sleeptrain.memory.kernels.scan import scan_backward_kernel, scan_kernel


def in_segments(x: Tensor, num_segments: int) -> Tensor:
    """``[B, T, ...]`` as ``[B * P, T / P, ...]``; P divides T."""
    return x.view(-1, x.shape[1] // num_segments, *x.shape[2:])


def states_before(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    total: Tensor,
    rest: Tensor | None,
    state: Tensor,
    scan: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The state before each segment ``[B, P, H, K, V]``, and each segment's M ``[B, P, H, K, K]``.

    ``k``, ``v``, ``beta``, ``total`` and ``rest`` are of segments (see ``factors.py``), ``state``
    ``[B, H, K, V]`` is that before the first; ``scan``: the constants of ``scan_kernel``.
    """
    num_batch, num_heads, key_dim, value_dim = state.shape
    width = value_dim + key_dim
    start = state.new_zeros(num_batch, len(k) // num_batch, num_heads, key_dim, width)  # [0 | I]
    start[..., value_dim:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    end = torch.empty_like(start)  # [B | M]
    scan_kernel[len(k) * num_heads, triton.cdiv(width, scan["VALUES"])](
        None, k, v, beta, total, rest, None, start,
        None, end, None, None, v.shape[1], k.shape[2], num_heads,
        **scan | {"WIDTH": width, "READS": False, "KEEPS": False},
    )  # fmt: skip
    added, maps = end.split([value_dim, key_dim], dim=-1)
    before = _walk(state, zip(maps[:, :-1].unbind(1), added.unbind(1)))
    return torch.stack(before, dim=1), maps


def gradients_after(
    q: Tensor | None,
    k: Tensor,
    beta: Tensor,
    total: Tensor,
    rest: Tensor | None,
    reads: Tensor | None,
    d_out: Tensor | None,
    d_last_state: Tensor,
    maps: Tensor,
    scan: dict[str, Any],
) -> Tensor:
    """The gradient of the state after each segment ``[B, P, H, K, V]``, given that of the last one's
    ``[B, H, K, V]``; the rest as above, ``scan`` being the constants of ``scan_backward_kernel``."""
    num_heads, value_dim = d_last_state.shape[1], d_last_state.shape[-1]
    start = d_last_state.new_zeros(*maps.shape[:-1], value_dim)
    if q is None:
        added = start
    else:
        added = torch.empty_like(start)
        scan_backward_kernel[len(k) * num_heads, triton.cdiv(value_dim, scan["VALUES"])](
            q, k, beta, total, rest, reads, d_out, start,
            None, None, added, k.shape[1], k.shape[2], num_heads, **scan | {"KEEPS": False},
        )  # fmt: skip
    in_reverse = zip(reversed(maps.mT[:, 1:].unbind(1)), reversed(added.unbind(1)))
    return torch.stack(_walk(d_last_state, in_reverse)[::-1], dim=1)


def _walk(first: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """``first``, and after it each ``matrix @ previous + added``, in float32 whatever autocast says."""
    found = [first]
    with torch.autocast(first.device.type, enabled=False):
        for matrix, added in steps:
            found.append(torch.matmul(matrix, found[-1]).add_(added))
    return found
