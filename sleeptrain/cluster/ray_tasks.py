"""Programs as tasks of a Ray cluster: the runs of a study, each wherever there is room for it.

Ray starts a task again whose process or node is gone; what it runs must go on where it was.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from sleeptrain.cluster.ray_cluster import connect
from sleeptrain.config import Config
from sleeptrain.schema import ConfigError

POLL_SECONDS = 0.5
EXIT_LOST = 1
NAMESPACE = "sleeptrain"


class Task(NamedTuple):
    """Arguments for the Python of the node, the folder that the program works in, and how many processes it
    starts: a GPU each, or a CPU where the cluster has no GPUs."""

    arguments: tuple[str, ...]
    folder: str
    num_workers: int


@ray.remote
def run_program(arguments: tuple[str, ...], folder: str) -> int:
    """The exit code. Where Ray cancels the task, the program gets a SIGTERM and the time to leave."""
    with (Path(folder) / "output.log").open("ab") as output:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=output, env=environment, process_group=0
        )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        return process.wait()


def run_tasks(
    config: Config, tasks: Mapping[str, Task], update: Callable[[], None], stops: list[int]
) -> dict[str, int]:
    """Exit codes by name, when all have ended; ``update`` is called while they run. Once there are ``stops``,
    the programs are told to leave. Raises ConfigError where there is no cluster, or one that strangers could
    use (as settings of any of the programs say)."""
    for folder in (task.folder for task in tasks.values() if not Path(task.folder).is_absolute()):
        raise ConfigError(
            f"{folder} would lie in the working folder of a job, which ends with it; give an absolute path "
            "on a file system that all nodes share"
        )
    connect(config, NAMESPACE)
    kind = "num_gpus" if ray.cluster_resources().get("GPU", 0) and config.run.device != "cpu" else "num_cpus"
    options: dict[str, Any] = {"max_retries": config.cluster.max_restarts, "scheduling_strategy": "SPREAD"}
    running = {
        run_program.options(**options, **{kind: task.num_workers}).remote(task.arguments, task.folder): name
        for name, task in tasks.items()
    }
    codes: dict[str, int] = {}
    while running:
        done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        for reference in done:
            codes[running.pop(reference)] = _exit_code(reference)
        if stops:
            for reference in running:
                ray.cancel(reference)
        update()
    return codes


def _exit_code(reference: Any) -> int:
    try:
        return int(ray.get(reference))
    except RayError:  # lost too often, or cancelled before it had begun
        return EXIT_LOST
