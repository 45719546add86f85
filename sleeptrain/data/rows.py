"""Rows of batches, from a task or from shards: what the logical streams of a run hand out one after the
other."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np

from sleeptrain.data.fetch import Cache, ShardReader
from sleeptrain.data.index import ShardError
from sleeptrain.data.mixture import Mixture
from sleeptrain.data.order import shard_at, shuffled, source_at
from sleeptrain.data.shards import Shard, Tokens
from sleeptrain.tasks.base import Bools, Examples, Ints, Task


class Rows(NamedTuple):
    """Some rows of a batch; ``names`` ``[R, 4]`` tell where each begins: source, shard, sample, token.
    ``reset_state`` ``[R, W]`` as in ``Batch``, None for examples."""

    examples: Examples
    names: Ints
    reset_state: Bools | None = None


class Position(NamedTuple):
    """Where a stream stands in a source: shards that it finished, samples of the next, tokens of that
    one."""

    shards: int = 0
    samples: int = 0
    tokens: int = 0


class RowMaker(Protocol):
    """The rows of some streams, batch after batch; ``state`` is a list of integers per stream."""

    def take(self) -> Rows: ...
    def state(self) -> list[list[int]]: ...


class GeneratedRows:
    """Rows that a task makes: batch ``step`` holds its examples ``step * batch_sequences`` and following."""

    def __init__(self, task: Task, seed: int, batch_sequences: int, rows: range, step: int) -> None:
        self.task, self.seed, self.batch_sequences = task, seed, batch_sequences
        self.rows, self.step = rows, step

    def take(self) -> Rows:
        indices = self.step * self.batch_sequences + np.arange(self.rows.start, self.rows.stop)
        self.step += 1
        names = np.zeros((len(indices), 4), dtype=np.int64)
        names[:, 2] = indices
        return Rows(self.task.examples(self.seed, indices, "train"), names)

    def state(self) -> list[list[int]]:
        return []


class StreamedRows:
    """Rows of the logical streams ``streams``, each of which fills ``rows_per_stream`` of a batch."""

    def __init__(
        self, mixture: Mixture, streams: range, rows_per_stream: int, states: Sequence[Sequence[int]]
    ) -> None:
        self.mixture, self.streams, self.rows_per_stream = mixture, streams, rows_per_stream
        self._states = states
        self._open: list[_Stream] = []  # not before the first row: it may be made in another process

    def take(self) -> Rows:
        """Raises ShardError for a shard that cannot be used."""
        if not self._open:
            cache = Cache(*self.mixture.cache) if self.mixture.cache else None
            readers = [ShardReader(u, i, cache) for u, i in zip(self.mixture.urls, self.mixture.indexes)]
            self._open = [
                _Stream(self.mixture, readers, number, state)
                for number, state in zip(self.streams, self._states)
            ]
        return join([stream.row() for stream in self._open for _ in range(self.rows_per_stream)])

    def state(self) -> list[list[int]]:
        return [stream.state() for stream in self._open] or [list(state) for state in self._states]


class _Stream:
    """One logical stream over all sources."""

    def __init__(
        self, mixture: Mixture, readers: list[ShardReader], number: int, state: Sequence[int]
    ) -> None:
        self.mixture, self.number, self.drawn = mixture, number, state[0]
        self.sources = [
            _Source(mixture, reader, source, number, Position(*state[1 + 3 * source : 4 + 3 * source]))
            for source, reader in enumerate(readers)
        ]

    def state(self) -> list[int]:
        """Samples drawn, then the position in each source."""
        return [self.drawn, *(n for source in self.sources for n in source.position)]

    def row(self) -> Rows:
        return self._packed() if self.mixture.is_packed else self._example()

    def _next(self) -> "_Source":
        return self.sources[source_at(self.drawn, self.number, self.mixture.shares, self.mixture.seed)]

    def _example(self) -> Rows:
        source = self._next()
        shard, sample, name = source.find()
        ids, targets = _example_arrays(shard, sample, self.mixture.row_tokens, self.mixture.vocab_size)
        difficulty = shard.meta(sample).get("difficulty", 0)
        if type(difficulty) is not int:
            raise ShardError(f"{shard.name}: the difficulty of {shard.keys[sample]} is no whole number")
        self._finish(source)
        row = Examples(
            ids=np.maximum(ids, 0)[None],
            targets=np.maximum(targets, 0)[None],
            loss_mask=(targets >= 0)[None],
            valid=(ids >= 0)[None],
            difficulty=np.array([difficulty]),
        )
        return Rows(row, name[None])

    def _finish(self, source: "_Source") -> None:
        source.advance()
        self.drawn += 1

    def _packed(self) -> Rows:
        """Documents one after the other, each from the border of a window on, the last one cut where the row
        ends. Pads fill up the first window of a document, so that its other windows are full."""
        length = self.mixture.window_tokens
        num_windows = self.mixture.row_tokens // length
        ids = np.zeros((num_windows, length), dtype=np.int64)
        targets, valid = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
        reset, names, window = np.zeros(num_windows, dtype=bool), [], 0
        while window < num_windows:
            source = self._next()
            shard, sample, name = source.find()
            first, end = source.position.tokens, self.mixture.vocab_size - 1
            text = np.concatenate([[end], _document(shard, sample, end), [end]]).astype(np.int64)
            left = len(text) - 1 - first
            used = min(-(-left // length), num_windows - window)
            pads = -left % length
            stop = min(first + used * length - pads, len(text) - 1)
            here = slice(window, window + used)
            ids[here].reshape(-1)[pads:] = text[first:stop]
            targets[here].reshape(-1)[pads:] = text[first + 1 : stop + 1]
            valid[here].reshape(-1)[pads:] = True
            reset[window] = first == 0
            names.append(name)
            window += used
            if stop == len(text) - 1:
                self._finish(source)
            else:
                source.position = source.position._replace(tokens=stop)
        mask = valid.reshape(1, -1)
        row = Examples(ids.reshape(1, -1), targets.reshape(1, -1), mask, mask, np.zeros(1, dtype=np.int64))
        return Rows(row, names[0][None], reset[None])


class _Source:
    """One source as one stream reads it; holds its shard and has the next one fetched."""

    def __init__(
        self, mixture: Mixture, reader: ShardReader, source: int, stream: int, position: Position
    ) -> None:
        self.mixture, self.reader, self.source, self.stream = mixture, reader, source, stream
        self.position = position
        self._ahead: dict[int, Future[Shard]] = {}  # by number of the shard in this stream
        self._order: tuple[int, Ints] = (-1, np.zeros(0, dtype=np.int64))

    def find(self) -> tuple[Shard, int, Ints]:
        """The shard, the sample in it, and the name of the place."""
        shard = self._shard()
        epoch, number = self._place(self.position.shards)
        if self._order[0] != self.position.shards:
            purpose = f"samples of shard {number} of source {self.source}"
            self._order = (self.position.shards, shuffled(len(shard), self.mixture.seed, purpose, epoch))
        sample = int(self._order[1][self.position.samples])
        return shard, sample, np.array([self.source, number, sample, self.position.tokens])

    def advance(self) -> None:
        """To the next sample."""
        shards, samples, _ = self.position
        is_last = samples + 1 == len(self._shard())
        self.position = Position(shards + 1) if is_last else Position(shards, samples + 1)

    def _shard(self) -> Shard:
        for _ in self.reader.index.shards:
            now = self.position.shards
            self._ahead = {n: self._ahead.get(n) or self._fetch(n) for n in (now, now + 1)}
            try:
                return self._ahead[now].result()
            except ShardError as error:
                if not self.mixture.skips_bad_shards:
                    raise
                print(f"warning: a shard is skipped: {error}", flush=True)
                self.position = Position(now + 1)
        raise ShardError(f"{self.reader.url} has no shard left that stream {self.stream} can use")

    def _fetch(self, shards: int) -> "Future[Shard]":
        return self.reader.fetch(self._place(shards)[1])

    def _place(self, shards: int) -> tuple[int, int]:
        place = shards * self.mixture.num_streams + self.stream
        return shard_at(place, len(self.reader.index.shards), self.mixture.seed, self.source)


def _example_arrays(shard: Shard, sample: int, num_tokens: int, vocab_size: int) -> tuple[Ints, Ints]:
    tokens = shard.tokens(sample)
    if tokens.shape != (2, num_tokens) or not -1 <= tokens.min() <= tokens.max() < vocab_size:
        raise ShardError(
            f"{shard.name}: sample {shard.keys[sample]} is no example of {num_tokens} tokens below "
            f"{vocab_size}"
        )
    ids, targets = tokens.astype(np.int64)
    return ids, targets


def _document(shard: Shard, sample: int, end: int) -> Tokens:
    tokens = shard.tokens(sample)
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < end):
        raise ShardError(f"{shard.name}: document {shard.keys[sample]} is no row of ids below {end}")
    return tokens


def join(parts: Sequence[Rows]) -> Rows:
    """All rows in one."""
    examples = Examples(*(np.concatenate(column) for column in zip(*(p.examples for p in parts))))
    names = np.concatenate([p.names for p in parts])
    resets = [p.reset_state for p in parts if p.reset_state is not None]
    return Rows(examples, names, np.concatenate(resets) if resets else None)


def spread(streams: range, num_parts: int) -> Iterator[range]:
    """Neighbouring streams in parts that differ by at most one."""
    for part in np.array_split(np.arange(streams.start, streams.stop), num_parts):
        if len(part):
            yield range(int(part[0]), int(part[-1]) + 1)
