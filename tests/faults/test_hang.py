"""R6: a rank that hangs ends the run: named in one line, with the stacks of all on the disk, within the
timeout and 5 seconds. Negative control: without the watchdog the same run still hangs then."""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks  # noqa: F401  (imports what the ranks need, once)
import torch
from e2e_runs import TINY, environment
from fault_runs import before_step, train

from sleeptrain.checkpoint.saver import Saver
from sleeptrain.engine import trainer
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.pretrain import main

pytestmark = pytest.mark.more
BOUND_SECONDS, FOREVER_SECONDS, START_SECONDS = 5, 600, 60
HANG_STEP = 3
SETTINGS = [*TINY, "model.pattern=attn gdn", "eval.every_steps=0", "run.num_threads=1"]
DEGREES = {"tp": "tensor_size", "pp": "pipeline_size", "dp": "data_size"}

Hang = Callable[[], None]


def sleep() -> None:
    time.sleep(FOREVER_SECONDS)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def keep_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(FOREVER_SECONDS)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ends(
    folder: Path,
    parallel: str,
    victim: int,
    hang: Hang,
    timeout_seconds: int = 10,
    setting: int | None = None,
) -> list[int | None]:
    """Of the ranks of a run in which one hangs: the exit codes, None for what still runs when the timeout and
    the bound are over. ``parallel`` is as ``tp2_dp2``; ``setting`` the watchdog's, where it is another."""
    degrees = {part[:2]: int(part[2:]) for part in parallel.split("_")}
    seconds = timeout_seconds if setting is None else setting
    arguments = [f"run.dir={folder}/run", *SETTINGS, f"run.hang_timeout_seconds={seconds}"]
    arguments += [f"parallel.{DEGREES[name]}={size}" for name, size in degrees.items()]
    arguments += ["data.micro_batch_sequences=2"] * ("pp" in degrees)
    num_ranks, port = math.prod(degrees.values()), free_port()
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            environ = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in environ.items()}
            _run(arguments, (lambda: ((folder / "hangs").touch(), hang())) if rank == victim else None)
        children.append(child)
    found: dict[int, int] = {}
    try:
        deadline = await_hang(folder) + timeout_seconds + BOUND_SECONDS
        while len(found) < num_ranks and time.time() < deadline:
            for child in set(children) - found.keys():
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    found[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            time.sleep(0.02)
    finally:
        for child in set(children) - found.keys():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [found.get(child) for child in children]


def _run(arguments: list[str], hang: Hang | None) -> None:
    """In the child: never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        trainer.draw_learning_curve = lambda *arguments: []
        if hang:
            before_step(HANG_STEP, hang)
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def await_hang(folder: Path) -> float:
    deadline = time.time() + START_SECONDS
    while not (folder / "hangs").exists():
        assert time.time() < deadline, "the run came to no hang"
        time.sleep(0.02)
    return (folder / "hangs").stat().st_mtime


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def log_of(folder: Path, rank: int) -> str:
    return (folder / "run" / "logs" / f"rank_{rank}.log").read_text()


def errors_of(folder: Path, rank: int) -> list[str]:
    return [line for line in log_of(folder, rank).splitlines() if line.startswith("error: ")]


def stacks_of(folder: Path, rank: int) -> str:
    return (folder / "run" / "logs" / f"stacks_rank_{rank}.txt").read_text()


@pytest.mark.parametrize(
    ("parallel", "victim"),
    [
        ("dp2", 1),
        pytest.param("dp2", 0, marks=pytest.mark.more),
        ("pp2_dp2", 2),
        pytest.param("pp2_dp2", 0, marks=pytest.mark.slow),
        pytest.param("tp2_dp2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_enters_no_collective_is_named_with_its_place(
    tmp_path: Path, parallel: str, victim: int
) -> None:
    """R6: an endless sleep; rank 0 holds the store where the ranks met."""
    codes = ends(tmp_path, parallel, victim, sleep)
    assert set(codes) == {1}
    for rank in range(len(codes)):
        (error,) = errors_of(tmp_path, rank)
        assert error.startswith(f"error: rank {victim} hangs: no progress since ")
        assert f"after step {HANG_STEP}, in tests/faults/test_hang.py:" in error
        assert error.split(";")[0].endswith(" sleep")
        assert ("in sleep\n" in stacks_of(tmp_path, rank)) == (rank == victim)
        assert "in train\n" in stacks_of(tmp_path, rank)
        record = json.loads((tmp_path / "run/logs" / f"flight_recorder_rank_{rank}.json").read_text())
        assert any(entry["profiling_name"] == "gloo:all_reduce" for entry in record["fr"]["entries"])


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.more)])
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path, victim: int) -> None:
    """R6: SIGSTOP, also of the rank that holds the store."""
    codes = ends(tmp_path, "dp2", victim, stop)
    assert codes == [None if rank == victim else 1 for rank in range(2)]
    (error,) = errors_of(tmp_path, 1 - victim)
    assert error.startswith(f"error: rank {victim} hangs: ")
    assert ("gives no answer" if victim == 0 else "no sign of life since ") in error
    assert "in train\n" in stacks_of(tmp_path, 1 - victim)


def test_a_call_that_keeps_the_interpreter_is_ended_and_named(tmp_path: Path) -> None:
    """R6: no thread of Python runs in the victim; its stacks are there all the same."""
    assert ends(tmp_path, "dp2", 1, keep_the_interpreter) == [1, 1]
    (error,) = errors_of(tmp_path, 0)
    assert error.startswith("error: rank 1 hangs: no sign of life since ")
    assert "in keep_the_interpreter\n" in stacks_of(tmp_path, 1)
    assert "in train\n" in stacks_of(tmp_path, 0)


@pytest.mark.parametrize("hang", [sleep, keep_the_interpreter])
def test_a_single_process_ends_too(tmp_path: Path, hang: Hang) -> None:
    """R6: without a group; where no thread of Python runs, its stacks have to do."""
    assert ends(tmp_path, "dp1", 0, hang, timeout_seconds=6) == [1]
    assert f"in {hang.__name__}\n" in stacks_of(tmp_path, 0)
    if hang is sleep:
        (error,) = errors_of(tmp_path, 0)
        assert error.startswith("error: rank 0 hangs: no progress since ")


def test_without_the_watchdog_the_run_hangs_on(tmp_path: Path) -> None:
    """R6, the negative control."""
    assert ends(tmp_path, "dp2", 1, sleep, timeout_seconds=4, setting=0) == [None, None]
    assert not list((tmp_path / "run/logs").glob("stacks_*"))


def test_a_killed_rank_is_no_hang(tmp_path: Path) -> None:
    """R6: the other ends by the lost connection, at once."""
    assert ends(tmp_path, "dp2", 1, die, setting=600) == [1, -signal.SIGKILL]
    assert "hangs" not in log_of(tmp_path, 0)


def test_what_is_slow_within_the_timeout_goes_on(tmp_path: Path) -> None:
    """R6: a step, an evaluation and a save that each take most of the timeout, one after the other."""

    def slow(_: object) -> None:
        evaluate, save = trainer.evaluate, Saver.save
        trainer.evaluate = lambda *arguments: (time.sleep(5), evaluate(*arguments))[1]
        Saver.save = lambda *arguments: (time.sleep(5), save(*arguments))[1]  # type: ignore[method-assign]
        before_step(7, lambda: time.sleep(5))

    settings = ("model.pattern=attn gdn", "optim.num_steps=8", "checkpoint.every_steps=8")
    assert train(tmp_path / "run", *settings, "run.hang_timeout_seconds=9", sabotage=slow) == 0
    assert not list((tmp_path / "run/logs").glob("stacks_*"))


def test_torchrun_starts_the_group_again(tmp_path: Path) -> None:
    """R6: the first attempt hangs, the second goes on from the checkpoint to the end."""
    script = tmp_path / "hangs_once.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys, time
            import ranks  # imports what the ranks need
            from sleeptrain.engine import trainer
            from sleeptrain.pretrain import main

            train_step = trainer.Trainer.train_step

            def hang_once(self):
                if self.step == 8 and os.environ["RANK"] == "1":
                    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                        time.sleep(600)
                return train_step(self)

            trainer.Trainer.train_step = hang_once
            trainer.draw_learning_curve = lambda *arguments: []
            sys.exit(main(sys.argv[1:]))
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(script), f"run.dir={tmp_path}/run", *SETTINGS, "parallel.data_size=2"]
    command += ["run.hang_timeout_seconds=20", "optim.num_steps=12"]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env=environment() | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # The first that ends has said why; torchrun may end the other one before it has.
    assert any("error: rank 1 hangs: " in log_of(tmp_path, rank) for rank in range(2))
    stacks = [(tmp_path / "run" / "logs" / f"stacks_rank_{rank}.txt").read_text() for rank in range(2)]
    assert all(" in hang_once" in text for text in stacks)
    assert "step 5 of 12" in log_of(tmp_path, 0)
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert steps == list(range(3, 13, 3))
