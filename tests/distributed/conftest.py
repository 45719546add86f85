"""Asked for by name, this folder runs whole: the longer tests too, which a run of all tests leaves to
``-m more``."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Where every path given lies in this folder, and no ``-m``, nothing but ``slow`` and ``gpu`` is left
    out."""
    paths = [
        Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args
    ]
    has_markers = any(argument.startswith("-m") for argument in map(str, config.invocation_params.args))
    if not has_markers and all(path.is_relative_to(FOLDER) for path in paths):
        config.option.markexpr = "not slow and not gpu"
