"""The batches of a run, in an order that neither restarts nor the number of replicas change.

Rows come from the task or from shards (``rows.py``), made here or by processes that work ahead; the state is
that of the last batch handed out.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sleeptrain.data.batch import Batch, make_batch
from sleeptrain.data.mixture import Mixture
from sleeptrain.data.rows import GeneratedRows, RowMaker, Rows, StreamedRows, join, spread
from sleeptrain.schema import ConfigError, RunError
from sleeptrain.tasks.base import Task
from sleeptrain.tasks.counter import content_hash

BATCHES_AHEAD = 2  # of each worker
ORDER_BITS = 52  # a sum that JSON keeps exactly

Made = tuple[Rows, list[list[int]]]


class TrainStream:
    """Replica ``rank`` of ``num_replicas`` gets its equal share of the rows of each batch.

    ``batch`` wants the steps one after the other. From a task it may begin with any; from the shards of
    ``mixture`` with 0, or where ``load`` goes on.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        batch_sequences: int,
        window_tokens: int,
        rank: int = 0,
        num_replicas: int = 1,
        mixture: Mixture | None = None,
        num_workers: int = 0,
    ) -> None:
        self.task, self.seed, self.window_tokens = task, seed, window_tokens
        self.batch_sequences, self.mixture, self.num_workers = batch_sequences, mixture, num_workers
        self.rank, self.num_replicas = rank, num_replicas
        num_streams = mixture.num_streams if mixture else batch_sequences
        if num_streams % num_replicas:
            raise ConfigError(
                f"data.num_streams={num_streams} cannot be shared evenly by {num_replicas} replicas; choose "
                "parallel.data_size among its divisors"
            )
        share = num_streams // num_replicas
        self.streams = range(rank * share, (rank + 1) * share)
        self.rows_per_stream = batch_sequences // num_streams
        num_sources = len(mixture.urls) if mixture else 0
        self._states = [[0] * (1 + 3 * num_sources) for _ in range(num_streams)] if mixture else []
        self._order = 0
        self._step: int | None = None
        self._parts: list[Iterator[Made]] = []
        self._loader: Any = None

    def batch(self, step: int) -> Batch:
        """Raises RunError when the data cannot be read."""
        if step != self._step:
            expected = self._step or 0
            if self.mixture and step != expected:
                raise ValueError(
                    f"batches of shards come one after the other: expected {expected}, got {step}"
                )
            self._start(step)
        made = [next(part) for part in self._parts]
        rows = join([rows for rows, _ in made])
        if self.mixture:
            self._states[self.streams.start : self.streams.stop] = [s for _, states in made for s in states]
        self._step = step + 1
        numbers = step * self.batch_sequences + self._rows()
        self._order = (self._order + _order_of(numbers, rows.names)) % 2**ORDER_BITS
        # The seed spreads over what a counter never reaches, so that runs drop differently.
        return make_batch(rows.examples, self.window_tokens, numbers + (self.seed << 40), rows.reset_state)

    def state(self) -> dict[str, Any]:
        """After the last batch: of each own stream where it stands, and a checksum of the order of all
        samples so far, which adds up over replicas."""
        own = self._states[self.streams.start : self.streams.stop]
        return {"streams": own, "order": self._order}

    def load(self, states: Sequence[dict[str, Any]], step: int) -> None:
        """Goes on at ``step`` from the states of all replicas of any run, in their order."""
        streams = [list(stream) for state in states for stream in state["streams"]]
        if self.mixture and len(streams) != len(self._states):
            raise ConfigError(
                f"data.num_streams={len(self._states)}, and the checkpoint has {len(streams)}; set it to that"
            )
        self._states = streams
        self._order = sum(state["order"] for state in states) % 2**ORDER_BITS if self.rank == 0 else 0
        self._start(step)

    def close(self) -> None:
        """Ends the workers."""
        if self._loader is not None:
            for worker in self._loader._workers:  # they ignore SIGTERM
                worker.kill()
        self._loader, self._parts, self._step = None, [], None

    def _rows(self) -> np.ndarray:
        return np.arange(self.streams.start * self.rows_per_stream, self.streams.stop * self.rows_per_stream)

    def _start(self, step: int) -> None:
        self.close()
        makers = [
            self._maker(part, step)
            for part in spread(self.streams, min(max(1, self.num_workers), len(self.streams)))
        ]
        if self.num_workers:
            self._loader = iter(_ahead(makers))
            self._parts = [_from_workers(self._loader)] * len(makers)
        else:
            self._parts = [_made(maker) for maker in makers]
        self._step = step

    def _maker(self, streams: range, step: int) -> RowMaker:
        if self.mixture:
            return StreamedRows(
                self.mixture, streams, self.rows_per_stream, self._states[streams.start : streams.stop]
            )
        return GeneratedRows(self.task, self.seed, self.batch_sequences, streams, step)


class _Workers(IterableDataset):
    """A maker for each worker. An error that a user can mend travels as a value, without the worker's
    stack."""

    def __init__(self, makers: list[RowMaker]) -> None:
        self.makers = makers

    def __iter__(self) -> Iterator[Made | RunError]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from _made(self.makers[info.id])
        except RunError as error:
            yield error


def _made(maker: RowMaker) -> Iterator[Made]:
    while True:
        rows = maker.take()
        yield rows, maker.state()


def _ahead(makers: list[RowMaker]) -> DataLoader:
    """Its iterator gives what the workers made, one after the other in turns."""
    # Not by fork: a child would hold the lock of the run folder, and locks of threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return DataLoader(
        _Workers(makers),
        batch_size=None,
        num_workers=len(makers),
        prefetch_factor=BATCHES_AHEAD,
        multiprocessing_context=context,
        worker_init_fn=_follow_the_trainer,
        collate_fn=_as_it_is,
    )


def _from_workers(items: Iterator[Made | RunError]) -> Iterator[Made]:
    while True:
        try:
            item = next(items)
        except RuntimeError as error:  # torch noticed that one is gone
            raise RunError(
                f"a data worker died ({error}); the same command goes on from the last checkpoint, with "
                "data.num_workers=0 without workers"
            ) from error
        if isinstance(item, RunError):
            raise item
        yield item


def _follow_the_trainer(_: int) -> None:
    """Signals to the whole job are its business; when it is gone, however it ended, so is the worker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after_the_trainer, daemon=True).start()


def _end_after_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _as_it_is(item: Any) -> Any:
    return item


def _order_of(numbers: np.ndarray, names: np.ndarray) -> int:
    """A checksum of which sample is in which row of the run."""
    with np.errstate(over="ignore"):
        hashes = content_hash(numbers.astype(np.uint64), *names.T.astype(np.uint64))
    return int(hashes.astype(object).sum()) % 2**ORDER_BITS
