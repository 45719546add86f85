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
        in_order = [stream for stream in self._open for _ in range(self.rows_per_stream)]
        return self._packed(in_order) if self.mixture.is_packed else self._examples(in_order)

    def state(self) -> list[list[int]]:
        return [stream.state() for stream in self._open] or [list(state) for state in self._states]

    def _packed(self, in_order: "list[_Stream]") -> Rows:
        return join([stream.packed() for stream in in_order])

    def _examples(self, in_order: "list[_Stream]") -> Rows:
        """Everything but the copy of its tokens is done for all rows at once."""
        tokens = np.empty((len(in_order), 2, self.mixture.row_tokens), dtype=np.int64)
        difficulty, names = np.empty(len(in_order), dtype=np.int64), np.empty((len(in_order), 4), np.int64)
        for row, stream in enumerate(in_order):
            difficulty[row], names[row] = stream.example(tokens[row])
        if tokens.min() < -1 or tokens.max() >= self.mixture.vocab_size:
            wrong = ((tokens < -1) | (tokens >= self.mixture.vocab_size)).any(axis=(1, 2))
            source, shard, sample, _ = names[wrong][0]
            name = self.mixture.indexes[source].shards[shard].name
            raise ShardError(
                f"{self.mixture.urls[source]}/{name}: sample {sample} of it holds ids that are not below "
                f"{self.mixture.vocab_size}"
            )
        ids, targets = tokens[:, 0], tokens[:, 1]
        masks = {"loss_mask": targets >= 0, "valid": ids >= 0}
        return Rows(
            Examples(np.maximum(ids, 0), np.maximum(targets, 0), **masks, difficulty=difficulty), names
        )


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

    def _next(self) -> "_Source":
        return self.sources[source_at(self.drawn, self.number, self.mixture.shares, self.mixture.seed)]

    def example(self, tokens: Ints) -> tuple[int, list[int]]:
        """Copies the next example to ``tokens`` [2, T]; its difficulty and name."""
        source = self._next()
        shard, sample, name = source.find()
        found = shard.tokens(sample)
        if found.shape != tokens.shape:
            raise ShardError(
                f"{shard.name}: sample {shard.keys[sample]} has the shape {list(found.shape)} and not "
                f"{list(tokens.shape)}"
            )
        tokens[:] = found
        difficulty = shard.meta(sample).get("difficulty", 0)
        if type(difficulty) is not int:
            raise ShardError(f"{shard.name}: the difficulty of {shard.keys[sample]} is no whole number")
        self._finish(source)
        return difficulty, name

    def _finish(self, source: "_Source") -> None:
        source.advance()
        self.drawn += 1

    def packed(self) -> Rows:
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
            first, end = source.position.tokens, self.mixture.end_id
            num_ids = self.mixture.vocab_size - (end == self.mixture.vocab_size - 1)  # without one of its own
            text = np.concatenate([[end], _document(shard, sample, num_ids), [end]]).astype(np.int64)
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
        return Rows(row, np.array(names[:1]), reset[None])


class _Current(NamedTuple):
    """The shard that a stream reads: its place among those of the stream, and in the index."""

    turn: int
    number: int
    shard: Shard
    order: list[int]


class _Source:
    """One source as one stream reads it; holds its shard and has the next one fetched."""

    def __init__(
        self, mixture: Mixture, reader: ShardReader, source: int, stream: int, position: Position
    ) -> None:
        self.mixture, self.reader, self.source, self.stream = mixture, reader, source, stream
        self.position = position
        self._ahead: dict[int, Future[Shard]] = {}  # by number of the shard in this stream
        self._current: _Current | None = None

    def find(self) -> tuple[Shard, int, list[int]]:
        """The shard, the sample in it, and the name of the place."""
        current = self._current
        if current is None or current.turn != self.position.shards:
            current = self._current = self._turn()
        sample = current.order[self.position.samples]
        return current.shard, sample, [self.source, current.number, sample, self.position.tokens]

    def advance(self) -> None:
        """To the next sample after the one found."""
        assert self._current is not None
        shards, samples, _ = self.position
        is_last = samples + 1 == len(self._current.order)
        self.position = Position(shards + 1) if is_last else Position(shards, samples + 1)

    def _turn(self) -> "_Current":
        """The shard that is due, and the order of its samples."""
        shard = self._shard()
        epoch, number = self._place(self.position.shards)
        purpose = f"samples of shard {number} of source {self.source}"
        order = shuffled(len(shard), self.mixture.seed, purpose, epoch).tolist()
        return _Current(self.position.shards, number, shard, order)

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


def _document(shard: Shard, sample: int, num_ids: int) -> Tokens:
    tokens = shard.tokens(sample)
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < num_ids):
        raise ShardError(f"{shard.name}: document {shard.keys[sample]} is no row of ids below {num_ids}")
    return tokens


def join(parts: Sequence[Rows]) -> Rows:
    """All rows in one."""
    if len(parts) == 1:
        return parts[0]
    examples = Examples(*(np.concatenate(column) for column in zip(*(p.examples for p in parts))))
    names = np.concatenate([p.names for p in parts])
    resets = [p.reset_state for p in parts if p.reset_state is not None]
    return Rows(examples, names, np.concatenate(resets) if resets else None)


def spread(streams: range, num_parts: int) -> Iterator[range]:
    """Neighbouring streams in parts that differ by at most one."""
    for part in np.array_split(np.arange(streams.start, streams.stop), num_parts):
        if len(part):
            yield range(int(part[0]), int(part[-1]) + 1)
