"""Where this process stands among those of the run, and the backend that goes with it.

One process of plain torch imports neither megatron-core nor DeepSpeed.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from sleeptrain.config import Config
from sleeptrain.parallel.backend import Backend, LocalBackend, choose_device, compute_dtype
from sleeptrain.parallel.kernel_check import check_kernels
from sleeptrain.schema import ConfigError

T = TypeVar("T")


class Place(Protocol):
    """``replica`` of ``num_replicas``: whose rows of a batch this process computes."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def replica(self) -> int: ...
    @property
    def num_replicas(self) -> int: ...
    def barrier(self) -> None:
        """Waits for all processes."""

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere; the same answer everywhere."""

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 gives (of plain Python), everywhere."""

    def gathered(self, value: Any) -> list[Any]:
        """What every process gives, by rank, everywhere."""

    @property
    def reads_data(self) -> bool:
        """Whether this process is the one of its replica that reads the data."""

    def from_reader(self, make: Callable[[], T]) -> T:
        """What the process of this replica that reads data makes, in all of its processes."""


class Alone:
    """The only process of the run."""

    rank, world_size, replica, num_replicas = 0, 1, 0, 1
    reads_data = True

    def barrier(self) -> None:
        return None

    def any(self, flag: bool) -> bool:
        return flag

    def from_first(self, value: Any) -> Any:
        return value

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def from_reader(self, make: Callable[[], T]) -> T:
        return make()


def world_size_given() -> int:
    """Processes of this run as the launcher tells; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_given() -> int:
    """This process's number as the launcher tells; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_alone(config: Config) -> bool:
    """Whether the run is one process of plain torch: nothing asks for more, and no launcher started more."""
    world_size = world_size_given()
    if config.parallel.backend == "local" and world_size > 1:
        raise ConfigError(
            f"parallel.backend=local is one process, and {world_size} were started; start one, or use "
            "parallel.backend=auto"
        )
    return config.parallel.is_local and world_size == 1


@contextmanager
def open_place(config: Config, vocab_size: int, sequence_tokens: int) -> Iterator[Place]:
    """Meets the other processes, if any. Raises ConfigError when the run cannot be spread as its settings
    ask."""
    device = choose_device(config.run.device)
    if config.parallel.weights == "bfloat16" and compute_dtype(config, device) != torch.bfloat16:
        raise ConfigError(
            "parallel.weights=bfloat16 computes in bfloat16, and this run in float32; set "
            "run.precision=bfloat16"
        )
    if is_alone(config):
        yield Alone()
        return
    if config.sleep.halting == "learned":
        raise ConfigError(
            "sleep.halting=learned is for one process of plain torch, and this run is spread over several; "
            "start one, with all degrees of parallel.* at 1, or use sleep.halting=none"
        )
    _quieten_libraries()
    from sleeptrain.parallel.check import check_degrees
    from sleeptrain.parallel.failure import failing_together
    from sleeptrain.parallel.topology import join, leave

    check_degrees(config, vocab_size, sequence_tokens, world_size_given())
    hang_seconds = config.run.hang_timeout_seconds  # the watchdog is first to name who hangs
    topology = join(config.parallel, device, timeout_seconds=max(600, hang_seconds + 60))
    with failing_together(topology.rank):
        yield topology
        leave()


def make_backend(config: Config, vocab_size: int, place: Place) -> Backend:
    """Plain torch for a process that is alone, else its part of the run. Raises ConfigError, before any of it
    is made, where the kernels of its fast weights are wrong on this device."""
    check_kernels(config, place.num_replicas)
    if isinstance(place, Alone):
        return LocalBackend(config, vocab_size)
    from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
    from sleeptrain.parallel.topology import Topology

    assert isinstance(place, Topology)
    return MegatronDeepspeedBackend(config, vocab_size, place)


def _quieten_libraries() -> None:
    """megatron-core warns of packages that it can do without."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.(all_gather|reduce_scatter)")
