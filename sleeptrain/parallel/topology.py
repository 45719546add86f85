"""Who is where: tensor x pipeline x data ranks and their process groups (megatron-core's).

The launcher (torchrun, srun, Ray) only sets the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Ranks count tensor first, then data, then pipeline, as megatron-core orders them: the ranks that
talk most are neighbours.
"""

import ipaddress
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sleeptrain.config import ParallelConfig
from sleeptrain.schema import ConfigError

Group = dist.ProcessGroup
T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """This process among the others. ``model`` is the group over tensor and pipeline ranks; ``ends`` the
    first and last stage of this pipeline, None in between; ``host`` all processes and ``model_host`` those of
    ``model``, for what is on the CPU."""

    device: torch.device
    tensor: Group
    pipeline: Group
    data: Group
    model: Group
    ends: Group | None
    host: Group
    model_host: Group

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def replica(self) -> int:
        return self.data.rank()

    @property
    def num_replicas(self) -> int:
        return self.data.size()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1

    def barrier(self) -> None:
        """Waits for all processes."""
        dist.barrier(group=self.host)

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere; the same answer everywhere."""
        told = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.host)
        return bool(told)

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 gives (of plain Python), everywhere."""
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.host)
        return told[0]

    def gathered(self, value: Any) -> list[Any]:
        """What every process gives (of plain Python), by rank, everywhere."""
        told = [None] * self.world_size
        dist.all_gather_object(told, value, group=self.host)
        return told

    @property
    def reads_data(self) -> bool:
        """Whether this process is the one of its replica that reads the data."""
        return self.model.rank() == 0

    def from_reader(self, make: Callable[[], T]) -> T:
        """What the process of this replica that reads data makes, in all of its processes."""
        told = [make() if self.reads_data else None]
        if self.model.size() > 1:
            dist.broadcast_object_list(told, group=self.model_host, group_src=0)
        return told[0]  # type: ignore[return-value]


def join(config: ParallelConfig, device: torch.device, timeout_seconds: float = 600) -> Topology:
    """Meets the other processes and forms the groups; raises ConfigError when the degrees do not fit their
    number. Once per process."""
    from sleeptrain.parallel.mcore import parallel_state

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "0"),
        ):
            os.environ.setdefault(name, value)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder, for the watchdog
        _meet(backend, timedelta(seconds=timeout_seconds))
    check_world(config, dist.get_world_size())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        config.tensor_size,
        config.pipeline_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    in_ends = parallel_state.is_rank_in_embedding_group(ignore_virtual=True)
    host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return Topology(
        device=torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        ends=parallel_state.get_embedding_group() if in_ends else None,
        host=host,
        model_host=_over_gloo(parallel_state.get_model_parallel_group(), host, timeout_seconds),
    )


def _meet(backend: str, timeout: timedelta) -> None:
    """torchrun keeps one store over all attempts of a group: each has its own part, where no address and no
    failure of the one before is found."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if _is_unreachable(os.environ["MASTER_ADDR"]) and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        store = _loopback_store(rank, world_size, timeout)
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
    attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout)


def _is_unreachable(address: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback
    except OSError:
        return False


def _loopback_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """At MASTER_ADDR alone: by itself the store of rank 0 would answer on every address of the machine."""
    address, port, descriptor = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        listening = socket.create_server((socket.gethostbyname(address), port), backlog=max(128, world_size))
        port, descriptor = listening.getsockname()[1], listening.detach()
    return dist.TCPStore(address, port, world_size, rank == 0, timeout, master_listen_fd=descriptor)


def _over_gloo(group: Group, host: Group, timeout_seconds: float) -> Group:
    """The same processes as ``group``. All processes call it, each with a group that it is in."""
    found: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, sorted(dist.get_process_group_ranks(group)), group=host)
    groups = [list(ranks) for ranks in sorted({tuple(ranks) for ranks in found})]
    timeout = timedelta(seconds=timeout_seconds)
    return dist.new_subgroups_by_enumeration(groups, timeout=timeout, backend="gloo")[0]


def leave() -> None:
    """Gives the groups back at the end of a run."""
    from sleeptrain.parallel.mcore import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def check_world(config: ParallelConfig, world_size: int) -> int:
    """The data-parallel degree; raises ConfigError when the degrees do not fit the number of processes."""
    per_replica = config.per_replica
    degrees = f"parallel.tensor_size={config.tensor_size} x parallel.pipeline_size={config.pipeline_size}"
    if config.data_size is not None and per_replica * config.data_size != world_size:
        raise ConfigError(
            f"{degrees} x parallel.data_size={config.data_size} needs {per_replica * config.data_size} "
            f"processes and there are {world_size}; start that many (torchrun --nproc-per-node), or change "
            "the degrees"
        )
    if world_size % per_replica:
        raise ConfigError(
            f"{degrees} makes replicas of {per_replica} processes, which do not divide the {world_size} that "
            f"run; start a multiple of {per_replica}, or change the degrees"
        )
    return world_size // per_replica


def all_reduce_flat(tensors: list[Tensor], group: Group) -> None:
    """Sums each tensor over the group in place, all of one dtype in one message."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        of_type = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in of_type])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(of_type, flat.split([t.numel() for t in of_type])):
            tensor.copy_(part.view_as(tensor))
