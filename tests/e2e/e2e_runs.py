"""Runs of the command line in real processes, small enough for seconds."""

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"
TINY = [
    *("model.d_model=16", "model.num_heads=2", "model.memory_heads=2", "model.memory_key_dim=8"),
    *(
        "model.memory_value_dim=8",
        "task.width=6",
        "task.num_strings=2",
        "task.steps=1",
        "sleep.window_tokens=6",
    ),
    *("data.batch_sequences=8", "optim.num_steps=24", "optim.warmup_steps=4", "eval.every_steps=8"),
    *("eval.num_examples=16", "eval.num_passes=[1,3]", "checkpoint.every_steps=5", "log.every_steps=3"),
]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def command(folder: Path, *settings: str) -> list[str]:
    """The command line of a tiny run."""
    return [sys.executable, "-m", "sleeptrain.pretrain", f"run.dir={folder}", *TINY, *settings]


def compare_runs(a: Path, b: Path) -> str:
    """What ``tools/compare_runs.py`` says of two runs that differ; empty if they are equal."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = _comparison.main([str(a), str(b)])
    return said.getvalue() if code else ""


_spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
_comparison = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_comparison)
