"""Wake and sleep at inference: tokens come in pieces of any size, and the model sleeps when its window is
full.

A session is a value: ``feed`` takes one and returns the next. Feeding a sequence in pieces, split at any
token, equals one call of the ``predict_then_consolidate`` schedule on the whole of it (method: section 6,
check 6). The other schedule sleeps just so, except with ``sleep.sliding_kv=per_pass``: what a session reads
awake sees the cache of the last pass before, what training reads in a window without loss that of pass 1.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleeptrain.model.halting import Stop
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import BlockState, KVCache, RingToken, State
from sleeptrain.model.visits import require_passes, segments_of
from sleeptrain.model.window_state import Passes


class Session(NamedTuple):
    """``start``: the state at the start of the open window. ``state``: the same after reading what is in it
    so far, with the keys, values and convolution tails of its tokens. ``hidden`` ``[B, position, D]``: what
    reading left."""

    start: State
    state: State
    hidden: Tensor

    @property
    def position_tokens(self) -> int:
        """Tokens in the open window."""
        return self.hidden.shape[1]


def begin(model: SleepModel, num_sequences: int) -> Session:
    """A session that has read nothing."""
    weight = model.embed.weight
    return _open(
        model, model.initial_state(num_sequences), weight.new_zeros(num_sequences, 0, weight.shape[1])
    )


@torch.no_grad()
def feed(model: SleepModel, session: Session, ids: Tensor, num_passes: int) -> tuple[Tensor, Session]:
    """Reads ``ids`` ``[B, T]``, sleeping with N = ``num_passes`` at each full window; returns logits ``[B, T,
    V]``."""
    require_passes(num_passes, model.config)
    logits = [session.hidden.new_zeros(len(ids), 0, model.head.out_features)]
    while ids.shape[1]:
        room = room_tokens(model, session)
        more, session = read(model, session, ids[:, :room])
        logits.append(more)
        ids = ids[:, room:]
        if is_full(model, session):
            session = sleep(model, session, num_passes)
    return torch.cat(logits, dim=1), session


def room_tokens(model: SleepModel, session: Session) -> int:
    """How many tokens the open window still takes."""
    return (model.sleep.window_tokens or sys.maxsize) - session.position_tokens


def is_full(model: SleepModel, session: Session) -> bool:
    """Whether it is time to sleep."""
    return room_tokens(model, session) == 0


@torch.no_grad()
def read(model: SleepModel, session: Session, ids: Tensor) -> tuple[Tensor, Session]:
    """Pass 1 over ``ids`` ``[B, T]``, at most ``room_tokens``; returns logits ``[B, T, V]``. Raises
    ValueError for more."""
    if ids.shape[1] > room_tokens(model, session):
        raise ValueError(f"{ids.shape[1]} tokens do not fit into the open window; sleep first")
    h, session = read_on(model, session, ids)
    return model.logits(h), session


def sleep(model: SleepModel, session: Session, num_passes: int) -> Session:
    """Passes 2..N over the open window, then forgets it: only what crosses a border stays.

    Raises ConfigError for N < 1.
    """
    return sleep_until_settled(model, session, num_passes, stop=None)[0]


@torch.no_grad()
def sleep_until_settled(
    model: SleepModel, session: Session, num_passes: int, stop: Stop | None
) -> tuple[Session, Tensor]:
    """The same, but a sequence makes no further pass once the rule says so; ``num_passes`` is the most.
    Returns the passes of each sequence ``[B]``, too, reading included."""
    require_passes(num_passes, model.config)
    segments = segments_of(model.config)
    core = segments["core"]
    halting = model.halting(num_passes, stop)
    if not session.position_tokens:
        return session, torch.ones(len(session.hidden), dtype=torch.long, device=session.hidden.device)
    ids = session.hidden.new_zeros(session.hidden.shape[:2], dtype=torch.long)
    tokens = model.tokens(ids, valid=None)
    h, state, sleepers = halting.begin(session.hidden, session.state, valid=None)
    passes = Passes.opening(session.start)
    # Reading was pass 1. What the coda wrote awake is provisional where the coda runs once, after pass N.
    coda_again = "coda" in segments and model.sleep.schedule == "consolidate_or_predict"
    for name, blocks in segments.items():
        if not (name == "coda" and coda_again):
            passes = passes.record(blocks, state)
    for n in range(2, num_passes + 1):
        if not sleepers.moves.any():
            break
        before = passes.begin(n, awake=False)
        entering = model.final_norm(h) if model.sleep.norm_between_passes else h
        left, after = model.stack(entering, before, tokens, core, is_read=n < num_passes or coda_again)
        h, after, sleepers = halting.go_on(n, sleepers, left, before, after, passes.latest, valid=None)
        passes = passes.record(core, after)
    if coda_again:
        before = passes.begin(num_passes, awake=False)
        _, after = model.stack(h, before, tokens, segments["coda"], is_read=False)
        passes = passes.record(segments["coda"], after)
    return _open(model, passes.end(tokens, model.sleep), session.hidden[:, :0]), sleepers.passes


def _open(model: SleepModel, start: State, hidden: Tensor) -> Session:
    return Session(start, Passes.opening(start).begin(1, awake=True), hidden)


def read_on(
    model: SleepModel,
    session: Session,
    ids: Tensor,
    valid: Tensor | None = None,
    start: Tensor | None = None,
    rings: Mapping[int, RingToken] | None = None,
) -> tuple[Tensor, Session]:
    """Pass 1 over some tokens of the open window, whose first has the place ``start`` ``[B, 1]`` in it (None:
    the next one); the h that the core leaves is kept for the passes of sleep. ``rings``: see ``Tokens``.
    Returns h ``[B, T, D]``.
    """
    tokens = model.tokens(ids, valid, start=session.position_tokens if start is None else start)
    length = model.sleep.window_tokens or sys.maxsize
    tokens = tokens._replace(window_tokens=length, keeps_cache=True, keeps_tail=True, rings=rings)
    h, state, hidden = model.embed(ids), session.state, session.hidden
    for name, blocks in segments_of(model.config).items():
        h, state = model.stack(h, state, tokens, blocks)
        hidden = torch.cat([hidden, h], dim=1) if name == "core" else hidden
    return h, Session(session.start, state, hidden)


def to_tensors(session: Session) -> dict[str, Tensor]:
    """A session as tensors by name, such as ``start.3.memory`` and ``state.0.caches.1.keys``."""
    return (
        {"hidden": session.hidden}
        | dict(_named("start", session.start))
        | dict(_named("state", session.state))
    )


def from_tensors(model: SleepModel, tensors: Mapping[str, Tensor]) -> Session:
    """The way back. Raises ValueError for tensors that are not those of a session of this model."""
    known = begin(model, 1)
    try:
        start, state = (_state_of(tensors, name, len(known.start)) for name in ("start", "state"))
        session = Session(start, state, tensors["hidden"])
    except KeyError as error:
        raise ValueError(f"it is no session of this model: {error} is missing") from error
    foreign = sorted(tensors.keys() - to_tensors(session).keys())
    foreign += [
        name
        for name, tensor in to_tensors(known).items()
        if "caches" not in name and (name not in tensors or tensors[name].shape[2:] != tensor.shape[2:])
    ]
    if foreign:
        raise ValueError(f"it is no session of this model: it differs in {', '.join(foreign[:5])}")
    return session


def _named(prefix: str, tree: Any) -> "list[tuple[str, Tensor]]":
    if isinstance(tree, Tensor):
        return [(prefix, tree)]
    if not isinstance(tree, tuple):
        return []
    names = getattr(tree, "_fields", range(len(tree)))
    return [pair for name, part in zip(names, tree) for pair in _named(f"{prefix}.{name}", part)]


def _state_of(tensors: Mapping[str, Tensor], prefix: str, num_blocks: int) -> State:
    return tuple(
        BlockState(
            tensors.get(f"{prefix}.{i}.memory"),
            tensors.get(f"{prefix}.{i}.tail"),
            _caches(tensors, f"{prefix}.{i}"),
        )
        for i in range(num_blocks)
    )


def _caches(tensors: Mapping[str, Tensor], prefix: str) -> tuple[KVCache, ...]:
    found: list[KVCache] = []
    while f"{prefix}.caches.{len(found)}.keys" in tensors:
        name = f"{prefix}.caches.{len(found)}"
        found.append(KVCache(*(tensors[f"{name}.{field}"] for field in KVCache._fields)))
    return tuple(found)
