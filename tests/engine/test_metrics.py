"""Rows that are taken back, and a value that JSON does not know."""

import json
import math
from pathlib import Path

from sleeptrain.config import Config
from sleeptrain.engine.metrics import MetricsWriter, read_metrics


def test_rows_after_a_step_are_taken_back_and_written_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, Config())
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.cut(1)
    writer.write(2, {"loss": 5.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 5.0}]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, Config())
    writer.write(1, {"loss": math.nan, "norm": -math.inf, "step_seconds": 0.5})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "loss": None, "norm": None, "step_seconds": 0.5}
