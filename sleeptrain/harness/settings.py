"""What lm-eval's command line may say of a checkpoint."""

from dataclasses import dataclass
from typing import Literal

from sleeptrain.schema import ConfigError, setting


@dataclass(frozen=True)
class HarnessConfig:
    """The keys of ``--model_args``; the last two are lm-eval's own ``--batch_size`` and ``--device``."""

    checkpoint: str = setting("", "run folder (its newest valid checkpoint) or one checkpoint folder")
    num_passes: int | None = setting(None, "N of each sleep; null: as trained")
    tolerance: float = setting(
        0.0, "a sleep ends once a pass changes the fast weights by less than this share of their norm"
    )
    halt_threshold: float | None = setting(
        None,
        "where sleep.halting=learned: it ends once the chance of having halted reaches this; null: 0.5",
    )
    batch_size: int = setting(1, "texts read side by side (--batch_size)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one (--device)")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint is not given; write --model_args checkpoint=runs/NAME")
        if self.num_passes is not None and self.num_passes < 1:
            raise ConfigError(f"num_passes={self.num_passes} is below 1; reading a window is already pass 1")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1; write --batch_size 8")
