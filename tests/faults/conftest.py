"""Asked for by name, alone or with ``tests/data``, this folder runs whole: the longer tests too, which a run
of all tests leaves to ``-m more``."""

import shutil
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = (TESTS / "faults", TESTS / "data")


def pytest_configure(config: pytest.Config) -> None:
    """Where every path given lies in one of these folders, and no ``-m``, nothing but ``slow`` and ``gpu`` is
    left out."""
    paths = [
        Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args
    ]
    has_markers = any(argument.startswith("-m") for argument in map(str, config.invocation_params.args))
    if not has_markers and all(any(path.is_relative_to(folder) for folder in FOLDERS) for path in paths):
        config.option.markexpr = "not slow and not gpu"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed, with the settings of ``fault_runs``; not to be changed."""
    from fault_runs import train  # imports the trainer: not before a test asks for it

    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(reference, tmp_path / "run"))
