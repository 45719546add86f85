"""Which changes of a run between two starts count."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sleeptrain.config import Config
from sleeptrain.engine.resume import require_same_run
from sleeptrain.schema import ConfigError, to_dict


class Saved(NamedTuple):
    """What of a checkpoint is compared."""

    documents: dict[str, Any]
    path: Path = Path("checkpoints/step_10")


def test_a_setting_that_came_after_the_checkpoint_had_its_default() -> None:
    before, now = ({"config": to_dict(Config()), "versions": {}} for _ in range(2))
    del before["config"]["sleep"]["halting"]
    require_same_run(Saved(before), now, change_allowed=False)  # type: ignore[arg-type]
    now["config"]["sleep"]["halting"] = "learned"
    with pytest.raises(ConfigError, match=r'sleep.halting: saved "none", now "learned"; go back'):
        require_same_run(Saved(before), now, change_allowed=False)  # type: ignore[arg-type]
