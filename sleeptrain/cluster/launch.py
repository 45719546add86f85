"""Is this process a worker, or does it start the workers? One rule: where RANK is set, it is a worker.

torchrun sets RANK; for srun it is set here from what Slurm says; a Ray worker sets it for the process that
trains. A process without RANK does as ``cluster.kind`` says: ``local`` trains alone, ``local_procs`` becomes
torchrun, ``ray`` becomes the driver of workers on a cluster.
"""

import os
import sys
from collections.abc import Sequence

from sleeptrain.config import Config
from sleeptrain.engine.resilience import EXIT_CONFIG
from sleeptrain.schema import ConfigError, RunError

EXIT_FAILED = 1


def launch(config: Config, frozen_config: str, arguments: Sequence[str]) -> int:
    """Trains, here or in workers; returns the exit code. ``arguments`` are those that made ``config``."""
    try:
        if "RANK" not in os.environ:
            if config.cluster.kind == "local_procs":
                become_torchrun(config, arguments)
            if config.cluster.kind == "ray":
                from sleeptrain.cluster.ray_driver import drive

                return drive(config, frozen_config)
            enter_slurm_step(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return work(config, frozen_config)


def work(config: Config, frozen_config: str) -> int:
    """Trains in this process, one of those of the run; returns the exit code. Of several that have the same
    to say, one says it."""
    from sleeptrain.engine.trainer import train

    try:
        check_device(config)
        return train(config, frozen_config)
    except ConfigError as error:
        from sleeptrain.parallel.speaker import say

        say(f"error: {error}")
        return EXIT_CONFIG
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def become_torchrun(config: Config, arguments: Sequence[str]) -> None:
    """Replaces this process; never returns. Raises ConfigError where the machine has too few GPUs."""
    num_workers = config.cluster.workers(config.parallel)
    _check_gpus(config, num_workers, f"cluster.num_workers={num_workers}")
    group = ["--nproc-per-node", str(num_workers), "--max-restarts", str(config.cluster.max_restarts)]
    command = ["-m", "torch.distributed.run", "--standalone", *group, "-m", "sleeptrain.pretrain", *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


def check_device(config: Config) -> None:
    """Raises ConfigError where this machine has no GPU for this process."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    _check_gpus(config, local_rank + 1, f"LOCAL_RANK={local_rank}")


def _check_gpus(config: Config, num_needed: int, what: str) -> None:
    import torch

    if config.run.device == "cpu" or not torch.cuda.is_available():  # choose_device says what is wrong
        return
    num_gpus = torch.cuda.device_count()
    if num_needed > num_gpus:
        raise ConfigError(
            f"{what} needs {num_needed} GPUs on this machine, and there are {num_gpus}; start fewer "
            "processes on it, or set run.device=cpu"
        )


def enter_slurm_step(config: Config) -> None:
    """In a task that srun started, sets what torchrun would set. Raises ConfigError where the settings and
    Slurm disagree."""
    from sleeptrain.cluster import slurm

    num_tasks = slurm.num_tasks(os.environ)
    if config.cluster.kind == "slurm":
        if num_tasks is None:
            raise ConfigError(
                "cluster=slurm is for a task that srun started, and this is none; use sbatch "
                "launchers/slurm.sbatch, or leave cluster=slurm out"
            )
        os.environ |= slurm.rank_variables(os.environ)
    elif num_tasks is not None and num_tasks > 1:
        raise ConfigError(
            f"srun started {num_tasks} tasks, and cluster.kind=local would make each of them a run of its "
            "own; set cluster=slurm"
        )
