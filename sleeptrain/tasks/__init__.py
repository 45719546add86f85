"""Tasks: pure functions of (seed, index). One file per task; ``base.py`` has the contract."""

from typing import Any

from sleeptrain.config import (
    DepoConfig,
    GSMInfiniteConfig,
    RecallConfig,
    Rule110Config,
    TaskConfig,
    TextConfig,
)
from sleeptrain.tasks.base import Examples, Split, Task
from sleeptrain.tasks.depo import Depo
from sleeptrain.tasks.gsm_infinite import GSMInfinite
from sleeptrain.tasks.recall import Recall
from sleeptrain.tasks.rule110 import Rule110
from sleeptrain.tasks.text import Text

__all__ = ["Depo", "Examples", "GSMInfinite", "Recall", "Rule110", "Split", "Task", "Text", "make_task"]

_TASKS: dict[type, Any] = {
    Rule110Config: Rule110,
    DepoConfig: Depo,
    RecallConfig: Recall,
    TextConfig: Text,
    GSMInfiniteConfig: GSMInfinite,
}


def make_task(config: TaskConfig) -> Task:
    """The task of these settings; raises ConfigError where they contradict the data."""
    return _TASKS[type(config)](config)
