"""Keys and tokens of the environment stay there: no file of the run folder holds one."""

import os
import re
from pathlib import Path

from sleeptrain.config import Config
from sleeptrain.schema import ConfigError, flatten, to_dict

NAME = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # what is shorter occurs by chance


def secrets() -> dict[str, str]:
    """Environment variables that hold one, by what their names suggest; a path to it is none."""
    named = {name: value for name, value in os.environ.items() if NAME.search(name)}
    return {name: value for name, value in named.items() if len(value) >= SHORTEST and not _is_path(value)}


def hide(text: str, known: dict[str, str]) -> str:
    """With the name in the place of each value."""
    for name, value in known.items():
        text = text.replace(value, f"<{name}>")
    return text


def refuse_secrets(config: Config) -> None:
    """Raises ConfigError where a setting holds one: settings are written into the run folder and its
    checkpoints."""
    for setting, value in flatten(to_dict(config)).items():
        for name, secret in secrets().items():
            if secret in str(value):
                raise ConfigError(
                    f"{setting} holds the value of the environment variable {name} and would be written into "
                    "the run folder; leave it out: what needs the variable reads it from the environment"
                )


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except OSError:  # too long for one
        return False
