"""tools/bench/checkpoint.py runs from end to end at a tiny size; its figures are not tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.more


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "bench" / "checkpoint.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_it_compares_saving_and_loading_with_each_peer(tmp_path):
    done = run("--quick", "--rounds", "2", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "what was loaded equals what was saved" in done.stdout
    ratios = re.findall(r"^ratio (.+): \d+\.\d{3} \(cpu \d+\.\d{3}\)$", done.stdout, re.MULTILINE)
    assert ratios == [
        "our save: stall / memcpy",
        "our save: stall / DCP async_save: stall",
        "our save: durable / write + fsync",
        "our load, verified / torch.load",
        "our find_latest, then load / torch.load",
    ]
    assert "PASS" not in done.stdout
    assert "FAIL" not in done.stdout
    assert not any(tmp_path.iterdir())


def test_help_explains_the_figure():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "Ratios are ours over the peer named" in done.stdout
