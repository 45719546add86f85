"""Every setting of a run, what it means, and the checks between settings. Imports no torch.

Each section is a frozen dataclass in a file of its own; Hydra composes the values (``configs/``), ``Config``
checks them, and the result is frozen as ``config.yaml`` in the run folder. A check raises ConfigError with
the setting, its value and the remedy.
"""

from sleeptrain.config.data import DataConfig
from sleeptrain.config.model import ATTENTION_KINDS, FAST_WEIGHT_KINDS, BlockSpec, ModelConfig, parse_pattern
from sleeptrain.config.processes import ClusterConfig, ParallelConfig
from sleeptrain.config.run import Config, RunConfig
from sleeptrain.config.sleep import SleepConfig
from sleeptrain.config.tasks import (
    MOST_OPS,
    DepoConfig,
    GSMInfiniteConfig,
    RecallConfig,
    Rule110Config,
    TaskConfig,
    TextConfig,
)
from sleeptrain.config.training import CheckpointConfig, EvalConfig, LogConfig, OptimConfig

__all__ = [
    "ATTENTION_KINDS",
    "FAST_WEIGHT_KINDS",
    "MOST_OPS",
    "BlockSpec",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DepoConfig",
    "EvalConfig",
    "GSMInfiniteConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RecallConfig",
    "Rule110Config",
    "RunConfig",
    "SleepConfig",
    "TaskConfig",
    "TextConfig",
    "parse_pattern",
]
