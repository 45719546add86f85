"""launchers/slurm.sbatch on real daemons: two nodes of two tasks; stopped, requeued, and a node that goes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_runs import TINY, compare_runs
from slurm_daemons import Slurm
from slurm_jobs import ROOT, RUN, SIZES, needs_slurm, require_end, step_of, submit, wait_for_step

from sleeptrain.engine.metrics import FILE_NAME

NUM_ROWS = 10  # after 30 steps, sums in another order have grown to more than rounding

pytestmark = [pytest.mark.more, needs_slurm]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    require_end(slurm, submit(slurm, folder), folder)
    return folder


def test_two_nodes_of_two_tasks_make_the_run_of_one_process(undisturbed: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in (undisturbed / "logs").glob("*.log")) == [f"rank_{r}.log" for r in range(4)]
    command = [sys.executable, "-m", "sleeptrain.pretrain", f"run.dir={tmp_path / 'one'}", *RUN]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    losses = []
    for folder in (undisturbed, tmp_path / "one"):
        rows = map(json.loads, (folder / FILE_NAME).read_text().splitlines())
        losses.append([row["train/loss"] for row in rows if "train/loss" in row][:NUM_ROWS])
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)


def test_stopped_killed_and_with_a_node_gone_it_is_requeued_and_the_end_is_bit_equal(
    slurm: Slurm, undisturbed: Path, tmp_path: Path
) -> None:
    """One job, three times amid training: USR1 to the tasks, as at the time limit; the tasks killed; a node
    goes down, and comes back."""
    folder = tmp_path / "run"
    job = submit(slurm, folder)

    def await_requeue(restarts: int) -> None:
        slurm.wait_for(job, ("PENDING",))
        assert slurm.field(job, "Restarts") == str(restarts)

    wait_for_step(slurm, job, folder, 9)
    slurm.call("scancel", "--signal=USR1", job)
    await_requeue(1)
    assert "stopped and saved; requeued" in Path(f"{folder}.log").read_text()
    slurm.wait_for(job, ("RUNNING",))
    wait_for_step(slurm, job, folder, step_of(folder) + 9)
    slurm.call("scancel", "--signal=KILL", f"{job}.0")
    await_requeue(2)
    assert "requeued from the last checkpoint" in Path(f"{folder}.log").read_text()
    slurm.wait_for(job, ("RUNNING",))
    wait_for_step(slurm, job, folder, step_of(folder) + 9)
    slurm.call("scontrol", "update", "NodeName=fake2", "State=DOWN", "Reason=test")
    await_requeue(3)
    slurm.bring_back("fake2")
    require_end(slurm, job, folder)
    assert compare_runs(folder, undisturbed) == ""


def test_a_wrong_setting_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, folder, "parallel.tensor_size=3")
    assert slurm.wait_for(job, ("COMPLETED", "FAILED")) == "FAILED"
    assert slurm.field(job, "ExitCode") == "2:0"
    assert "error: parallel.tensor_size=3" in Path(f"{folder}.log").read_text()
    assert slurm.field(job, "Restarts") == "0"


def test_an_array_takes_its_settings_from_the_lines_of_a_file(slurm: Slurm, tmp_path: Path) -> None:
    runs = tmp_path / "runs.txt"
    few = "optim.num_steps=3 parallel=dp2"
    runs.write_text("".join(f"run.dir={tmp_path}/n{n} sleep.num_passes={n} {few}\n" for n in (1, 2)))
    script = str(ROOT / "launchers" / "slurm.sbatch")
    sizes = ("--nodes=1", *SIZES[1:], "--array=1-2", f"--output={tmp_path}/%a.log")
    environment = f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1"
    job = slurm.submit(ROOT, *sizes, environment, script, f"--runs={runs}", *RUN)
    for n in (1, 2):
        assert slurm.wait_for(f"{job}_{n}", ("COMPLETED", "FAILED")) == "COMPLETED"
        assert f"num_passes: {n}\n" in (tmp_path / f"n{n}" / "config.yaml").read_text()


def test_without_srun_it_says_what_to_use(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sleeptrain.pretrain", f"run.dir={tmp_path}", "cluster=slurm", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "use sbatch launchers/slurm.sbatch" in done.stderr
