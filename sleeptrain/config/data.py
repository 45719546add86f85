"""Batches, and the shards that they are read from."""

from dataclasses import dataclass
from typing import Literal

from sleeptrain.config.checks import require_in, require_positive
from sleeptrain.schema import ConfigError, setting


@dataclass(frozen=True)
class DataConfig:
    """Batches. Sizes are global, in sequences."""

    batch_sequences: int = setting(64, "sequences of one optimizer step")
    micro_batch_sequences: int | None = setting(
        None, "sequences of one forward/backward; null: the whole batch"
    )
    shards: tuple[str, ...] = setting(
        (), "folders or URLs of shards to train on (tools/make_shards.py); empty: the task makes its examples"
    )
    weights: tuple[float, ...] = setting((), "shares of data.shards; empty: by their numbers of samples")
    num_streams: int | None = setting(
        None, "logical streams that read the shards; replicas must divide them; null: at most 64"
    )
    num_workers: int = setting(0, "processes of each replica that make batches ahead; 0: none")
    on_bad_shard: Literal["stop", "skip"] = setting(
        "stop", "what a missing or damaged shard does: end the run, or be left out with a warning"
    )
    producer: Literal["none", "ray"] = setting(
        "none", "ray: tasks of the Ray cluster make the examples of data.shards while training reads them"
    )
    num_examples: int | None = setting(
        None, "examples that producers make; null: as many as the run reads; a multiple of data.shard_samples"
    )
    shard_samples: int = setting(256, "examples of each shard that producers make")
    num_producers: int = setting(2, "tasks that make shards at the same time")
    shards_ahead: int = setting(16, "how many shards beyond those in use are made at most")
    cache_dir: str = setting("", "folder for copies of shards from afar; empty: none are kept")
    cache_gib: float = setting(20.0, "size at which the copies unused for longest are removed")

    @property
    def streams(self) -> int:
        """By default the largest number up to 64 that divides the batch."""
        return self.num_streams or next(n for n in range(64, 0, -1) if self.batch_sequences % n == 0)

    @property
    def micro_batch(self) -> int:
        return self.micro_batch_sequences or self.batch_sequences

    def __post_init__(self) -> None:
        require_positive("data", self, ("batch_sequences",))
        if self.micro_batch_sequences is not None:
            require_positive("data", self, ("micro_batch_sequences",))
        if self.num_streams is not None:
            require_positive("data", self, ("num_streams",))
        require_in("data", self, ("num_workers", "cache_gib"), 0)
        if self.batch_sequences % self.streams:
            raise ConfigError(
                f"data.num_streams={self.streams} does not divide data.batch_sequences="
                f"{self.batch_sequences}; choose a divisor"
            )
        self._check_producer()
        if self.weights and (len(self.weights) != len(self.shards) or min(self.weights) <= 0):
            raise ConfigError(
                f"data.weights={list(self.weights)} must be a positive number for each of the "
                f"{len(self.shards)} data.shards; give as many, or leave it out"
            )
        if self.batch_sequences % self.micro_batch:
            raise ConfigError(
                f"data.micro_batch_sequences={self.micro_batch} does not divide "
                f"data.batch_sequences={self.batch_sequences}; choose a divisor"
            )

    def _check_producer(self) -> None:
        require_positive("data", self, ("shard_samples", "num_producers", "shards_ahead"))
        if self.producer != "none" and len(self.shards) != 1:
            raise ConfigError(
                f"data.producer={self.producer} makes one set of shards, and data.shards={list(self.shards)} "
                "names another number of folders; name the one folder that they shall be in"
            )
        if self.num_examples is not None and (
            self.num_examples < 1 or self.num_examples % self.shard_samples
        ):
            raise ConfigError(
                f"data.num_examples={self.num_examples} must be a positive multiple of data.shard_samples="
                f"{self.shard_samples}, since shards hold equally many"
            )
