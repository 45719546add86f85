"""A study as an array of jobs of a real Slurm."""

import sys
from pathlib import Path

import pytest
from slurm_daemons import Slurm
from slurm_jobs import ROOT, needs_slurm
from tiny_study import TWO_RUNS, arguments, tiny

from sleeptrain.study import trial
from sleeptrain.study.run import trials_folder

pytestmark = [pytest.mark.more, needs_slurm]


def test_the_tasks_of_an_array_share_the_runs(tmp_path: Path) -> None:
    """Each makes the next run that nobody has begun."""
    folder, script = tmp_path / "study", str(ROOT / "launchers" / "study.sbatch")
    sizes = (
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        "--time=10",
        "--array=1-2",
        f"--output={tmp_path}/%a.log",
    )
    environment = f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1"
    with Slurm() as slurm:
        job = slurm.submit(ROOT, *sizes, environment, script, *arguments(folder, *TWO_RUNS, "study.slots=1"))
        for task in (1, 2):
            ended = slurm.wait_for(f"{job}_{task}", ("COMPLETED", "FAILED"))
            assert ended == "COMPLETED", (tmp_path / f"{task}.log").read_text()
    made = sorted(trials_folder(tiny(folder)).iterdir())
    assert len(made) == 2
    for run in made:
        assert (run / trial.RESULT).exists()
        said = (run / "logs" / "rank_0.log").read_text()
        assert said.count(f"run {run.name}: step 0 of 12") == 1
