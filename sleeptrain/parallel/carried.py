"""What the rows of a batch leave to the same rows of the next (``sleep.carry_between_batches``): the state of
the rows, blocks and heads held here, detached, so that backpropagation ends at the border of batches.

It lasts only once the update of its batch is made: a step that is skipped leaves no trace.
"""

from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sleeptrain.checkpoint.slices import Box, Slice
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import BlockState, KVCache, State, map_tensors

if TYPE_CHECKING:
    from sleeptrain.checkpoint.reader import Checkpoint

GROUP = "carried"
# Of a logical tensor, by the last word of its name, the dimension that tensor ranks share: heads or channels.
SPLIT = {"memory": 1, "q": 2, "k": 2, "v": 2, "keys": 2, "values": 2, "positions": None, "valid": None}


class Part(NamedTuple):
    """Number ``rank`` of ``size`` equal parts."""

    rank: int
    size: int

    def of(self, whole: int) -> tuple[int, int]:
        """Start and stop."""
        return whole * self.rank // self.size, whole * (self.rank + 1) // self.size


WHOLE = Part(0, 1)


class Carried:
    """``rows`` is this replica's part of the ``num_rows`` of a batch, ``heads`` this tensor rank's of a
    block."""

    def __init__(self, model: SleepModel, num_rows: int, rows: Part = WHOLE, heads: Part = WHOLE) -> None:
        self.is_on = model.sleep.carry_between_batches
        self.num_rows, self.rows, self.heads = num_rows, rows, heads
        self.device = next(model.parameters()).device
        self.is_here = [block is not None for block in model.stack.blocks]
        self.mixers = dict(model.stack.fast_weight_mixers())
        self.state: State | None = None  # None: every row starts anew
        self._left: dict[int, State] = {}  # by first row, of a batch whose update is to come

    def read(self, rows: slice) -> State | None:
        """What some rows start from."""
        return None if self.state is None else map_tensors(lambda x: x[rows], self.state)

    def write(self, rows: slice, state: State) -> None:
        """What these rows left; a copy, for a convolution tail is a view of its whole window."""
        if self.is_on:
            self._left[rows.start] = map_tensors(lambda x: x.detach().clone(), state)

    def doubt(self) -> Tensor | float:
        """0, or NaN where not all that was left is finite. As a part of the loss it makes every process skip
        the update: the next batch would spread what is wrong."""
        found: list[Tensor] = []
        map_tensors(lambda x: found.append(x.isfinite().all()), tuple(self._left.values()))
        return torch.where(torch.stack(found).all(), 0.0, torch.nan) if found else 0.0

    def settle(self, applied: bool) -> None:
        """After the update, or what was none."""
        if applied and self._left:
            parts = [self._left[start] for start in sorted(self._left)]
            self.state = None  # makes room first
            self.state = map_tensors(lambda *x: torch.cat(x), *parts) if len(parts) > 1 else parts[0]
        self._left.clear()

    def slices(self) -> dict[str, list[Slice]]:
        """The group of a checkpoint, what this process alone holds; none in a run that does not carry."""
        if not self.is_on:
            return {}
        named = [(name, x) for i, block in enumerate(self.state or ()) for name, x in self._named(i, block)]
        mine = [(name, x) for name, x in named if _split(name) is not None or self.heads.rank == 0]
        return {GROUP: [self._slice(name, x) for name, x in mine]}

    def load(self, checkpoint: "Checkpoint") -> None:
        """Takes over what any topology saved. ValueError where it is of another number of rows, KeyError
        where a part is missing."""
        saved = set(checkpoint.names(GROUP)) if self.is_on else set()
        blocks = [self._load(checkpoint, saved, i) for i in range(len(self.is_here))] if saved else []
        self.state = tuple(blocks) or None

    def _named(self, index: int, block: BlockState) -> Iterator[tuple[str, Tensor]]:
        """The logical tensors of a block, and what is here of them."""
        if block.memory is not None:
            yield f"blocks.{index}.memory", block.memory
        if block.tail is not None:
            channels = self.mixers[index].tail_channels
            for part, x in zip(channels, block.tail.split(list(channels.values()), dim=-1)):
                yield f"blocks.{index}.tail.{part}", x
        for c, cache in enumerate(block.caches):
            for part, x in cache._asdict().items():
                yield f"blocks.{index}.caches.{c}.{part}", x

    def _slice(self, name: str, x: Tensor) -> Slice:
        shape, split = [self.num_rows, *x.shape[1:]], _split(name)
        if split is not None:
            shape[split] *= self.heads.size
        return Slice(name, tuple(shape), self._box(name, shape), 0, x.reshape(-1))

    def _box(self, name: str, shape: Sequence[int]) -> Box:
        """What of a logical tensor is held here."""
        parts = {0: self.rows, _split(name): self.heads}
        return tuple(parts.get(dim, WHOLE).of(length) for dim, length in enumerate(shape))

    def _load(self, checkpoint: "Checkpoint", saved: set[str], index: int) -> BlockState:
        def read(name: str) -> Tensor:
            shape = checkpoint.shape(GROUP, name)
            if shape[0] != self.num_rows:
                raise ValueError(f"it carries {shape[0]} rows, and data.batch_sequences={self.num_rows}")
            return checkpoint.read(GROUP, name, self._box(name, shape)).to(self.device)

        if not self.is_here[index]:
            return BlockState()
        where, mixer = f"blocks.{index}", self.mixers.get(index)
        tails = [f"{where}.tail.{part}" for part in (mixer.tail_channels if mixer else ())]
        parts = [read(name) for name in tails if name in saved]
        caches = takewhile(lambda c: f"{where}.caches.{c}.keys" in saved, count())
        return BlockState(
            memory=read(f"{where}.memory") if mixer else None,
            tail=torch.cat(parts, dim=-1) if parts else None,
            caches=tuple(
                KVCache(*(read(f"{where}.caches.{c}.{part}") for part in KVCache._fields)) for c in caches
            ),
        )


def _split(name: str) -> int | None:
    return SPLIT[name.rsplit(".", 1)[-1]]
