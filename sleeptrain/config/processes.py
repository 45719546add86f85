"""How a run is spread over processes, and who starts them."""

from dataclasses import dataclass
from typing import Literal

from sleeptrain.config.checks import require_in, require_positive
from sleeptrain.schema import ConfigError, setting


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over processes. The result does not depend on it, but for the order of sums."""

    backend: Literal["auto", "local", "megatron_deepspeed"] = setting(
        "auto", "local: plain torch in one process; auto: that, if there is one process and nothing to split"
    )
    tensor_size: int = setting(1, "tensor-parallel degree: heads and channels of each block are split")
    pipeline_size: int = setting(1, "pipeline stages; each holds a part of prelude, core and coda")
    data_size: int | None = setting(None, "data-parallel replicas; null: as many as processes allow")
    sequence_parallel: bool = setting(False, "split tokens over the tensor ranks between blocks")
    zero_stage: Literal[0, 1, 2, 3] = setting(
        1, "ZeRO: shard optimizer state (1), and gradients (2), and weights (3) over the replicas"
    )
    offload_optimizer: bool = setting(False, "keep optimizer state in host memory (ZeRO 1 and 2)")
    weights: Literal["float32", "bfloat16"] = setting(
        "float32", "type of the weights; bfloat16 keeps float32 masters, and norms, A_log, dt_bias in float32"
    )

    @property
    def per_replica(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_size * self.pipeline_size

    @property
    def is_local(self) -> bool:
        """Whether one process of plain torch is meant."""
        degrees = (self.tensor_size, self.pipeline_size, self.data_size or 1)
        return self.backend == "local" or (self.backend == "auto" and max(degrees) == 1)

    def __post_init__(self) -> None:
        require_positive("parallel", self, ("tensor_size", "pipeline_size"))
        if self.data_size is not None:
            require_positive("parallel", self, ("data_size",))
        degrees = (self.tensor_size, self.pipeline_size, self.data_size or 1)
        if self.backend == "local" and max(degrees) > 1:
            raise ConfigError(
                f"parallel.backend=local is one process, and the degrees are {degrees}; "
                "use parallel.backend=auto"
            )
        if self.sequence_parallel and self.tensor_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true needs parallel.tensor_size above 1; set it, or leave it out"
            )
        if self.zero_stage == 3 and self.pipeline_size > 1:
            raise ConfigError(
                f"parallel.zero_stage=3 does not go with parallel.pipeline_size={self.pipeline_size}: each "
                "visit would gather the weights anew; use zero_stage=1 or 2, or pipeline_size=1"
            )
        for name, asked in (
            ("weights=bfloat16", self.weights == "bfloat16"),
            ("offload_optimizer=true", self.offload_optimizer),
        ):
            if asked and self.zero_stage not in (1, 2):
                raise ConfigError(
                    f"parallel.{name} needs ZeRO stage 1 or 2, and parallel.zero_stage={self.zero_stage}; "
                    "set it to 1 or 2"
                )


@dataclass(frozen=True)
class ClusterConfig:
    """Who starts the processes of a run, and what is done when some of them die. No result depends on it."""

    kind: Literal["local", "local_procs", "ray", "slurm"] = setting(
        "local",
        "local: this process is the run, or torchrun started it; local_procs: torchrun on this machine; ray: "
        "workers of a Ray cluster; slurm: tasks that srun started",
    )
    num_workers: int | None = setting(
        None, "processes to start (local_procs, ray); null: one replica, or parallel.data_size of them"
    )
    min_workers: int | None = setting(
        None, "ray: go on with as few when nodes are gone, and grow again when they are back; null: never"
    )
    max_restarts: int = setting(3, "how often the processes are started again after a failure")
    resize_check_seconds: float = setting(60.0, "ray: look so often whether there is room to grow")
    resources_wait_seconds: float = setting(
        60.0,
        "ray: how long a run waits at its start for nodes that are still to join or to be made",
    )
    allow_unauthenticated: bool = setting(
        False, "ray: use a cluster that others on the network can reach without a token"
    )

    def workers(self, parallel: ParallelConfig) -> int:
        """Processes to start."""
        return self.num_workers or parallel.per_replica * (parallel.data_size or 1)

    def __post_init__(self) -> None:
        for name in ("num_workers", "min_workers"):
            if getattr(self, name) is not None:
                require_positive("cluster", self, (name,))
        require_in("cluster", self, ("max_restarts", "resize_check_seconds", "resources_wait_seconds"), 0)
        if self.num_workers is not None and self.kind not in ("local_procs", "ray"):
            raise ConfigError(
                f"cluster.num_workers={self.num_workers} is not for cluster.kind={self.kind}, whose "
                "processes torchrun or srun counts; leave it out, or use cluster=local_procs or cluster=ray"
            )
        if self.min_workers is not None and self.kind != "ray":
            raise ConfigError(
                f"cluster.min_workers={self.min_workers} is for cluster=ray, and cluster.kind={self.kind}; "
                "leave it out"
            )
