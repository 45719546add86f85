"""Tokens that come one by one, in fixed places: on a CUDA device each is one replay of a graph.

To read a token eagerly is a few thousand short kernels for a large model, and starting them takes longer than
they do. A graph needs tensors whose shape and place stay, so here every open window has as many places as it
will ever fill, pads before what is real; and nothing that was read is moved for the next token's sake: keys
and values lie in rings, where the newest overwrites a pad, or the oldest. On a CPU the same work is done
without a graph.

Shape letters: B batch, D model width, L window tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.model.attention import Attention
from sleeptrain.model.graphs import fill, leaves, recorded
from sleeptrain.model.ragged import Rows, room_tokens, without_pads
from sleeptrain.model.session import Session, read_on
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import BlockState, KVCache, Ring, RingToken, State, map_tensors


class Places(NamedTuple):
    """Of the open windows: ``filled`` ``[B]``; how many tokens were read since they entered, ``number``
    ``[1]``; ``hidden`` ``[B, L, D]``; a state with rings; and for the rings of each width 0 in places where a
    token stands, else -inf, as attention adds it, ``[B, width]``."""

    filled: Tensor
    number: Tensor
    hidden: Tensor
    state: State
    masks: tuple[Tensor, ...]


class Recording(NamedTuple):
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
        self.window_tokens = model.sleep.window_tokens
        self.room_tokens = 0  # that every row still takes
        attentions = [spec for spec in model.config.blocks if not spec.is_fast_weight]
        self._widths = sorted({spec.width_tokens or self.window_tokens for spec in attentions})
        self._start: State | None = None  # of the rows that are held
        self._recording: Recording | None = None

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
        """Takes rows into the places; the first time, and where their number changes, a step is recorded,
        which on a GPU takes seconds."""
        entering = self.places_of(rows)
        if self._recording is None or _forms(self._recording.places) != _forms(entering):
            self._recording = None  # its places are free
            self._recording = self.record(entering)
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
        filled, number, hidden, state, masks = map_tensors(Tensor.clone, self._recording.places)
        hidden = hidden.roll(-int(number), 1)[:, self.window_tokens - int(filled.max()) :]
        by_width = dict(zip(self._widths, masks))
        state = tuple(
            block
            if block.ring is None
            else BlockState(caches=(_cache(block.ring, by_width, filled, int(number)),))
            for block in state
        )
        rows = Rows(Session(self._start, state, hidden), filled)
        self.drop()
        return rows

    def drop(self) -> None:
        """Holds nothing any more."""
        self._start = None

    def places_of(self, rows: Rows) -> Places:
        """What a step reads and writes, before it, of rows that can enter."""
        session, masks = rows.session, {}
        state = []
        for spec, layer, block in zip(self.model.config.blocks, self.model.stack.blocks, session.state):
            if spec.is_fast_weight:
                state.append(block)
                continue
            assert isinstance(layer.mixer, Attention)
            width = spec.width_tokens or self.window_tokens
            cache = block.caches[0].compact(width)
            mask = torch.zeros_like(cache.valid, dtype=cache.keys.dtype)
            masks[width] = mask.masked_fill(~cache.valid, -math.inf)
            state.append(BlockState(ring=layer.mixer.ring(cache, self.model.dtype)))
        return Places(
            rows.filled,
            rows.filled.new_zeros(1),
            F.pad(session.hidden, [0, 0, self.window_tokens - session.position_tokens, 0]),
            tuple(state),
            tuple(masks[width] for width in self._widths),
        )

    def record(self, entering: Places) -> Recording:
        """What replays a step, on places of this form; to record fills them with anything."""
        places, ids = map_tensors(Tensor.clone, entering), entering.filled.new_zeros(len(entering.filled), 1)
        logits = entering.hidden.new_zeros(len(ids), self.model.head.out_features, dtype=self.model.dtype)

        @torch.no_grad()
        def step() -> None:
            start, rings = places.filled[:, None], {}
            for width, mask in zip(self._widths, places.masks):
                place = places.number % width
                mask.index_fill_(1, place, 0.0)
                rings[width] = RingToken(place, mask[:, None, None])
            session = Session(places.state, places.state, places.hidden[:, :0])
            with self.autocast():
                h, session = read_on(self.model, session, ids, start=start, rings=rings)
                fill([logits], [self.model.logits(h)[:, 0]])
            place = places.number % self.window_tokens  # beyond it when a graph is recorded
            places.hidden.index_copy_(1, place, session.hidden.to(places.hidden.dtype))
            fill(_fast_weights(places.state), _fast_weights(session.state))
            places.filled.add_(1)
            places.number.add_(1)

        return Recording(places, ids, logits, recorded(step, ids.device))


def _cache(ring: Ring, masks: dict[int, Tensor], filled: Tensor, number: int) -> KVCache:
    """What the next token sees, in order; ``number`` tokens were read into the ring. The place where it will
    stand is left out: a pad, what is too old, or a token that was interrupted."""
    width = ring.keys.shape[1]
    parts = (ring.keys, ring.values, masks[width])
    keys, values, mask = (part.roll(-(number % width), 1)[:, 1:] for part in parts)
    positions = filled[:, None] + torch.arange(1 - width, 0, device=filled.device)
    return without_pads(KVCache(keys, values, positions, mask == 0))


def _fast_weights(state: State) -> list[Tensor]:
    """And convolution tails: what a step leaves anew."""
    return leaves(tuple((block.memory, block.tail) for block in state))


def _forms(places: Places) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in leaves(places)]
