"""The image without a container engine: its Dockerfile is linted, and what it installs is installed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_versions_are_in_pyproject_alone() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [d.partition("==")[0].partition(">")[0].partition("[")[0] for d in dependencies]
    for file in ("Dockerfile", "install.sh"):
        text = (DOCKER / file).read_text()
        assert not [name for name in names if f"{name}==" in text or f"{name}>" in text]


def test_the_build_gets_what_it_copies() -> None:
    shown = (ROOT / ".dockerignore").read_text().splitlines()
    (line,) = (row for row in (DOCKER / "Dockerfile").read_text().splitlines() if row.startswith("COPY p"))
    for path in line.split()[1:-1]:
        assert f"!{path}" in shown
        assert (ROOT / path).is_file()


def test_another_variant_is_refused(tmp_path: Path) -> None:
    command = ["bash", DOCKER / "install.sh", ROOT / "pyproject.toml", tmp_path / "venv", "rocm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the variant is cuda or cpu, and not 'rocm'" in done.stderr


@pytest.mark.more
def test_what_it_installs_runs_the_code_of_a_job(tmp_path: Path) -> None:
    """By the shell, in a fresh environment; then the code of this checkout, which the image has not."""
    environment = {**os.environ, "PYTHON": sys.executable, "CPU_INDEX": "", "PYTHONPATH": str(ROOT)}
    environment["PIP_COMPILE"] = "0"  # Python does so itself with the few modules that are imported here
    command = ["bash", DOCKER / "install.sh", ROOT / "pyproject.toml", tmp_path / "venv", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = [tmp_path / "venv" / "bin" / "python", "-m", "sleeptrain.pretrain", "dry_run=true"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sleep" in done.stdout
