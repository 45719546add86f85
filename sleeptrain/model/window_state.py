"""What of the state lasts from pass to pass inside a window, and what crosses its border.

Fast weights go from pass to pass and across the border. Attention reads, on every pass, the keys and values
that survived from before the window (sliding eviction; none with hard eviction). A convolution starts its
first pass over a window from the tail that the window before left (``carried``; else from zeros) and every
later pass from zeros.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleeptrain.config import SleepConfig
from sleeptrain.model.state import BlockState, KVCache, State, Tokens, map_tensors


class Passes(NamedTuple):
    """The state on its way through the passes of one window.

    ``start``: at the window's start. ``latest``: what the newest visit of each block left; ``has_run``:
    whether there was one in this window. ``caches``: of each block, one per executed pass, where they
    survive.
    """

    start: State
    latest: State
    has_run: tuple[bool, ...]
    caches: tuple[tuple[KVCache, ...], ...]

    @classmethod
    def opening(cls, start: State) -> "Passes":
        """Before the first visit of a window."""
        return cls(start, start, (False,) * len(start), ((),) * len(start))

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

    def record(self, blocks: range, state: State) -> "Passes":
        """With what a visit of ``blocks`` left."""
        return self._replace(
            latest=tuple(state[i] if i in blocks else old for i, old in enumerate(self.latest)),
            has_run=tuple(i in blocks or old for i, old in enumerate(self.has_run)),
            caches=tuple(old + state[i].caches if i in blocks else old for i, old in enumerate(self.caches)),
        )

    def cut_gradient(self) -> "Passes":
        """Truncated backpropagation starts here: the passes before get no gradient, but what the fast weights
        held at the window's start keeps its direct path, so that earlier windows still learn."""
        latest = []
        for start, block in zip(self.start, self.latest):
            without_memory = map_tensors(Tensor.detach, block._replace(memory=None))
            memory = block.memory
            if memory is not None:
                memory = _StraightThrough.apply(start.memory, memory)
            latest.append(without_memory._replace(memory=memory))
        return self._replace(latest=tuple(latest), caches=map_tensors(Tensor.detach, self.caches))

    def end(self, tokens: Tokens, sleep: SleepConfig) -> State:
        """What crosses the border: fast weights; tails and caches where the eviction lets them survive."""
        sliding = sleep.eviction == "sliding"
        num_tokens = tokens.positions[:, -1] + 1
        states = []
        for latest, caches in zip(self.latest, self.caches):
            memory = latest.memory
            if memory is not None and sleep.detach_state:
                memory = memory.detach()
            surviving = caches if sleep.sliding_kv == "per_pass" else caches[-1:]
            states.append(
                BlockState(
                    memory=memory,
                    tail=latest.tail if sleep.carries_convolution else None,
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
