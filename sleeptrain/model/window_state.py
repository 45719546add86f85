"""What of the state lasts from pass to pass inside a window, and what crosses its border.

Fast weights go from pass to pass and across the border. Attention reads, on every pass, the keys and values
that survived from before the window (sliding eviction; none with hard eviction). A convolution starts its
first pass over a window from the tail that the window before left (``carried``; else from zeros) and every
later pass from zeros.
"""

from typing import Any

import torch
from torch import Tensor

from sleeptrain.config import SleepConfig
from sleeptrain.model.state import BlockState, KVCache, State, Tokens, map_state


class Passes:
    """The state on its way through the passes of one window, from the state at its start."""

    def __init__(self, start: State, sleep: SleepConfig) -> None:
        self.start, self.sleep = start, sleep
        self.latest = list(start)
        self.has_run = [False] * len(start)  # of each block, in this window
        self.caches: list[tuple[KVCache, ...]] = [()] * len(
            start
        )  # one per executed pass and block, where they survive

    def begin(self, pass_number: int, awake: bool) -> State:
        """The state with which a pass starts. An awake pass reads what the last pass of the window before
        left."""
        return tuple(
            BlockState(
                memory=latest.memory,
                tail=None if has_run else start.tail,
                caches=_read_by(start.caches, pass_number, awake),
            )
            for start, latest, has_run in zip(self.start, self.latest, self.has_run)
        )

    def record(self, blocks: range, state: State) -> None:
        """Takes over what a visit of ``blocks`` left."""
        for i in blocks:
            self.latest[i], self.has_run[i] = state[i], True
            self.caches[i] += state[i].caches

    def cut_gradient(self) -> None:
        """Truncated backpropagation starts here: the passes before get no gradient, but what the fast weights
        held at the window's start keeps its direct path, so that earlier windows still learn."""
        for i, (start, latest) in enumerate(zip(self.start, self.latest)):
            cut = map_state(Tensor.detach, (latest._replace(memory=None),))[0]
            if latest.memory is not None:
                cut = cut._replace(memory=_StraightThrough.apply(start.memory, latest.memory))
            self.latest[i] = cut
            self.caches[i] = map_state(Tensor.detach, (BlockState(caches=self.caches[i]),))[0].caches

    def end(self, tokens: Tokens) -> State:
        """What crosses the border: fast weights; tails and caches where the eviction lets them survive."""
        sliding, carried = self.sleep.eviction == "sliding", self.sleep.carries_convolution
        num_tokens = tokens.positions[:, -1] + 1
        states = []
        for latest, caches in zip(self.latest, self.caches):
            memory = latest.memory
            if memory is not None and self.sleep.detach_state:
                memory = memory.detach()
            surviving = caches if self.sleep.sliding_kv == "per_pass" else caches[-1:]
            states.append(
                BlockState(
                    memory=memory,
                    tail=latest.tail if carried else None,
                    caches=tuple(cache.shifted(num_tokens) for cache in surviving) if sliding else (),
                )
            )
        return tuple(states)


def _read_by(caches: tuple[KVCache, ...], pass_number: int, awake: bool) -> tuple[KVCache, ...]:
    """The one cache that a pass reads: of pass min(n, N) of the window before, awake of its last pass N."""
    if not caches:
        return ()
    return (caches[-1 if awake else min(pass_number, len(caches)) - 1],)


class _StraightThrough(torch.autograd.Function):
    """``value`` in the forward pass; in the backward pass its gradient goes to ``start`` unchanged."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
