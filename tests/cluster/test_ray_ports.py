"""R21: who is on another machine reaches nothing of a cluster on this one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from port_scan import ADDRESS, STRANGER
from ray_daemons import ROOT

NAMESPACE = ("unshare", "--net", "bash", "-euc")
NETWORK = f"ip link set lo up; ip address add {ADDRESS}/32 dev lo; ip address add {STRANGER}/32 dev lo"

pytestmark = pytest.mark.more


def no_namespace() -> str:
    """Why there can be none here; empty where there can."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "unshare or ip is not installed"
    made = subprocess.run([*NAMESPACE, NETWORK], capture_output=True, text=True)
    return made.stderr.strip()


@pytest.mark.skipif(bool(no_namespace()), reason=f"no network namespace: {no_namespace()}")
def test_no_port_of_a_run_answers_from_beyond_loopback(tmp_path: Path) -> None:
    """In a network of its own, with an address that is not loopback; amid training."""
    scan = [sys.executable, str(Path(__file__).with_name("port_scan.py")), str(tmp_path)]
    done = subprocess.run(
        [*NAMESPACE, f'{NETWORK}; exec "$@"', "scan", *scan],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *_, controlled, alone = [line.split() for line in done.stdout.split("\n")[:-1]]
    assert controlled[1:] == controlled[:1]  # the scan finds what listens everywhere
    assert alone == []
