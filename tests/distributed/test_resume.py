"""A run that goes on with other degrees: the same examples in the same order, and the losses of one process.

Each process calls ``train`` as ``python -m sleeptrain.pretrain`` does; a stop is a real signal.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from sleeptrain.checkpoint.store import find_latest
from sleeptrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Rule110Config,
    RunConfig,
    SleepConfig,
)
from sleeptrain.data.stream import TrainStream
from sleeptrain.engine import trainer
from sleeptrain.engine.metrics import FILE_NAME
from sleeptrain.engine.resilience import EXIT_REQUEUE
from sleeptrain.engine.trainer import Trainer, train

TOPOLOGIES = {
    "single": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig(data_size=2, zero_stage=2)),
    "tp2": (2, ParallelConfig(tensor_size=2, zero_stage=0)),
    "pp2": (2, ParallelConfig(pipeline_size=2)),
    "tp2_pp2_dp2": (8, ParallelConfig(tensor_size=2, pipeline_size=2, data_size=2)),
    "dp2_zero3": (2, ParallelConfig(data_size=2, zero_stage=3)),
}
NUM_STEPS = 6


def config_of(folder: Path, topology: str) -> Config:
    return Config(
        run=RunConfig(id="resume", dir=str(folder), device="cpu", num_threads=1),
        model=ModelConfig(
            d_model=16,
            pattern="attn gdn",
            pattern_repeats=2,
            memory_key_dim=4,
            memory_value_dim=4,
            init_std=0.1,
            embedding_init_std=1.0,
        ),
        sleep=SleepConfig(window_tokens=8, num_passes=2),
        task=Rule110Config(width=8, steps=2),
        data=DataConfig(batch_sequences=8),
        optim=OptimConfig(num_steps=NUM_STEPS, warmup_steps=50, muon_lr=0.01, adamw_lr=0.01),
        eval=EvalConfig(every_steps=0, num_examples=8),
        checkpoint=CheckpointConfig(every_steps=0),
        log=LogConfig(every_steps=1),
        parallel=TOPOLOGIES[topology][1],
    )


def run(folder: Path, topology: str, stop_at: int | None = None) -> None:
    """Starts or goes on; the last process sends itself the signal to stop in step ``stop_at``."""
    num_ranks = TOPOLOGIES[topology][0]
    codes = run_ranks(num_ranks, _train, config_of(folder, topology), stop_at)
    assert codes == [EXIT_REQUEUE if stop_at else 0] * num_ranks


def _train(config: Config, stop_at: int | None) -> int:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    batch_of, train_step = TrainStream.batch, Trainer.train_step
    is_last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])

    def recorded(stream: TrainStream, step: int):
        batch = batch_of(stream, step)
        record = {"step": step, "rank": int(os.environ["RANK"]), "keys": batch.example_keys.tolist()}
        with (Path(config.run.dir) / "examples.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return batch

    def step_or_stop(trainer: Trainer):
        if trainer.step + 1 == stop_at and is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer)

    TrainStream.batch, Trainer.train_step = recorded, step_or_stop
    trainer.draw_learning_curve = lambda *arguments: []  # half the time of so short a run
    return train(config, "resume: true\n")


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def examples(folder: Path) -> dict[int, set[int]]:
    """Which examples each step trained on."""
    seen: dict[int, set[int]] = {}
    for line in (folder / "examples.jsonl").read_text().splitlines():
        row = json.loads(line)
        seen.setdefault(row["step"], set()).update(row["keys"])
    return seen


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(folder, "single")
    return folder


def assert_equal_runs(folder: Path, expected: Path) -> None:
    assert examples(folder) == examples(expected)
    assert losses(folder) == pytest.approx(losses(expected), rel=0, abs=1e-5)
    ours, theirs = (find_latest(f / "checkpoints", print) for f in (folder, expected))
    for group in ("model", "optimizer"):
        assert sorted(ours.names(group)) == sorted(theirs.names(group))
        for name in ours.names(group):
            difference = (ours.read(group, name) - theirs.read(group, name)).double().norm()
            assert difference <= 1e-4 * max(1e-3, theirs.read(group, name).double().norm()), name


@pytest.mark.more
def test_eight_processes_then_one_then_two(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "tp2_pp2_dp2", stop_at=2)
    run(folder, "single", stop_at=4)
    run(folder, "dp2")
    assert_equal_runs(folder, uninterrupted)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run that a topology began and left in the middle."""
    parent = tmp_path_factory.mktemp("stopped")

    def of(topology: str) -> Path:
        if not (parent / topology).exists():
            run(parent / topology, topology, stop_at=3)
        return parent / topology

    return of


def both(first: str, second: str) -> Any:
    """A few of all pairs are in the fast core."""
    fast = (first, second) in [("pp2", "tp2"), ("dp2", "single")]
    return pytest.param(first, second, marks=() if fast else pytest.mark.more)


@pytest.mark.parametrize(
    ("first", "second"), [both(first, second) for first in TOPOLOGIES for second in TOPOLOGIES]
)
def test_any_topology_goes_on_from_any_other(
    first: str, second: str, stopped: Callable[[str], Path], uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped(first), folder)
    run(folder, second)
    assert_equal_runs(folder, uninterrupted)


def test_another_model_is_refused_by_every_process(tmp_path: Path) -> None:
    run(tmp_path / "run", "single", stop_at=1)
    wider = replace(config_of(tmp_path / "run", "dp2"), model=ModelConfig(d_model=32))
    with pytest.raises(AssertionError, match=r"model.d_model: saved 16, now 32"):
        run_ranks(2, _train, wider, None)
