"""When a sequence makes no further pass over the window that it sleeps on: by a rule, or as it has learned.

By a rule, at inference: a sequence that has stopped keeps its h and what its looped blocks hold, while others
of the batch go on.

Learned (ACT, arXiv 1603.08983; PonderNet, arXiv 2107.05407): after each pass n < N over a window a sequence
halts with the chance lambda_n = sigmoid(w . mean_t norm(h_n) + b). Pass n is then the last one with the
chance p_n = lambda_n prod_{j<n} (1 - lambda_j), and p_N is the rest. Passes go on from the h and S that the
pass before left, and what they leave in the end is the mixture over n of p_n (h_n, S_n): its gradient, and a
cost on the expected number of passes, teach the chances. At inference the rule is to stop once the chance of
having halted reaches a threshold; the rest goes to that pass.

Shape letters: B batch, T tokens, D model width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleeptrain.config import SleepConfig
from sleeptrain.model.state import State, map_tensors
from sleeptrain.schema import ConfigError

DEFAULT_THRESHOLD = 0.5


class Stop(NamedTuple):
    """At inference; N is the most. A sequence stops once a pass has changed its fast weights by less than
    ``tolerance``, relative to their norm over all looped blocks (at 0 none does); and where halting is
    learned once the chance of having halted reaches ``halt_threshold`` (None: 0.5; at 1 none does)."""

    tolerance: float = 0.0
    halt_threshold: float | None = None

    def check(self, sleep: SleepConfig) -> None:
        """Raises ConfigError for a value out of range, or a threshold where nothing is learned."""
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance={self.tolerance} must be at least 0; at 0 it stops no sequence")
        if self.halt_threshold is None:
            return
        if sleep.halting == "none":
            raise ConfigError(
                f"halt_threshold={self.halt_threshold} is for a model that has learned when to halt, and "
                "this one was trained with sleep.halting=none; leave it out, or give a tolerance"
            )
        if not 0 < self.halt_threshold <= 1:
            raise ConfigError(f"halt_threshold={self.halt_threshold} must be above 0 and at most 1")


class HaltingHead(nn.Module):
    """The chance to halt ``[B]`` after a pass that left ``h_BTD``: a logistic map of the mean over a window's
    tokens, each normalised."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(1))
        self.eps = eps

    def forward(self, h_BTD: Tensor, valid: Tensor | None) -> Tensor:
        normed_BTD = F.rms_norm(h_BTD, self.weight.shape, eps=self.eps)
        if valid is None:
            mean_BD = normed_BTD.mean(1)
        else:
            count = valid.sum(1, keepdim=True).clamp_min(1)
            mean_BD = (normed_BTD * valid[..., None]).sum(1) / count
        return torch.sigmoid((mean_BD * self.weight).sum(-1) + self.bias)


class Sleepers(NamedTuple):
    """The sequences amid the passes over a window.

    ``moves`` ``[B]``: which of them make a further pass. ``passes`` ``[B]``: how many each has made, reading
    included, or makes on average where halting is learned and no rule is given; 0 where it has no token in
    this window. ``hidden`` ``[B, T, D]``: the h that its last one left. Where halting is learned,
    ``remaining`` ``[B]`` is the chance of not having halted yet, and ``mixed`` the mixture so far of h and of
    the fast weights of the looped blocks.
    """

    moves: Tensor
    passes: Tensor
    hidden: Tensor
    remaining: Tensor
    mixed: Any = None


class Halting(NamedTuple):
    """What may end the passes of the ``core`` over a window before pass N: what the ``head`` has learned, the
    rule ``stop``, both, or neither."""

    core: range
    num_passes: int
    head: HaltingHead | None
    stop: Stop | None

    @property
    def is_on(self) -> bool:
        return self.head is not None or self.stop is not None

    def begin(self, h_BTD: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State, Sleepers]:
        """After pass 1, which is to read, and left h and ``state``: where there is nothing to read there is
        nothing to sleep on."""
        moves = h_BTD.new_ones(len(h_BTD), dtype=torch.bool) if valid is None else valid.any(1)
        passes = moves.to(h_BTD.dtype) if self._is_average else moves.long()
        sleepers = Sleepers(moves, passes, h_BTD, h_BTD.new_ones(len(h_BTD)))
        return self._mix(1, sleepers, h_BTD, state, valid)

    def go_on(
        self,
        pass_number: int,
        sleepers: Sleepers,
        h_BTD: Tensor,
        before: State,
        after: State,
        kept: State,
        valid: Tensor | None,
    ) -> tuple[Tensor, State, Sleepers]:
        """After a later pass, which led from the state ``before`` to ``after``. Returns the h and the state
        to go on from, which of those that had stopped are the h that they had and the state that they
        ``kept``."""
        moves = sleepers.moves
        passes = sleepers.passes + (sleepers.remaining if self._is_average else moves)
        if self.stop is not None:
            looped, held = (state[self.core.start : self.core.stop] for state in (after, kept))
            h_BTD, looped = _where(moves, (h_BTD, looped), (sleepers.hidden, held))
            after = (*after[: self.core.start], *looped, *after[self.core.stop :])
            if self.stop.tolerance > 0:
                moves = moves & (_change(before, after, self.core) >= self.stop.tolerance)
        sleepers = sleepers._replace(moves=moves, passes=passes, hidden=h_BTD)
        return self._mix(pass_number, sleepers, h_BTD, after, valid)

    @property
    def _is_average(self) -> bool:
        return self.head is not None and self.stop is None

    def _mix(
        self, pass_number: int, sleepers: Sleepers, h_BTD: Tensor, state: State, valid: Tensor | None
    ) -> tuple[Tensor, State, Sleepers]:
        """Where halting is learned: adds what a pass left, by its chance to be the last one. The last one
        that is made leaves the mixture."""
        if self.head is None:
            return h_BTD, state, sleepers
        moves, remaining = sleepers.moves, sleepers.remaining
        if pass_number < self.num_passes:
            chance = self.head(h_BTD, valid)
            if self.stop is not None:
                threshold = self.stop.halt_threshold or DEFAULT_THRESHOLD
                moves = moves & (remaining * (1 - chance) > 1 - threshold)
            share = torch.where(moves, remaining * chance, remaining)
        else:
            share = remaining
        left = (h_BTD, tuple(state[i].memory for i in self.core))
        mixed = map_tensors(lambda x: share.view(-1, *[1] * (x.dim() - 1)) * x, left)
        if sleepers.mixed is not None:
            mixed = map_tensors(torch.add, sleepers.mixed, mixed)
        sleepers = sleepers._replace(moves=moves, remaining=remaining - share, mixed=mixed)
        if pass_number < self.num_passes and (self.stop is None or bool(moves.any())):
            return h_BTD, state, sleepers
        h_BTD, memories = mixed
        looped = (state[i]._replace(memory=memory) for i, memory in zip(self.core, memories))
        return h_BTD, (*state[: self.core.start], *looped, *state[self.core.stop :]), sleepers


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
