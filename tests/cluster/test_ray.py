"""Jobs of a real Ray cluster: whole runs, killed workers and drivers, stops, refusals."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from e2e_runs import TINY, compare_runs
from ray_daemons import ROOT, Ray
from ray_jobs import NUM_STEPS, PATIENCE_SECONDS, RUN, await_step, finish, submit

TRAINS = "sleeptrain.cluster.training_process"
LOG = "logs/rank_0.log"

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with Ray() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, by torchrun."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    command = [sys.executable, "-m", "sleeptrain.pretrain", "cluster=local_procs", "cluster.num_workers=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, f"run.dir={folder}", *RUN], check=True, capture_output=True, cwd=ROOT, env=environment
    )
    return folder


def test_a_job_ends_as_the_local_run_does(ray: Ray, undisturbed: Path, tmp_path: Path) -> None:
    """And nothing disturbs it: while it runs, a second driver of its folder is refused."""
    folder = tmp_path / "run"
    job = submit(ray, folder, name="whole")
    await_step(folder, 3, job)
    refused = second_driver(ray, folder)
    assert f"refused: run folder {folder} is in use by another job" in refused.stdout, refused.stderr
    output = finish(job)
    assert compare_runs(folder, undisturbed) == ""
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in output
    (listed,) = [job["metadata"] for job in ray.ask("") if job["submission_id"] == "whole"]
    assert listed["sleeptrain/step"] == str(NUM_STEPS)
    assert listed["sleeptrain/processes"] == "2"


def second_driver(ray: Ray, folder: Path) -> subprocess.CompletedProcess[str]:
    """What claims the folder as a driver does, and does not wait long for another to let go."""
    control = (
        "import sys; from pathlib import Path; from sleeptrain.cluster import ray_driver as d\n"
        "d.PREVIOUS_SECONDS = 1.0; d.ray.init(namespace=d.NAMESPACE, log_to_driver=False)\n"
        "try: d.claim(Path(sys.argv[1]))\nexcept d.ConfigError as error: print('refused:', error)"
    )
    return subprocess.run(
        [sys.executable, "-c", control, str(folder)],
        env=ray.environ | {"RAY_ADDRESS": f"127.0.0.1:{ray.port}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_workers_that_die_or_hang_are_started_again(ray: Ray, undisturbed: Path, tmp_path: Path) -> None:
    """R5, R6, one after the other: the process that trains is killed, then the worker of Ray above it, with
    which it goes; then one hangs: the watchdog of the others says so, and the worker ends the one that
    cannot."""
    folder = tmp_path / "run"
    job = submit(ray, folder, "run.hang_timeout_seconds=10")
    await_step(folder, 10, job)
    os.kill(ray.processes(TRAINS)[-1], signal.SIGKILL)
    await_step(folder, 20, job)
    os.kill(psutil.Process(ray.processes(TRAINS)[-1]).ppid(), signal.SIGKILL)
    await_step(folder, 30, job)
    os.kill(ray.processes(TRAINS)[-1], signal.SIGSTOP)
    assert finish(job).count(f" of {NUM_STEPS} in ") == 4  # it started, and three times again
    said = "".join(path.read_text() for path in (folder / "logs").glob("rank_*.log"))
    assert re.search(r"error: rank \d hangs: ", said)
    assert compare_runs(folder, undisturbed) == ""
    assert not ray.processes(TRAINS)


def test_a_stopped_job_and_one_whose_driver_was_killed_go_on(
    ray: Ray, undisturbed: Path, tmp_path: Path
) -> None:
    """Stopped, it has saved; killed, the driver takes its run along, and the next one waits for that."""
    folder, never = tmp_path / "run", "checkpoint.every_steps=0"
    job = submit(ray, folder, never, name="stopped")
    await_step(folder, 15, job)
    ray.ask("stopped/stop", method="POST")  # as ray job stop
    output, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert "was stopped" in output
    assert "stopped and saved; the same command goes on from there" in output
    assert re.search(r"stopped by .*; the same command goes on from step", (folder / LOG).read_text())
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    stopped = int(checkpoint.name.removeprefix("step_"))
    assert stopped >= 15
    job = submit(ray, folder)
    await_step(folder, stopped + 10, job)
    for pid in ray.drivers():
        os.kill(pid, signal.SIGKILL)
    output = finish(submit(ray, folder))
    assert compare_runs(folder, undisturbed) == ""
    assert re.search("run quickstart: step [1-9]", output)
    job.communicate(timeout=PATIENCE_SECONDS)


def test_a_failure_that_comes_again_at_the_same_step_ends_the_run(ray: Ray, tmp_path: Path) -> None:
    """A damaged shard, which the order of the data comes to at the same step each time."""
    shards = tmp_path / "shards"
    sizes = (f"--num-examples={8 * NUM_STEPS}", "--shard-samples=40")
    make = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(shards), *sizes]
    subprocess.run([*make, *TINY], check=True, capture_output=True, cwd=ROOT, env=ray.environ)
    for path in sorted(shards.glob("*.tar"))[::5]:
        path.write_bytes(path.read_bytes()[:-1000] + b"x" * 1000)
    job = submit(ray, tmp_path / "run", f"data.shards=[{shards}]", "checkpoint.every_steps=0")
    output, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode != 0
    assert "error: it failed twice at the same place, after step " in output
    assert output.count(f"run quickstart: step 0 of {NUM_STEPS}") == 2


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_without_the_token_the_jobs_are_out_of_reach(ray: Ray, method: str) -> None:
    """R21."""
    path = "" if method != "DELETE" else "whole"
    request = urllib.request.Request(f"{ray.dashboard}/api/jobs/{path}", method=method, data=b"{}")
    for header in ({}, {"Authorization": "Bearer " + "0" * 64}):
        for name, value in header.items():
            request.add_header(name, value)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code in (401, 403)


def test_nothing_of_a_local_cluster_listens_beyond_loopback(ray: Ray) -> None:
    """R21."""
    pids, found = set(ray.processes()), []
    for connection in psutil.net_connections("inet"):
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN:
            found.append(connection.laddr.ip.removeprefix("::ffff:"))
    assert len(found) > 5
    assert set(found) == {"127.0.0.1"}


REFUSED = {
    "run.dir=runs/here would lie in the working folder of a job": ("run.dir=runs/here",),
    "data.shards=set would lie in the working folder of a job": ("data.producer=ray", "data.shards=[set]"),
    "cluster.num_workers=5 needs 5 CPUs, and the Ray cluster has 2": (
        *("cluster.num_workers=5", "cluster.resources_wait_seconds=0"),
    ),
}


@pytest.fixture(scope="module")
def refused(ray: Ray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.Popen[str]]:
    """By sentence: the jobs, all at once."""
    folder = tmp_path_factory.mktemp("refused")
    return {
        sentence: ray.submit(f"run.dir={folder}/run{number}", *RUN, *settings)
        for number, (sentence, settings) in enumerate(REFUSED.items())
    }


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_a_driver_refuses(refused: dict[str, subprocess.Popen[str]], sentence: str) -> None:
    job = refused[sentence]
    output, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode != 0
    assert f"error: {sentence}" in output


def test_without_a_cluster_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sleeptrain.pretrain", "cluster=ray", f"run.dir={tmp_path}/run", *RUN]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: cluster=ray finds no Ray cluster")
