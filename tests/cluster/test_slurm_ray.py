"""launchers/slurm_ray.sbatch on real daemons: Ray over the nodes of a job of Slurm."""

import sys
from pathlib import Path

import pytest
from ray_daemons import take_turn
from slurm_daemons import Slurm
from slurm_jobs import ROOT, RUN, needs_slurm, require_end, step_of

pytestmark = [pytest.mark.more, needs_slurm]


@pytest.mark.parametrize("start", ["symmetric", "plain"])
def test_ray_over_the_nodes_of_a_job(tmp_path: Path, start: str) -> None:
    """On one node: two of this machine would have one address."""
    folder, script = tmp_path / "run", str(ROOT / "launchers" / "slurm_ray.sbatch")
    sizes = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0", "--time=30")
    environment = f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1,RAY_START={start}"
    few = ("optim.num_steps=9", "cluster.num_workers=2")
    with take_turn(alone=start == "symmetric"), Slurm() as slurm:
        job = slurm.submit(
            ROOT, *sizes, f"--output={folder}.log", environment, script, f"run.dir={folder}", *RUN, *few
        )
        require_end(slurm, job, folder)
    assert step_of(folder) == 9
    assert sorted(p.name for p in (folder / "logs").glob("*.log")) == ["rank_0.log", "rank_1.log"]
