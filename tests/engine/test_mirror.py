"""The rows that are sent, and what the training hears of the process that sends them."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.engine import mirror
from sleeptrain.engine.mirror import _rows


def line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.001)


def taken(rows: Iterator[dict[str, Any]], num_rows: int) -> list[dict[str, Any]]:
    return [next(rows) for _ in range(num_rows)]


def test_rows_come_as_they_are_written(tmp_path: Path) -> None:
    path, ended = tmp_path / "metrics.jsonl", threading.Event()
    path.write_text(line(1) + line(2) + line(2, eval=1) + '{"st')
    rows = _rows(path, 2, ended)
    assert taken(rows, 2) == [{"step": 2}, {"step": 2, "eval": 1}]
    threading.Timer(0.05, lambda: path.open("a").write('ep": 3}\n')).start()
    assert next(rows) == {"step": 3}
    with path.open("a") as file:
        file.write(line(4) + '{"torn')
    ended.set()
    assert list(rows) == [{"step": 4}]


def test_rows_that_were_taken_back_are_not_sent_again(tmp_path: Path) -> None:
    path, ended = tmp_path / "metrics.jsonl", threading.Event()
    path.write_text("".join(line(step) for step in range(1, 7)))
    rows = _rows(path, 0, ended)
    assert [row["step"] for row in taken(rows, 6)] == [1, 2, 3, 4, 5, 6]
    replace_file(path, (line(1) + line(2) + line(3)).encode())
    with path.open("a") as file:
        file.write(line(4) + line(5) + line(6) + line(6, eval=1) + line(7))
    ended.set()
    assert [row["step"] for row in rows] == [6, 6, 7]
