"""Tokens that come one by one, in fixed places: on a CUDA device each is one replay of a graph.

To read a token eagerly is a few thousand short kernels for a large model, and starting them takes longer than
they do. A graph needs tensors whose shape and place stay, so here all open windows have as many places as
they will ever fill: pads stand before what is real, and the newest token pushes one of them, or the oldest
token, out. On a CPU the same work is done without a graph, which is how the tests see it.

Shape letters: B batch, D model width, L window tokens, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.model.graphs import fill, leaves, recorded
from sleeptrain.model.ragged import Rows, room_tokens, without_pads
from sleeptrain.model.session import Session, read_on
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import State, map_tensors


class Places(NamedTuple):
    """Of the open windows: ``filled`` ``[B]``, ``hidden`` ``[B, L, D]``, whose last are real, and the state
    with caches of as many places as there may be earlier tokens."""

    filled: Tensor
    hidden: Tensor
    state: State


class _Recording(NamedTuple):
    """Where a step reads and writes, ``ids`` ``[B, 1]`` and ``logits`` ``[B, V]``, and what replays it."""

    places: Places
    ids: Tensor
    logits: Tensor
    replay: Callable[[], None]


class Decoder:
    """Holds rows between ``enter`` and ``leave``, and reads tokens into them. For models that sleep by
    themselves (``window_tokens`` above 0), whose weights stay where they are; ``autocast`` is what every
    forward pass is inside of."""

    def __init__(self, model: SleepModel, autocast: Callable[[], AbstractContextManager]) -> None:
        self.model, self.autocast = model, autocast
        self.room_tokens = 0  # that every row still takes
        self._start: State | None = None  # of the rows that are held
        self._recording: _Recording | None = None

    @property
    def holds_rows(self) -> bool:
        return self._start is not None

    def can_enter(self, rows: Rows) -> bool:
        """Whether each block has what the next token needs; before the first token of a window some may have
        none yet."""
        has_room = bool((room_tokens(self.model, rows) > 0).all())
        pairs = zip(self.model.config.blocks, rows.session.state)
        return has_room and all(
            block.tail is not None if spec.is_fast_weight else len(block.caches) == 1 for spec, block in pairs
        )

    @torch.no_grad()
    def enter(self, rows: Rows) -> None:
        """Takes rows into the places; the first time, and where their number changes, a graph is recorded,
        which takes seconds."""
        entering = self._padded(rows)
        if self._recording is None or _forms(self._recording.places) != _forms(entering):
            self._recording = self._record(entering)
        fill(leaves(self._recording.places), leaves(entering))
        self._start, self.room_tokens = rows.session.start, int(room_tokens(self.model, rows).min())

    def read(self, ids: Tensor) -> Tensor:
        """Pass 1 over a token of each row ``[B]``; returns logits ``[B, V]``. Raises ValueError where a row
        has no room, or none are held."""
        if self._recording is None or not self.holds_rows or not self.room_tokens:
            raise ValueError("there is no room in the open windows; leave, sleep and enter again")
        self._recording.ids.copy_(ids[:, None])
        self._recording.replay()
        self.room_tokens -= 1
        return self._recording.logits.clone()

    def leave(self) -> Rows:
        """The rows as they are now, which are held no longer. Raises ValueError where none are."""
        if self._start is None or self._recording is None:
            raise ValueError("no rows are held; enter some first")
        filled, hidden, state = map_tensors(Tensor.clone, self._recording.places)
        state = tuple(block._replace(caches=tuple(map(without_pads, block.caches))) for block in state)
        hidden = hidden[:, hidden.shape[1] - int(filled.max()) :]
        rows = Rows(Session(self._start, state, hidden), filled)
        self.drop()
        return rows

    def drop(self) -> None:
        """Holds nothing any more."""
        self._start = None

    def _padded(self, rows: Rows) -> Places:
        """With as many places as there may be tokens."""
        length, session = self.model.sleep.window_tokens, rows.session
        hidden = F.pad(session.hidden, [0, 0, length - session.position_tokens, 0])
        state = tuple(
            block._replace(
                caches=tuple(cache.compact((spec.width_tokens or length) - 1) for cache in block.caches)
            )
            for spec, block in zip(self.model.config.blocks, session.state)
        )
        return Places(rows.filled, hidden, state)

    def _record(self, entering: Places) -> _Recording:
        """What replays a step, on places of this form; to record fills them with anything."""
        places, ids = map_tensors(Tensor.clone, entering), entering.filled.new_zeros(len(entering.filled), 1)
        logits = entering.hidden.new_zeros(len(ids), self.model.head.out_features, dtype=self.model.dtype)

        @torch.no_grad()
        def step() -> None:
            session = Session(places.state, places.state, places.hidden)
            with self.autocast():
                h, session = read_on(self.model, session, ids, start=places.filled[:, None], is_compact=True)
                fill([logits], [self.model.logits(h)[:, 0]])
            left = Places(places.filled + 1, session.hidden[:, 1:], session.state)
            fill(leaves(places), leaves(left))

        return _Recording(places, ids, logits, recorded(step, ids.device))


def _forms(places: Places) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in leaves(places)]
