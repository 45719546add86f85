"""When a sequence makes no further pass over the window that it sleeps on.

A sequence that has stopped keeps its h and what its looped blocks hold, while others of the batch go on.

Shape letters: B batch, T tokens, D model width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleeptrain.model.state import State, map_tensors
from sleeptrain.schema import ConfigError


class Stop(NamedTuple):
    """At inference: a sequence stops once a pass has changed its fast weights by less than ``tolerance``,
    relative to their norm over all looped blocks; N is the most. At 0 all make N passes."""

    tolerance: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for a value out of range."""
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance={self.tolerance} must be at least 0; at 0 all passes are made")


class Sleepers(NamedTuple):
    """The sequences amid the passes over a window: which of them make a further pass (``moves`` ``[B]``), how
    many each has made, reading included (``passes`` ``[B]``; 0 where it has no token in this window), and the
    ``hidden`` ``[B, T, D]`` that the last one left."""

    moves: Tensor
    passes: Tensor
    hidden: Tensor


class Halting(NamedTuple):
    """What ends the passes of the ``core`` over a window before the last one: the rule ``stop``, if there is
    one."""

    core: range
    stop: Stop | None

    def begin(self, hidden: Tensor, valid: Tensor | None) -> Sleepers:
        """After pass 1, which is to read: where there is nothing to read there is nothing to sleep on."""
        moves = hidden.new_ones(len(hidden), dtype=torch.bool) if valid is None else valid.any(1)
        return Sleepers(moves, moves.long(), hidden)

    def go_on(
        self, sleepers: Sleepers, h_BTD: Tensor, before: State, after: State, kept: State
    ) -> tuple[Tensor, State, Sleepers]:
        """After a later pass, which led from the state ``before`` to ``after``. Returns the h and the state
        that it leaves, which of those that had stopped are the h that they had and the state that they
        ``kept``."""
        moves, core = sleepers.moves, slice(self.core.start, self.core.stop)
        h_BTD, looped = _where(moves, (h_BTD, after[core]), (sleepers.hidden, kept[core]))
        after = (*after[: core.start], *looped, *after[core.stop :])
        passes = sleepers.passes + moves
        if self.stop is not None and self.stop.tolerance > 0:
            moves = moves & (_change(before, after, self.core) >= self.stop.tolerance)
        return h_BTD, after, Sleepers(moves, passes, h_BTD)


def _where(chosen: Tensor, new: Any, old: Any) -> Any:
    """Of two trees of the same form, the rows of ``new`` that are ``chosen`` ``[B]``, the others of
    ``old``."""
    if bool(chosen.all()):
        return new
    return map_tensors(lambda a, b: torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b), new, old)


def _change(before: State, after: State, blocks: range) -> Tensor:
    """Of the fast weights of some blocks by a pass, relative to their norm ``[B]``."""
    pairs = [(before[i].memory, after[i].memory) for i in blocks]
    squares = [
        ((new - old).flatten(1).square().sum(1), new.flatten(1).square().sum(1))
        for old, new in pairs
        if old is not None and new is not None
    ]
    change, norm = (torch.stack(column).sum(0).sqrt() for column in zip(*squares))
    return change / norm.clamp_min(torch.finfo(norm.dtype).tiny)
