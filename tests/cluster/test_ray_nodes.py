"""Nodes of a Ray cluster that go and come: the run goes on with what is there."""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ray_daemons import Ray, wait_for
from ray_jobs import PATIENCE_SECONDS, RUN, finish, steps

from sleeptrain.data.stream import TrainStream
from sleeptrain.engine.metrics import FILE_NAME
from sleeptrain.pretrain import compose_config
from sleeptrain.tasks import make_task

ELASTIC = ("cluster.num_workers=2", "cluster.min_workers=1", "cluster.resize_check_seconds=5")
BOUND_SECONDS = 120

pytestmark = pytest.mark.more


@pytest.fixture
def ray() -> Iterator[Ray]:
    """A head with one core; the nodes are reached by the network of this machine, as those of others are."""
    with Ray(num_cpus=1, on_loopback=False) as running:
        yield running


def processes_of(ray: Ray) -> int:
    shown = [job["metadata"] or {} for job in ray.ask("")]
    return max((int(metadata.get("sleeptrain/processes", 0)) for metadata in shown), default=0)


def orders(folder: Path) -> dict[int, int]:
    """By step: which samples were read up to there."""
    rows = map(json.loads, (folder / FILE_NAME).read_text().splitlines())
    return {row["step"]: row["train/sample_order"] for row in rows if "train/sample_order" in row}


def orders_alone(settings: Sequence[str], num_steps: int) -> Iterator[tuple[int, int]]:
    """The same, as one process that is never disturbed reads them."""
    config = compose_config(list(settings))
    sizes = (config.data.batch_sequences, config.sleep.window_tokens)
    stream = TrainStream(make_task(config.task), config.run.seed, *sizes)
    for step in range(num_steps):
        stream.batch(step)
        yield step + 1, stream.state()["order"]


def test_two_nodes_then_one_then_two_read_the_same_samples(ray: Ray, tmp_path: Path) -> None:
    """R5: a raylet is killed; training goes on within two minutes on what is left, and grows again."""
    folder = tmp_path / "run"
    settings = (*RUN, "optim.num_steps=1000000", "log.every_steps=5", "checkpoint.every_steps=20")
    raylet = ray.add_node(1)
    job = ray.submit(f"run.dir={folder}", *settings, *ELASTIC)
    wait_for(lambda: processes_of(ray) == 2 and max(steps(folder), default=0) >= 30, PATIENCE_SECONDS)
    os.kill(raylet, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: processes_of(ray) == 1, PATIENCE_SECONDS)
    reached = max(steps(folder))
    wait_for(lambda: max(steps(folder)) > reached, PATIENCE_SECONDS)
    seconds = time.monotonic() - killed
    print(f"{seconds:.0f} s from the kill of the raylet to a new step on the node that is left")
    assert seconds < BOUND_SECONDS
    ray.add_node(1)
    wait_for(lambda: processes_of(ray) == 2, PATIENCE_SECONDS)
    reached = max(steps(folder))
    wait_for(lambda: max(steps(folder)) > reached, PATIENCE_SECONDS)
    for pid in ray.drivers():
        os.kill(pid, signal.SIGTERM)
    job.communicate(timeout=PATIENCE_SECONDS)
    found = orders(folder)
    assert found == {step: order for step, order in orders_alone(settings, max(found)) if step in found}


def test_a_cluster_that_strangers_could_use_is_refused_unless_allowed(tmp_path: Path) -> None:
    """R21: it listens on the network and asks for no token. If allowed, the run waits for a late node."""
    with Ray(num_cpus=1, authenticated=False, on_loopback=False) as ray:
        job = ray.submit(f"run.dir={tmp_path}/run", *RUN)
        output, _ = job.communicate(timeout=PATIENCE_SECONDS)
        assert job.returncode != 0
        assert "asks nobody for a token" in output
        allowed = ("cluster.allow_unauthenticated=true", "optim.num_steps=3", "cluster.num_workers=2")
        job = ray.submit(f"run.dir={tmp_path}/run", *RUN, *allowed)
        wait_for(ray.drivers, PATIENCE_SECONDS)
        time.sleep(5)
        ray.add_node(1)
        assert "waiting for 2 CPUs; the Ray cluster has 1" in finish(job)
