"""kill -9 at random moments, inside saves too: the resumed run ends bit-equal to the uninterrupted one."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from e2e_runs import command, compare_runs, environment

pytestmark = pytest.mark.more
SETTINGS = ["optim.num_steps=60", "checkpoint.every_steps=2", "eval.every_steps=20"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    subprocess.run(command(folder, *SETTINGS), env=environment(), check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("seed", range(10))
def test_killed_runs_end_like_the_uninterrupted_one(seed: int, reference: Path, tmp_path: Path) -> None:
    moments, folder = random.Random(seed), tmp_path / "run"
    process = subprocess.Popen(command(folder, *SETTINGS), env=environment(), stdout=subprocess.DEVNULL)
    if seed % 2:  # in the middle of a save: its temporary folder is there
        _wait_for_save(folder, after_step=2 * moments.randint(0, 15))
    else:
        _wait_for_step(folder, moments.randint(0, 40))
        time.sleep(moments.uniform(0, 0.05))
    process.kill()
    assert process.wait() == -9  # it was killed on its way, not at its end
    subprocess.run(command(folder, *SETTINGS), env=environment(), check=True, capture_output=True)
    assert compare_runs(folder, reference) == ""


def _wait_for_step(folder: Path, step: int) -> None:
    """Returns when the row of some step from ``step`` on is in the metrics."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists():
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            if step == 0 or any(json.loads(x)["step"] >= step for x in lines if x.endswith("\n")):
                return
    raise AssertionError(f"step {step} was not seen in 60 s")


def _wait_for_save(folder: Path, after_step: int) -> None:
    """Returns at the moment in which some checkpoint after ``after_step`` is being written."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in (folder / "checkpoints").glob(".tmp_step_*"):
            if int(path.name.split("_")[2]) > after_step:
                return
    raise AssertionError("no save was seen in 60 s")
