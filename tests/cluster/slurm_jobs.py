"""Runs as jobs of Slurm, for its tests."""

import json
import sys
import time
from pathlib import Path

import pytest
import slurm_daemons
from e2e_runs import TINY
from slurm_daemons import Slurm

from sleeptrain.engine.metrics import FILE_NAME

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30")
FEW = ("model.pattern=attn gdn", "optim.num_steps=60", "eval.every_steps=20")  # for four on two cores
RUN = (*TINY, "experiment=quickstart", "run.device=cpu", "run.num_threads=1", *FEW)

needs_slurm = pytest.mark.skipif(
    bool(slurm_daemons.missing()), reason=f"not installed: {', '.join(slurm_daemons.missing())}"
)


def submit(slurm: Slurm, folder: Path, *settings: str) -> str:
    output = f"--output={folder}.log"
    environment = f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1"
    script = str(ROOT / "launchers" / "slurm.sbatch")
    return slurm.submit(ROOT, *SIZES, output, environment, script, f"run.dir={folder}", *RUN, *settings)


def step_of(folder: Path) -> int:
    path = folder / FILE_NAME
    rows = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(row).get("step", 0) for row in rows), default=0)


def wait_for_step(slurm: Slurm, job: str, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while step_of(folder) < step:
        assert time.monotonic() < deadline, Path(f"{folder}.log").read_text()
        assert slurm.field(job, "JobState") in ("PENDING", "CONFIGURING", "RUNNING")
        time.sleep(0.1)


def require_end(slurm: Slurm, job: str, folder: Path) -> None:
    log = Path(f"{folder}.log")
    assert slurm.wait_for(job, ("COMPLETED", "FAILED")) == "COMPLETED", log.read_text()
