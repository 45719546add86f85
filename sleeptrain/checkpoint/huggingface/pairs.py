"""One tensor of a Hugging Face checkpoint and the weights of ours that it holds; both ways, bit for bit.

Theirs is ours one below the other (rows), or the rows of several of ours group by group, as where a head's
query and gate lie side by side. Kernels of depthwise convolutions have a dimension of 1 more there:
``[C, 1, W]`` for our ``[C, W]``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """``groups``: into how many groups the rows of each of ``ours`` are cut; the first groups of all come
    first, then the second ones, and so on. 1: ours as a whole, one after the other."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    is_kernel: bool = False

    def their_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """From the shapes of ours."""
        first = shapes[self.ours[0]]
        rows = sum(shapes[name][0] for name in self.ours)
        return (rows, 1, *first[1:]) if self.is_kernel else (rows, *first[1:])

    def split(self, theirs: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """What of theirs is which of ours."""
        rows = theirs.squeeze(1) if self.is_kernel else theirs
        grouped = rows.unflatten(0, (self.groups, -1))
        parts = grouped.split([shapes[name][0] // self.groups for name in self.ours], dim=1)
        return {name: part.flatten(0, 1).contiguous() for name, part in zip(self.ours, parts)}

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """The way back, for tensors in the order of ``self.ours``."""
        grouped = torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in ours], dim=1)
        rows = grouped.flatten(0, 1).contiguous()
        return rows.unsqueeze(1) if self.is_kernel else rows
