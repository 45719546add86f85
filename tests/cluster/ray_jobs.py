"""Runs as jobs of a Ray cluster, for its tests."""

import json
import subprocess
from pathlib import Path

from e2e_runs import TINY
from ray_daemons import Ray, wait_for

from sleeptrain.engine.metrics import FILE_NAME

NUM_STEPS = 45  # three times as many as where a test breaks in
STEPS = (f"optim.num_steps={NUM_STEPS}", "eval.every_steps=0")
RUN = (*TINY, "experiment=quickstart", "run.device=cpu", "run.num_threads=1", *STEPS)
PATIENCE_SECONDS = 300


def submit(ray: Ray, folder: Path, *settings: str, name: str = "") -> subprocess.Popen[str]:
    return ray.submit(f"run.dir={folder}", *RUN, "cluster.num_workers=2", *settings, name=name)


def finish(job: subprocess.Popen[str]) -> str:
    """What a job that ends well has said."""
    output, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 0, output
    assert "succeeded" in output
    return output


def steps(folder: Path) -> list[int]:
    path = folder / FILE_NAME
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [row["step"] for row in rows if "train/loss" in row]


def await_step(folder: Path, step: int, job: subprocess.Popen[str]) -> None:
    def has_come() -> bool:
        assert job.poll() is None, job.communicate()[0]
        return max(steps(folder), default=0) >= step

    wait_for(has_come, PATIENCE_SECONDS)
