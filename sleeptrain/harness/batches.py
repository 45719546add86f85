"""Many texts with one model: read side by side, what they share once; scored, and written on."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from sleeptrain.model.sizes import tokens_at_once
from sleeptrain.session import Session, choose
from sleeptrain.tasks.text_decoder import TextDecoder
from sleeptrain.tasks.tokenizer import Tokenizer

Ids = list[int]

_NOTHING = -1  # where a shorter row has no target


class Score(NamedTuple):
    """Of some tokens: the log-probability of all, in nats, and whether each was the most likely one."""

    log_probability: float
    is_greedy: bool


class Writing(NamedTuple):
    """How to write: at most so many tokens, up to the first of the texts ``until``; greedy at temperature
    0."""

    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


def after_contexts(
    empty: Session, contexts: Sequence[Ids], order: Sequence[int], num_rows: int
) -> Iterator[tuple[Session, list[int]]]:
    """Sessions of at most ``num_rows`` rows that have read contexts, and of which context, by its number,
    each row is. Numbers are taken in this order; a context that comes several times is read once.

    ``empty``: a session that has read nothing.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number in order:
        sharing.setdefault(tuple(contexts[number]), []).append(number)
    different = list(sharing.items())
    for start in range(0, len(different), num_rows):
        group = different[start : start + num_rows]
        session = empty.fork([0] * len(group))
        for piece in _pieces(session, [list(context) for context, _ in group]):
            session.read(piece)
        rows = [(row, number) for row, (_, numbers) in enumerate(group) for number in numbers]
        for first in range(0, len(rows), num_rows):
            part = rows[first : first + num_rows]
            yield session.fork([row for row, _ in part]), [number for _, number in part]


def score(session: Session, rows: Sequence[Ids]) -> list[Score]:
    """Of each row's ids, after what its sequence has read. The session reads them but for the last ones."""
    device = session.device
    sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=device)
    for logits, targets in _predictions(session, rows):
        ids = pad_sequence(
            [torch.tensor(row, dtype=torch.long, device=device) for row in targets],
            batch_first=True,
            padding_value=_NOTHING,
        )
        nll = cross_entropy(logits.float().mT, ids, ignore_index=_NOTHING, reduction="none")
        sums -= nll.double().sum(1)
        greedy &= ((logits.argmax(-1) == ids) | (ids == _NOTHING)).all(1)
    return [Score(*pair) for pair in zip(sums.tolist(), greedy.tolist())]


def _predictions(session: Session, rows: Sequence[Ids]) -> Iterator[tuple[Tensor, list[Ids]]]:
    """Logits ``[B, T, V]`` and what they should say."""
    if any(rows):
        yield session.next_logits[:, None], [row[:1] for row in rows]
    shown, following = ([row[cut] for row in rows] for cut in (slice(None, -1), slice(1, None)))
    for piece, targets in zip(_pieces(session, shown), _pieces(session, following)):
        yield session.feed(piece), targets


def write(session: Session, how: Writing, generator: torch.Generator) -> list[str]:
    """What each sequence writes, until it ends its document, a text of ``until`` comes (which is cut off), or
    there are enough tokens. Raises ConfigError where there is no tokenizer."""
    tokenizer = session.require_tokenizer()
    texts = [_Text(tokenizer, how.until) for _ in session.next_logits]
    going = texts  # those of the rows that are left in the session
    for count in range(1, how.max_tokens + 1):
        ids = choose(session.next_logits, how.temperature, how.top_p, generator)
        goes_on = [text.add(i) for text, i in zip(going, ids.tolist())]
        left = [row for row, on in enumerate(goes_on) if on]
        if not left or count == how.max_tokens:
            break
        if len(left) < len(going):
            session, ids, going = session.fork(left), ids[left], [going[row] for row in left]
        session.read(ids[:, None])
    return [text.cut() for text in texts]


class _Text:
    """What one sequence writes."""

    def __init__(self, tokenizer: Tokenizer, until: tuple[str, ...]) -> None:
        self._decoder, self._end_id, self._until = TextDecoder(tokenizer), tokenizer.end_id, until
        self._told: list[str] = []
        self._last = ""  # letters, as many as a text of ``until`` may begin with

    def add(self, i: int) -> bool:
        """Whether it goes on after this id."""
        self._told.append(self._decoder.feed([i]))
        seen = self._last + self._told[-1]
        self._last = seen[-max(map(len, self._until), default=1) :]
        if i == self._end_id:
            return False
        now = seen + self._decoder.rest() if self._until else ""
        return not any(stop in now for stop in self._until)

    def cut(self) -> str:
        """Up to the first text of ``until``, if there is one."""
        text = "".join(self._told) + self._decoder.rest()
        return text[: min((text.find(stop) for stop in self._until if stop in text), default=len(text))]


def _pieces(session: Session, rows: Sequence[Ids]) -> Iterator[list[Ids]]:
    """As much of each row at a time as there may be logits of."""
    size = tokens_at_once(*session.next_logits.shape)
    for start in range(0, max(map(len, rows), default=0), size):
        yield [row[start : start + size] for row in rows]
