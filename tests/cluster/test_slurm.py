"""launchers/slurm.sbatch on real daemons: two nodes of two tasks; stopped, requeued, and a node that goes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_daemons
from e2e_runs import TINY, compare_runs
from slurm_daemons import Slurm

from sleeptrain.engine.metrics import FILE_NAME

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30")
RUN = (*TINY, "experiment=quickstart", "run.device=cpu", "run.num_threads=1", "optim.num_steps=45")

NUM_ROWS = 10  # after 30 steps, sums in another order have grown to more than rounding

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(
        bool(slurm_daemons.missing()), reason=f"not installed: {', '.join(slurm_daemons.missing())}"
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


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


def test_a_signal_saves_and_requeues_and_the_end_is_bit_equal(
    slurm: Slurm, undisturbed: Path, tmp_path: Path
) -> None:
    """As at the time limit: USR1 to the tasks."""
    folder = tmp_path / "run"
    job = submit(slurm, folder)
    wait_for_step(slurm, job, folder, 12)
    slurm.call("scancel", "--signal=USR1", job)
    slurm.wait_for(job, ("PENDING",))
    require_end(slurm, job, folder)
    assert slurm.field(job, "Restarts") == "1"
    assert "stopped and saved; requeued" in Path(f"{folder}.log").read_text()
    assert compare_runs(folder, undisturbed) == ""


def test_a_node_that_goes_down_and_comes_back(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, folder)
    wait_for_step(slurm, job, folder, 12)
    slurm.call("scontrol", "update", "NodeName=fake2", "State=DOWN", "Reason=test")
    slurm.wait_for(job, ("PENDING",))
    slurm.bring_back("fake2")
    require_end(slurm, job, folder)
    assert slurm.field(job, "Restarts") == "1"
    assert compare_runs(folder, undisturbed) == ""


def test_a_killed_task_is_started_again(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, folder)
    wait_for_step(slurm, job, folder, 12)
    slurm.call("scancel", "--signal=KILL", f"{job}.0")
    slurm.wait_for(job, ("PENDING",))
    require_end(slurm, job, folder)
    assert "requeued from the last checkpoint" in Path(f"{folder}.log").read_text()
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


@pytest.mark.parametrize("start", ["symmetric", "plain"])
def test_ray_over_the_nodes_of_a_job(slurm: Slurm, tmp_path: Path, start: str) -> None:
    """On one node: two of this machine would have one address."""
    folder, script = tmp_path / "run", str(ROOT / "launchers" / "slurm_ray.sbatch")
    sizes = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0", "--time=30")
    environment = f"--export=ALL,PYTHON={sys.executable},OMP_NUM_THREADS=1,RAY_START={start}"
    few = ("optim.num_steps=9", "cluster.num_workers=2")
    job = slurm.submit(
        ROOT, *sizes, f"--output={folder}.log", environment, script, f"run.dir={folder}", *RUN, *few
    )
    require_end(slurm, job, folder)
    assert step_of(folder) == 9
    assert sorted(p.name for p in (folder / "logs").glob("*.log")) == ["rank_0.log", "rank_1.log"]


def test_without_srun_it_says_what_to_use(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sleeptrain.pretrain", f"run.dir={tmp_path}", "cluster=slurm", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "use sbatch launchers/slurm.sbatch" in done.stderr
