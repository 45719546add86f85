"""The rows of metrics that the trainer writes, and the bar that a terminal shows."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sleeptrain.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SleepConfig,
)
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.engine.trainer import train
from sleeptrain.model.flops import training_flops
from sleeptrain.model.visits import cut, plan
from sleeptrain.optim.schedule import num_passes_at

CONFIG = Config(
    model=ModelConfig(d_model=16, num_heads=2, memory_heads=2, memory_key_dim=8, memory_value_dim=8),
    sleep=SleepConfig(window_tokens=12, num_passes=4, passes_schedule="sampled"),
    data=DataConfig(batch_sequences=4),
    optim=OptimConfig(num_steps=6),
    eval=EvalConfig(num_examples=4),
    log=LogConfig(every_steps=6),
)


def trained(folder: Path) -> dict:
    config = replace(CONFIG, run=RunConfig(dir=str(folder)))
    assert train(config, "") == 0
    return next(row for row in read_metrics(folder) if "train/loss" in row)


def test_rates_count_the_passes_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N changes from step to step: what was done is a sum, not the last step's N times the steps."""
    monkeypatch.setattr("sleeptrain.engine.trainer.Trainer._utilisation", utilisation_of_a_known_device)
    row = trained(tmp_path)
    drawn = [num_passes_at(step, CONFIG.sleep, 6, 0) for step in range(6)]
    assert len(set(drawn)) > 1
    passes = [2 * 12 * n + 2 for n in drawn]  # two windows asleep, the answers awake
    ratio = row["train/pass_tokens_per_second"] / row["train/tokens_per_second"]
    assert ratio == pytest.approx(sum(passes) / (6 * 26))
    windows = cut(26, 12, (False, False, True))
    plans = [plan(windows, n, CONFIG.model, CONFIG.sleep) for n in drawn]
    flops = [training_flops(CONFIG.model, CONFIG.sleep, windows, visits, 4).model for visits in plans]
    seconds = 6 * 4 * 26 / row["train/tokens_per_second"]
    assert row["train/mfu"] == pytest.approx(4 * sum(flops) / seconds / 1e12)
    assert row["train/hfu"] == row["train/mfu"]  # nothing was run again


def utilisation_of_a_known_device(trainer) -> dict[str, float]:  # type: ignore[no-untyped-def]
    return trainer.interval.work.utilisation(trainer.interval.seconds, peak=1e12)


def test_a_terminal_shows_a_bar_with_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trained(tmp_path)
    shown = capsys.readouterr()
    assert "6/6" in shown.err
    assert "step/s" in shown.err or "s/step" in shown.err
    assert "loss=" in shown.err
    assert "step 6/6" not in shown.out  # the lines of a log file
