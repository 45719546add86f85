"""The driver of a run on a Ray cluster: ``ray job submit -- python -m sleeptrain.pretrain cluster=ray ...``

It needs no GPU. It checks that the cluster is fit and safe, lets Ray Train start a worker per GPU (or CPU
core) and start them all again when one dies, and hands a stop on to them.
"""

import json
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sleeptrain.cluster.attempts import Attempts, Outcome
from sleeptrain.config import Config
from sleeptrain.engine.resilience import EXIT_REQUEUE, StopSignal
from sleeptrain.schema import ConfigError, RunError, to_dict

os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers stay in the folder of the job
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more, and nobody asks it

import ray
import ray.train
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # TorchTrainer would import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sleeptrain.cluster import ray_worker
from sleeptrain.cluster.ray_cluster import check_resources, connect
from sleeptrain.cluster.ray_job import JobMetadata
from sleeptrain.cluster.ray_producers import Producers
from sleeptrain.cluster.ray_rendezvous import Rendezvous

NAMESPACE = "sleeptrain"
POLL_SECONDS = 1.0
ELASTIC_START_SECONDS = 10  # for processes to find their places: Ray Train counts a node that has just gone
PREVIOUS_SECONDS = 60.0  # for what is left of a driver that was killed to end


class Trainer(DataParallelTrainer):
    """Without two actors of Ray's, which take time to start and to wait: one hands out data of Ray Data, for
    which no run asks; one frees the places of workers whose controller is dead, and then the driver ends,
    with which they are free."""

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unused)]


def drive(config: Config, frozen_config: str) -> int:
    """Returns the exit code of the run, as ``sleeptrain.pretrain`` does. Raises ConfigError where the cluster
    cannot or should not run it."""
    folder = check_folder(config)
    connect(config, NAMESPACE)
    use_gpu = check_resources(config)
    control = claim(folder)
    token = secrets.token_hex(8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ray_worker.SHARED_FILE).write_text(token)
    settings = {
        "run": json.dumps({"config": to_dict(config), "frozen": frozen_config}),
        "control": control_name(folder),
        "token": token,
    }
    producers = Producers(config) if config.data.producer == "ray" else None
    error = follow(make_trainer(config, folder, settings, use_gpu), control, producers)
    outcome: Outcome = ray.get(control.outcome.remote())
    if outcome.code == EXIT_REQUEUE:  # the last words of a worker may come too late for the log of the job
        print("stopped and saved; the same command goes on from there", flush=True)
    if outcome.code and outcome.sentence:
        print(f"error: {outcome.sentence}", file=sys.stderr)
    elif error and outcome.code:
        raise error
    return outcome.code


def follow(trainer: Trainer, control: Any, producers: Producers | None) -> BaseException | None:
    """Runs the training to its end, keeps the producers ahead of it and hands a signal to stop on to it; what
    Ray raised, if anything."""
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread, metadata = threading.Thread(target=fit, daemon=True), JobMetadata()
    with StopSignal() as stop:
        thread.start()
        while thread.is_alive():
            status = ray.get(control.status.remote())
            # Also amid a stop: a process that waits for a shard cannot leave.
            if not (producers and keep_ahead(producers, status, control)):
                thread.join(POLL_SECONDS)
            if stop.requested:
                control.request_stop.remote()
            else:
                metadata.show(status)
    return errors[0] if errors else None


def keep_ahead(producers: Producers, status: dict[str, Any], control: Any) -> bool:
    """Whether that took its time; a set that cannot be made ends the run. ``status`` gets where they are."""
    try:
        is_busy = producers.advance(status.get("step", 0), POLL_SECONDS)
    except RunError as error:
        control.break_off.remote(str(error))
        return False
    status["shards"] = producers.progress
    return is_busy


def check_folder(config: Config) -> Path:
    """The run folder; raises ConfigError where workers would look for it elsewhere."""
    folder = Path(config.run.dir)
    if not folder.is_absolute():
        raise ConfigError(
            f"run.dir={folder} would lie in the working folder of a job, which ends with it; give an "
            "absolute path on a file system that all nodes share"
        )
    return folder


def control_name(folder: Path) -> str:
    """Of the actor that stands for a run folder."""
    return f"run {folder}"


def claim(folder: Path) -> Any:
    """The actor that driver and workers talk through. It exists once per run folder: raises ConfigError where
    another driver has it, and waits for one that was killed."""
    actor: Any = ray.remote(num_cpus=0)(Attempts)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    deadline, is_told = time.monotonic() + PREVIOUS_SECONDS, False
    while True:
        try:
            control = actor.options(name=control_name(folder), scheduling_strategy=here).remote()
            ray.get(control.status.remote())
            return control
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"run folder {folder} is in use by another job of this cluster; wait for it, stop it "
                    "(ray job stop), or choose another run.id"
                ) from None
            if not is_told:
                print(f"waiting for another job on {folder}, which may be about to end", flush=True)
                is_told = True
            time.sleep(POLL_SECONDS)


def make_trainer(config: Config, folder: Path, settings: dict[str, str], use_gpu: bool) -> Trainer:
    """One worker per process of the run; all are started again when one fails."""
    cluster, most = config.cluster, config.cluster.workers(config.parallel)
    if cluster.min_workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_START_SECONDS))
    return Trainer(
        ray_worker.supervise,
        train_loop_config=settings,
        backend_config=Rendezvous(),
        scaling_config=ray.train.ScalingConfig(  # mypy knows that of Ray Train 1
            num_workers=(cluster.min_workers, most) if cluster.min_workers else most,  # type: ignore
            elastic_resize_monitor_interval_s=cluster.resize_check_seconds,
            use_gpu=use_gpu,
            placement_strategy="PACK",  # ranks count by node, and neighbours talk most
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(folder / "logs"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_restarts),
        ),
    )
