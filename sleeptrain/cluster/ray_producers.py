"""The producers of a run: tasks of Ray that make its shards while training reads them.

The order in which training comes to the shards is known, so they are made in that order and never more than
``data.shards_ahead`` before they are needed. Ray starts a task again whose process or node is gone; a shard
has the same bytes whoever makes it and appears whole, so nothing is lost or doubled.
"""

import time
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sleeptrain.config import Config
from sleeptrain.data.index import ShardEntry
from sleeptrain.data.order import shard_at
from sleeptrain.data.shard_maker import Folder, claim, complete, finish
from sleeptrain.data.shard_plan import Plan, plan_of_run
from sleeptrain.schema import ConfigError, RunError


@ray.remote
def make_shard(plan: Plan, shard: int, known: ShardEntry | None) -> ShardEntry:
    """A task: makes the shard unless it is there, whole."""
    return finish(plan, shard, known)[0]


class Producers:
    """Raises ConfigError where the folder of the set is not the same for all, or holds another set."""

    def __init__(self, config: Config) -> None:
        self.config, self._max_retries = config.data, config.cluster.max_restarts
        _require_shared(self.config.shards[0])
        self._folder = Folder(self.config.shards[0])
        self._plan, self._known = claim(plan_of_run(config), self._folder)
        places = range(self._plan.num_shards)
        self._due = deque(shard_at(place, len(places), config.run.seed, source=0)[1] for place in places)
        self._running: dict[Any, int] = {}
        self._made: dict[int, ShardEntry] = {}
        self._shared_plan = ray.put(self._plan)
        # They need no CPU in Ray's books: workers that hold all of them may be waiting for a shard.
        self._task = make_shard.options(
            num_cpus=0, max_retries=self._max_retries, scheduling_strategy="SPREAD"
        )

    @property
    def progress(self) -> str:
        return f"{len(self._made)} of {self._plan.num_shards}"

    def advance(self, step: int, seconds: float) -> bool:
        """Makes what may be made once ``step`` steps are done, for so long or until there is nothing to do;
        whether there still is. Raises RunError where a shard cannot be made."""
        deadline = time.monotonic() + seconds
        while True:
            while self._due and len(self._running) < self.config.num_producers and self._may_begin(step):
                self._begin(self._due.popleft())
            if not self._running or time.monotonic() > deadline:
                return bool(self._running)
            done, _ = ray.wait(list(self._running), timeout=max(0.0, deadline - time.monotonic()))
            for task in done:
                self._take(task)

    def _may_begin(self, step: int) -> bool:
        """Each stream reads one shard at a time, and all of them as many samples in a step."""
        data = self.config
        turn = step * data.batch_sequences // data.streams // data.shard_samples
        num_begun = self._plan.num_shards - len(self._due)
        return num_begun < (turn + 1) * data.streams + data.shards_ahead

    def _begin(self, shard: int) -> None:
        known = self._known.get(self._plan.name(shard))
        self._running[self._task.remote(self._shared_plan, shard, known)] = shard

    def _take(self, task: Any) -> None:
        shard = self._running.pop(task)
        name = self._plan.name(shard)
        try:
            self._made[shard] = ray.get(task)
        except RayTaskError as error:
            raise RunError(f"shard {name} cannot be made: {error.cause}") from error
        except RayError as error:
            raise RunError(
                f"shard {name} cannot be made: its producer was lost {1 + self._max_retries} times "
                f"({type(error).__name__}), perhaps for want of memory; lower data.num_producers or "
                "data.shard_samples"
            ) from error
        if len(self._made) == self._plan.num_shards:
            complete(self._plan, self._folder, [self._made[i] for i in range(self._plan.num_shards)])


def _require_shared(url: str) -> None:
    if "://" not in url and not Path(url).is_absolute():
        raise ConfigError(
            f"data.shards={url} would lie in the working folder of a job, which ends with it; give an "
            "absolute path on a file system that all nodes share, or a URL"
        )
