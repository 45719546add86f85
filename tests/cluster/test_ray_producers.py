"""Shards made by tasks of a real Ray cluster while training reads them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from e2e_runs import TINY, compare_runs
from ray_daemons import ROOT, Ray, wait_for
from ray_jobs import NUM_STEPS, PATIENCE_SECONDS, RUN, finish, steps, submit

BATCH, STREAMS, SHARD_SAMPLES, AHEAD = 8, 2, 20, 3
SIZES = (f"data.batch_sequences={BATCH}", f"data.num_streams={STREAMS}")
PRODUCED = ("data.producer=ray", f"data.shard_samples={SHARD_SAMPLES}", f"data.shards_ahead={AHEAD}")
NUM_EXAMPLES = NUM_STEPS * BATCH

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with Ray() as running:
        yield running


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that make_shards.py makes."""
    folder = tmp_path_factory.mktemp("sets") / "made_before"
    sizes = (f"--num-examples={NUM_EXAMPLES}", f"--shard-samples={SHARD_SAMPLES}")
    subprocess.run([sys.executable, ROOT / "tools" / "make_shards.py", folder, *sizes, *TINY], check=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that reads it, by torchrun."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    settings = (
        "cluster=local_procs",
        "cluster.num_workers=2",
        f"run.dir={folder}",
        f"data.shards=[{shards}]",
    )
    command = [sys.executable, "-m", "sleeptrain.pretrain", *RUN, *SIZES, *settings]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def producers(ray: Ray) -> list[int]:
    return ray.processes("ray::make_shard")


def kill_one(ray: Ray) -> int:
    """Of the producers, as soon as there is one."""
    wait_for(lambda: producers(ray), PATIENCE_SECONDS)
    for pid in producers(ray):
        os.kill(pid, signal.SIGKILL)
        return pid
    return kill_one(ray)


def require_not_too_many(made: Path, folder: Path, reached: int = 0) -> None:
    """Shards, for the steps that are done, or were ``reached`` before the driver was killed."""
    num_made = len(list(made.glob("*.tar")))
    num_steps = max([reached, *steps(folder)]) + 3  # looked at later, so it is no less; each third is logged
    turn = num_steps * BATCH // STREAMS // SHARD_SAMPLES
    assert num_made <= (turn + 1) * STREAMS + AHEAD


def test_killed_producers_and_a_killed_driver_cost_nothing(
    ray: Ray, shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """No shard is lost, doubled, different, made too soon or made again."""
    folder, made = tmp_path / "run", tmp_path / "set"
    settings = (*SIZES, *PRODUCED, f"data.shards=[{made}]")
    job = submit(ray, folder, *settings)
    killed = [kill_one(ray)]
    wait_for(lambda: not psutil.pid_exists(killed[0]), PATIENCE_SECONDS)
    killed.append(kill_one(ray))
    assert killed[0] != killed[1]
    while max(steps(folder), default=0) < 15:
        assert job.poll() is None, job.communicate()[0]
        require_not_too_many(made, folder)
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in made.glob("*.tar")}
    for pid in ray.drivers():
        os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=PATIENCE_SECONDS)
    reached = max(steps(folder))  # the next driver takes back what came after its checkpoint
    again = submit(ray, folder, *settings)
    while again.poll() is None:
        require_not_too_many(made, folder, reached)
        time.sleep(0.1)
    finish(again)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert content(made) == content(shards)
    assert compare_runs(folder, undisturbed) == ""
