"""R4: one of two workers is killed, and torchrun starts both anew by itself: the run ends like one that
nobody disturbed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from e2e_runs import compare_runs, environment
from fault_runs import SETTINGS, cpu_seconds
from ranks import run_ranks

from sleeptrain.pretrain import main

pytestmark = pytest.mark.more
PATIENCE_SECONDS = 240
RESTART_SECONDS = 15
RUN = [*SETTINGS, "parallel=dp2", "log.every_steps=1", "eval.every_steps=0"]


class Launched:
    """A run of two workers under torchrun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2"
        command = [sys.executable, *launcher.split(), "-m", "sleeptrain.pretrain", f"run.dir={folder}", *RUN]
        self.output = folder.with_name("out").open("w")
        self.process = subprocess.Popen(
            command, env=environment(), stdout=self.output, stderr=subprocess.STDOUT
        )
        self.deadline = time.monotonic() + PATIENCE_SECONDS

    def worker(self, rank: int) -> int | None:
        """The process of a rank, if it is there."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (path / "environ").read_bytes().split(b"\0")
                if parent == self.process.pid and f"RANK={rank}".encode() in variables:
                    return int(path.name)
        return None

    def starts(self) -> list[list[int]]:
        """For each time that the workers began, the steps that were told since."""
        path = self.folder / "logs" / "rank_0.log"
        text = path.read_text() if path.exists() else ""
        lives = re.split(r"^run quickstart: step \d+ of .*$", text, flags=re.MULTILINE)[1:]
        return [[int(step) for step in re.findall(r"^step (\d+)/", life, re.MULTILINE)] for life in lives]

    def await_step(self, num_starts: int, step: int) -> None:
        """Until the workers began so many times and reached the step."""
        while not (len(starts := self.starts()) == num_starts and max(starts[-1], default=-1) >= step):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < self.deadline, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return Path(self.output.name).read_text()[-4000:]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # torchrun ends its workers
        self.process.wait()
        self.output.close()


def test_the_group_starts_by_itself_and_ends_bit_equal(tmp_path: Path) -> None:
    """R4: first rank 1 is killed, then rank 0, which writes for both."""
    reference, folder = tmp_path / "reference", tmp_path / "run"
    assert run_ranks(2, partial(main, [f"run.dir={reference}", *RUN])) == [0, 0]
    run = Launched(folder)
    try:
        for num_starts, rank, step in ((1, 1, 8), (2, 0, 19)):
            run.await_step(num_starts, step)
            reached, victim = run.starts()[-1][-1], run.worker(rank)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            while (new := run.worker(rank)) in (None, victim):
                time.sleep(0.02)
            assert time.monotonic() - killed < RESTART_SECONDS
            run.await_step(num_starts + 1, 0)
            assert cpu_seconds(new) < RESTART_SECONDS
            first = run.starts()[-1][0]
            assert first <= reached + 2  # it went on, not over it
            assert reached - first < 10
        assert run.process.wait(PATIENCE_SECONDS) == 0, run.said()
    finally:
        run.end()
    assert compare_runs(folder, reference) == ""
