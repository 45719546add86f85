"""R1, R15: two ranks over shards, killed at any moment or resumed by another number of them, read the same
samples in the same order."""

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import pytest
import ranks  # noqa: F401  (imports what the ranks need, once)
import torch
import torch.distributed as dist
from e2e_runs import TINY
from fault_runs import before_step
from shard_sets import examples_set

from sleeptrain.config import Rule110Config
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.engine.trainer import Trainer
from sleeptrain.model.sleep import Walk
from sleeptrain.pretrain import main
from sleeptrain.tasks import make_task

pytestmark = pytest.mark.more
NUM_STEPS, PATIENCE_SECONDS = 18, 120
SETTINGS = [*TINY, "checkpoint.every_steps=4", "eval.every_steps=0", "log.every_steps=1", "run.num_threads=1"]
SETTINGS += ["model.pattern=attn gdn", "eval.num_passes=[]"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources, of 5 and 3 shards."""
    folder = tmp_path_factory.mktemp("sets")
    for name, steps, num_shards in (("a", 1, 5), ("b", 2, 3)):
        task = make_task(Rule110Config(width=6, num_strings=2, steps=steps))
        examples_set(folder / name, task, num_shards, 9, seed=steps)
    return f"data.shards=[{folder}/a,{folder}/b]"


@pytest.fixture(scope="module")
def reference(sets: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train(folder, 2, sets) == [0, 0]
    return folder


def train(
    folder: Path, num_ranks: int, *settings: str, sabotage: Callable[[int], None] | None = None
) -> list[int]:
    """Exit codes of the ranks. When one is killed, its launcher kills the others."""
    meet = folder.parent / f"meet_{time.monotonic_ns()}"
    running = {_fork(rank, num_ranks, meet, folder, settings, sabotage): rank for rank in range(num_ranks)}
    codes, deadline = [0] * num_ranks, time.monotonic() + PATIENCE_SECONDS
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] < 0:
                deadline = 0
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)
    return codes


def _fork(rank, num_ranks, meet, folder, settings, sabotage) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 98
    try:
        output = (folder.parent / f"out_{rank}").open("a", buffering=1)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = output, output
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=num_ranks)
        if sabotage:
            sabotage(rank)
        degrees = "parallel=single" if num_ranks == 1 else f"parallel.data_size={num_ranks}"
        code = main([f"run.dir={folder}", *SETTINGS, f"optim.num_steps={NUM_STEPS}", degrees, *settings])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed(seed: int) -> Callable[[int], None]:
    """One of the ranks dies at a random moment: amid a step, between two windows of one, or in a save."""
    draw = random.Random(seed)
    step, victim, delay = draw.randrange(5, NUM_STEPS - 2), draw.randrange(2), draw.uniform(0, 0.05)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sabotage(rank: int) -> None:
        if rank != victim:
            return
        if seed % 3 == 1:
            opened, armed = Walk._open, []

            def open_window(walk: Walk, window: int) -> None:
                if armed and window == 1:
                    die()
                opened(walk, window)

            before_step(step, lambda: armed.append(True))
            Walk._open = open_window  # type: ignore[method-assign]
        else:  # a save has just begun where the step is a multiple of 4
            due = step // 4 * 4 if seed % 3 == 2 else step
            before_step(due, lambda: threading.Timer(delay / 5 if due % 4 == 0 else delay, die).start())

    return sabotage


def rows_of(folder: Path) -> list[tuple[int, float, int]]:
    """Step, loss and the checksum of the samples so far."""
    rows = [row for row in read_metrics(folder) if "train/loss" in row]
    return [(row["step"], row["train/loss"], row["train/sample_order"]) for row in rows]


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 100))]
)
def test_killed_ranks_read_and_learn_as_if_nothing_had_happened(
    seed: int, sets: str, reference: Path, tmp_path: Path
) -> None:
    """R1: sample order and losses of every step are bit-equal."""
    codes = train(tmp_path / "run", 2, sets, sabotage=killed(seed))
    assert -signal.SIGKILL in codes
    assert train(tmp_path / "run", 2, sets) == [0, 0]
    assert rows_of(tmp_path / "run") == rows_of(reference)
    assert len(rows_of(reference)) == NUM_STEPS


def stopping(step: int) -> Callable[[int], None]:
    def sabotage(rank: int) -> None:
        before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))

    return sabotage


def test_two_replicas_then_one_then_two_read_the_same(sets: str, reference: Path, tmp_path: Path) -> None:
    """R15: the same samples in the same order, and losses equal but for the order of sums."""
    folder = tmp_path / "run"
    assert train(folder, 2, sets, sabotage=stopping(7)) == [75, 75]
    assert train(folder, 1, sets, sabotage=stopping(15)) == [75]
    assert train(folder, 2, sets) == [0, 0]
    found, expected = rows_of(folder), rows_of(reference)
    assert [(step, order) for step, _, order in found] == [(step, order) for step, _, order in expected]
    assert max(abs(a[1] - b[1]) for a, b in zip(found, expected)) < 1e-6
    assert found[:8] == expected[:8]  # at equal size, equal to the last bit


def test_the_order_is_noticed_when_it_changes(sets: str, reference: Path, tmp_path: Path) -> None:
    """Negative control: a resumed run that forgets where its streams stood."""

    def forget(rank: int) -> None:
        load = Trainer._resume

        def resume(trainer: Trainer) -> None:
            load(trainer)
            stream = trainer.stream
            stream._states = [[0] * len(state) for state in stream._states]
            stream._start(trainer.step)

        Trainer._resume = resume  # type: ignore[method-assign]

    folder = tmp_path / "run"
    assert train(folder, 2, sets, sabotage=stopping(7)) == [75, 75]
    assert train(folder, 2, sets, sabotage=forget) == [0, 0]
    found, expected = rows_of(folder), rows_of(reference)
    assert found[:8] == expected[:8]
    assert all(a[1:] != b[1:] for a, b in zip(found[8:], expected[8:]))


def test_another_n_is_refused_or_told(sets: str, tmp_path: Path) -> None:
    """R15: N shapes the result; changed on purpose, the log says so."""
    folder = tmp_path / "run"
    assert train(folder, 1, sets, sabotage=stopping(7)) == [75]
    other = "sleep.num_passes=3"
    assert train(folder, 1, sets, other) == [2]
    assert "sleep.num_passes: saved 2, now 3" in (tmp_path / "out_0").read_text()
    assert train(folder, 1, sets, other, "run.allow_config_change=true") == [0]
    assert (
        "going on with other settings, sleep.num_passes: saved 2, now 3" in (tmp_path / "out_0").read_text()
    )
    assert read_metrics(folder)[-2]["train/num_passes"] == 3
