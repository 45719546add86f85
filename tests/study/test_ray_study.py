"""Runs of a study as tasks of a real Ray cluster."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_daemons import Ray
from tiny_study import TWO_RUNS, arguments, tiny

from sleeptrain.study import trial
from sleeptrain.study.plan import plan
from sleeptrain.study.run import run, trials_folder

pytestmark = pytest.mark.more


def files(folder: Path) -> dict[str, bytes]:
    """What the scores of all runs are."""
    paths = trials_folder(tiny(folder)).glob(f"*/{trial.SCORES}")
    return {path.parent.name: path.read_bytes() for path in paths}


def test_a_study_on_ray_is_that_of_this_process(tmp_path: Path) -> None:
    """Also where a task is killed: Ray starts it again, and the run goes on."""
    there, here = tmp_path / "there", tmp_path / "here"
    with Ray() as ray:
        command = [sys.executable, "-m", "sleeptrain.study", *arguments(there, *TWO_RUNS, "study.where=ray")]
        environment = ray.environ | {"RAY_ADDRESS": f"127.0.0.1:{ray.port}"}
        study = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while not ray.processes("sleeptrain.study.trial"):
            assert study.poll() is None, study.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for pid in ray.processes("ray::run_program")[:1]:
            os.kill(pid, 9)
        output, _ = study.communicate(timeout=240)
        assert study.returncode == 0, output
    assert (there / "report" / "index.html").exists()
    asked = tiny(here, *TWO_RUNS, "study.where=process")
    run(asked, plan(asked, lambda config: 1.0).trials)
    assert len(files(here)) == 2
    assert files(there) == files(here)
