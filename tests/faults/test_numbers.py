"""R10: a number that is not finite in the loss, in a gradient or in S at a chosen step, block and pass, and
a spike of the gradient: the update is skipped on all ranks, no bit of weights and optimizer changes, the
step is counted and told, and after too many in a row the run ends. What the guard knows survives a resume."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from e2e_runs import compare_runs
from injections import (
    NUM_STEPS,
    Fault,
    Report,
    after_backward,
    bad_copy,
    bad_gradient,
    bad_loss,
    bad_memory,
    log_of,
    run,
    spike,
)

from sleeptrain.checkpoint.store import find_latest
from sleeptrain.engine.guard import SkipGuard
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.parallel.backend import Backend, LocalBackend, StepResult, UpdateResult
from sleeptrain.parallel.update import ShardedUpdate

pytestmark = pytest.mark.more
FAST_WEIGHT_BLOCKS, PASSES = (1, 3), (1, 2, 3)
LOW_CLIP = "optim.clip_norm=0.01"  # so that the limit is a multiple of the norms themselves


def drawn(seed: int, num_ranks: int) -> tuple[int, Fault]:
    """A step, and what goes wrong in it on one rank."""
    draw = random.Random(seed)
    step, rank = draw.randrange(1, NUM_STEPS - 1), draw.randrange(num_ranks)
    value = draw.choice([math.nan, math.inf, -math.inf])
    place = step, draw.choice(FAST_WEIGHT_BLOCKS), draw.choice(PASSES), value, rank
    return step, (bad_loss(step, value, rank), bad_memory(*place), bad_gradient(*place))[seed % 3]


def rows_of(folder: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_metrics(folder) if "train/loss" in row}


def require_refused(folder: Path, reports: list[Report], steps: list[int]) -> None:
    """On all ranks, without a changed bit, counted and told; and all other steps were made."""
    assert [report.code for report in reports] == [0] * len(reports)
    assert [report.refused for report in reports] == [steps] * len(reports)
    assert [report.changed for report in reports] == [[]] * len(reports)
    rows = rows_of(folder)
    assert [step for step, row in rows.items() if row["train/loss"] is None] == [step + 1 for step in steps]
    assert [row["train/skipped_steps"] for row in rows.values()] == [
        sum(refused < step for refused in steps) for step in rows
    ]
    for step in steps:
        assert f"warning: the update of step {step + 1} is skipped: its loss is" in log_of(folder)
    found = find_latest(folder / "checkpoints", print)
    assert all(torch.isfinite(x).all() for x in found.read_all("model").values())


@pytest.mark.parametrize("seed", range(3))
def test_bad_numbers_in_one_process(seed: int, tmp_path: Path) -> None:
    """R10, local backend."""
    step, fault = drawn(seed, num_ranks=1)
    require_refused(tmp_path / "run", run(tmp_path / "run", "local", faults=(fault,)), [step])


@pytest.mark.parametrize(
    ("topology", "seed"), [("dp2 zero0", 3), ("dp2 zero0", 4), ("dp2 zero1", 5), ("dp2 zero1", 7)]
)
def test_bad_numbers_on_one_of_two_ranks(topology: str, seed: int, tmp_path: Path) -> None:
    """R10, megatron_deepspeed backend."""
    step, fault = drawn(seed, num_ranks=2)
    require_refused(tmp_path / "run", run(tmp_path / "run", topology, faults=(fault,)), [step])


def test_bad_numbers_on_one_of_two_stages(tmp_path: Path) -> None:
    """R10: the second stage holds the upper block with fast weights."""
    fault = bad_memory(6, FAST_WEIGHT_BLOCKS[1], 2, math.nan, rank=1)
    require_refused(tmp_path / "run", run(tmp_path / "run", "pp2", faults=(fault,)), [6])


def test_a_copy_that_is_not_counted_in_the_norm(tmp_path: Path) -> None:
    """R10: without ZeRO, rank 0 speaks for the gradient of all replicas; rank 1 has a bad number in its
    own."""
    reports = run(tmp_path / "run", "dp2 zero0", faults=(bad_copy(6, math.nan, rank=1),))
    require_refused(tmp_path / "run", reports, [6])


def test_it_notices_that_copies_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the norm of what is counted alone."""

    def of_counted(update: ShardedUpdate, gradients: list[torch.Tensor]) -> torch.Tensor:
        counted = [g.double().square().sum() for g, c in zip(gradients, update.counted) if c]
        return torch.stack([torch.zeros((), dtype=torch.float64), *counted]).sum()

    monkeypatch.setattr(ShardedUpdate, "_squared_norm", of_counted)
    settings = ("run.check_replicas_every_steps=0",)
    reports = run(tmp_path / "run", "dp2 zero0", *settings, faults=(bad_copy(6, math.nan, rank=1),))
    assert [report.refused for report in reports] != [[6], [6]]


@pytest.mark.parametrize("topology", ["local", "dp2 zero1"])
def test_a_spike_is_refused(topology: str, tmp_path: Path) -> None:
    """R10: a gradient 100 times as large; twice as large is none."""
    faults = (spike(4, 2.0), spike(8, 100.0))
    reports = run(tmp_path / "run", topology, LOW_CLIP, faults=faults)
    require_refused(tmp_path / "run", reports, [8])
    norms = {step: row["train/grad_norm"] for step, row in rows_of(tmp_path / "run").items()}
    usual = sorted(norms[step] for step in range(1, 9))
    limit = 50 * (usual[3] + usual[4]) / 2
    assert norms[9] > limit
    assert f"gradient norm {norms[9]:.4g}, and {limit:.4g} is the limit" in log_of(tmp_path / "run")


def test_without_the_guard_a_spike_is_an_update(tmp_path: Path) -> None:
    """Negative control of the two above and of optim.spike_factor=0."""
    reports = run(tmp_path / "run", "local", LOW_CLIP, "optim.spike_factor=0", faults=(spike(8, 100.0),))
    assert reports == [Report(0, [], [])]


def test_without_the_guard_bad_numbers_reach_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""

    def blind(backend: LocalBackend, lr_factor: float, loss: torch.Tensor, max_norm: float) -> UpdateResult:
        backend.optimizer.step(lr_factor)
        backend.model.zero_grad()
        return UpdateResult(float(loss), 1.0, True)

    monkeypatch.setattr(LocalBackend, "step", blind)
    reports = run(tmp_path / "run", "local", faults=(bad_memory(6, 1, 2, math.nan),))
    assert reports[0].refused == []
    assert rows_of(tmp_path / "run")[7]["train/loss"] is None
    assert rows_of(tmp_path / "run")[NUM_STEPS]["train/loss"] is None


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """R10: bad numbers and spikes count alike; what was good before them stays saved, nothing else is."""
    faults = (bad_loss(6, math.nan), spike(7, 1000.0), bad_memory(8, 1, 2, math.inf))
    folder = tmp_path / "run"
    reports = run(folder, "dp2 zero1", LOW_CLIP, "optim.max_skipped_steps=3", faults=faults)
    assert {report.code for report in reports} == {1}
    assert {tuple(report.refused) for report in reports} == {(6, 7, 8)}
    assert "error: 3 updates in a row were skipped" in log_of(folder)
    assert "3 in a row, 3 end the run" in log_of(folder)
    found = find_latest(folder / "checkpoints", print)
    assert found.step == 5


def stop_before(step: int) -> Fault:
    """The run is asked to stop amid the step before."""

    def change(backend: Backend, result: StepResult) -> StepResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    return after_backward(step - 1, change)


def test_a_resumed_guard_decides_and_counts_as_before(tmp_path: Path) -> None:
    """R10: a spike in the first step after a resume is refused by the norms from before it."""
    faults = (bad_loss(3, math.nan), spike(8, 100.0))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    require_refused(whole, run(whole, "dp2 zero1", LOW_CLIP, faults=faults), [3, 8])
    assert [r.code for r in run(halves, "dp2 zero1", LOW_CLIP, faults=(*faults, stop_before(8)))] == [75, 75]
    trainer = find_latest(halves / "checkpoints", print).documents["trainer"]
    assert (trainer["step"], trainer["guard"]["total"], len(trainer["guard"]["norms"])) == (8, 1, 7)
    json.dumps(trainer, allow_nan=False)
    assert [r.refused for r in run(halves, "dp2 zero1", LOW_CLIP, faults=faults)] == [[8], [8]]
    assert compare_runs(whole, halves) == ""


def test_it_notices_a_guard_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    faults, folder = (bad_loss(3, math.nan), spike(8, 100.0)), tmp_path / "run"
    run(folder, "local", LOW_CLIP, faults=(*faults, stop_before(8)))
    monkeypatch.setattr(SkipGuard, "load", lambda self, state: None)
    assert run(folder, "local", LOW_CLIP, faults=faults)[0].refused == []
    assert rows_of(folder)[NUM_STEPS]["train/skipped_steps"] == 0
