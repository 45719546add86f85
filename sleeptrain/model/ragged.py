"""Sessions side by side whose rows differ in length: each has its own place in its open window, and sleeps
when that is full. A row gives what a session of its own would.

What the rows hold is padded: a pad is marked invalid, and no mixer sees it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sleeptrain.model import session as sessions
from sleeptrain.model.halting import Stop
from sleeptrain.model.session import Session
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import BlockState, KVCache, map_tensors


class Rows(NamedTuple):
    """``filled`` ``[B]``: tokens in the open window of each row; the newest are the last of ``hidden``."""

    session: Session
    filled: Tensor


class Slept(NamedTuple):
    """Which rows slept, and with how many passes ``[rows]``."""

    rows: Tensor
    passes: Tensor


def begin(model: SleepModel, num_sequences: int) -> Rows:
    """Rows that have read nothing."""
    session = sessions.begin(model, num_sequences)
    return Rows(session, torch.zeros(num_sequences, dtype=torch.long, device=session.hidden.device))


def room_tokens(model: SleepModel, rows: Rows) -> Tensor:
    """How many tokens each open window still takes ``[B]``."""
    return (model.sleep.window_tokens or torch.iinfo(torch.long).max) - rows.filled


def take(rows: Rows, index: Tensor) -> Rows:
    """The rows of these numbers ``[n]``, any of them any number of times."""
    return Rows(map_tensors(lambda tensor: tensor[index], rows.session), rows.filled[index])


@torch.no_grad()
def read(model: SleepModel, rows: Rows, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Rows]:
    """Pass 1 over the first ``lengths`` ``[B]`` of ``ids`` ``[B, T]``; returns logits ``[B, T, V]``, of which
    those after the lengths mean nothing. Raises ValueError where a window has no room."""
    if (lengths > room_tokens(model, rows)).any():
        raise ValueError("more tokens than fit into an open window; sleep first")
    filled = rows.filled + lengths
    if (lengths == ids.shape[1]).all() and (rows.filled == rows.session.position_tokens).all():  # no pads
        h, session = sessions.read_on(model, rows.session, ids)
        return model.logits(h), Rows(session, filled)
    valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    h, session = sessions.read_on(model, rows.session, ids, valid, rows.filled[:, None])
    held = torch.cat([_last(rows.filled, rows.session.hidden.shape[1]), valid], dim=1)
    hidden = _compact(session.hidden, held, int(filled.max()))
    state = tuple(block._replace(caches=tuple(map(without_pads, block.caches))) for block in session.state)
    return model.logits(h), Rows(Session(session.start, state, hidden), filled)


@torch.no_grad()
def sleep(
    model: SleepModel, rows: Rows, which: Tensor, num_passes: int, stop: Stop | None = None
) -> tuple[Rows, list[Slept]]:
    """Lets the rows that are chosen in ``which`` ``[B]`` sleep, those of equal length together."""
    told = []
    for count in rows.filled[which].unique().tolist():
        index = (which & (rows.filled == count)).nonzero()[:, 0]
        part = take(rows, index).session
        part = part._replace(hidden=part.hidden[:, part.hidden.shape[1] - count :])
        slept, passes = sessions.sleep_until_settled(model, part, num_passes, stop)
        told.append(Slept(index, passes))
        rows = Rows(_put(rows.session, index, slept), rows.filled.index_fill(0, index, 0))
    most = int(rows.filled.max()) if len(rows.filled) else 0
    hidden = rows.session.hidden
    return rows._replace(session=rows.session._replace(hidden=hidden[:, hidden.shape[1] - most :])), told


def _last(counts: Tensor, size: int) -> Tensor:
    """True in the last ``counts`` ``[B]`` of ``size`` places."""
    return torch.arange(size, device=counts.device) >= size - counts[:, None]


def _compact(values: Tensor, valid: Tensor, size: int) -> Tensor:
    """The valid ones of ``[B, P, D]``, in order, at the end of ``size`` places."""
    order = valid.to(torch.int8).argsort(dim=1, stable=True)[:, valid.shape[1] - size :]
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))


def without_pads(cache: KVCache) -> KVCache:
    """As many places as the fullest row needs."""
    return cache.newest(int(cache.valid.sum(1).max()))


def _put(session: Session, index: Tensor, new: Session) -> Session:
    """With some rows replaced; none of the new ones holds a token."""
    size = len(session.hidden)
    start, state = (
        tuple(_put_block(a, index, b, size) for a, b in zip(old, slept))
        for old, slept in ((session.start, new.start), (session.state, new.state))
    )
    return Session(start, state, session.hidden)


def _put_block(block: BlockState, index: Tensor, new: BlockState, size: int) -> BlockState:
    """Where one side has no tail, it is zeros; where it has fewer caches, the last one counts again."""
    number = max(len(block.caches), len(new.caches))
    num_places = max((cache.keys.shape[1] for cache in (*block.caches, *new.caches)), default=0)
    like = (*block.caches, *new.caches)[:1]
    olds = _as_many(block.caches, number, num_places, like, size)
    news = _as_many(new.caches, number, num_places, like, len(index))
    return BlockState(
        _put_tensor(block.memory, index, new.memory, size),
        _put_tensor(block.tail, index, new.tail, size),
        tuple(map_tensors(lambda a, b: a.index_copy(0, index, b), a, b) for a, b in zip(olds, news)),
    )


def _put_tensor(value: Tensor | None, index: Tensor, new: Tensor | None, size: int) -> Tensor | None:
    if new is None:
        return value if value is None else value.index_fill(0, index, 0.0)
    if value is None:
        value = new.new_zeros(size, *new.shape[1:])
    return value.index_copy(0, index, new.to(value.dtype))


def _as_many(
    caches: tuple[KVCache, ...], number: int, num_places: int, like: tuple[KVCache, ...], size: int
) -> list[KVCache]:
    """So many caches of so many places; pads come before what is there."""
    if not caches:  # nothing survived: one without a valid entry
        caches = tuple(
            KVCache(*(part.new_zeros(size, 0, *part.shape[2:]) for part in cache)) for cache in like
        )
    padded = [cache.padded(num_places) for cache in caches]
    return padded + padded[-1:] * (number - len(padded))
