"""Tensors of a Hugging Face checkpoint and the weights of ours that they hold; both ways, bit for bit.

Theirs, one below the other, are ours one below the other (rows), or the rows of several of ours group by
group, as where a head's query and gate lie side by side. Kernels of depthwise convolutions have one dimension
more there: ``[C, 1, W]`` for our ``[C, W]``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """``groups``: into how many groups the rows of each of ``ours`` are cut; the first groups of all come
    first, then the second ones, and so on. 1: ours as a whole, one after the other. Where there are several
    of ``theirs``, as many as of ours, they may share the rows in another way."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    groups: int = 1
    is_kernel: bool = False

    def their_shapes(self, shapes: Mapping[str, Shape], found: Sequence[Shape | None]) -> list[Shape]:
        """What shapes theirs must have, from those of ours and of what was ``found``."""
        rows = [shapes[name][0] for name in self.ours]
        inner = shapes[self.ours[0]][1:]
        inner = (1, *inner) if self.is_kernel else inner
        if len(self.theirs) == 1:
            return [(sum(rows), *inner)]
        known = [shape for shape in found if shape]
        if len(known) == len(self.theirs) and sum(shape[0] for shape in known) == sum(rows):
            rows = [shape[0] for shape in known]
        return [(n, *inner) for n in rows]

    def split(self, theirs: Sequence[Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """What of theirs is which of ours."""
        rows = torch.cat(list(theirs)) if len(theirs) > 1 else theirs[0]
        rows = rows.squeeze(1) if self.is_kernel else rows
        grouped = rows.unflatten(0, (self.groups, -1))
        parts = grouped.split([shapes[name][0] // self.groups for name in self.ours], dim=1)
        return {name: part.flatten(0, 1).contiguous() for name, part in zip(self.ours, parts)}

    def join(self, ours: Sequence[Tensor], rows: Sequence[int] = ()) -> dict[str, Tensor]:
        """The way back, for tensors in the order of ``self.ours``; ``rows`` of each of theirs, if they are
        not those of ours."""
        grouped = torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in ours], dim=1)
        whole = grouped.flatten(0, 1)
        whole = whole.unsqueeze(1) if self.is_kernel else whole
        rows = rows or ([len(whole)] if len(self.theirs) == 1 else [len(tensor) for tensor in ours])
        return {name: part.contiguous() for name, part in zip(self.theirs, whole.split(list(rows)))}


def pair(theirs: str, *ours: str, groups: int = 1, is_kernel: bool = False) -> Pair:
    """One of theirs."""
    return Pair((theirs,), ours, groups, is_kernel)
