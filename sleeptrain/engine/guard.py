"""Which updates are refused, and how many may be: a loss or gradient that is not finite, or a gradient far
above those before it."""

import math
from collections import deque
from statistics import median
from typing import Any

from sleeptrain.config import OptimConfig
from sleeptrain.parallel.backend import UpdateResult
from sleeptrain.schema import RunError

HISTORY_UPDATES = 100


class TooManySkipsError(RunError):
    """Too many updates in a row were refused."""


class SkipGuard:
    """Knows the gradient norms of the last updates, and counts those that were refused; every process of a
    run holds the same. Part of the checkpoint, so that a resumed run decides alike."""

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.total = 0
        self.in_a_row = 0
        self.norms: deque[float] = deque(maxlen=HISTORY_UPDATES)
        self.warning: str | None = None  # where the last update was refused

    @property
    def max_norm(self) -> float:
        """The largest gradient norm that the next update may have; infinite before the first one."""
        if not self.config.spike_factor or not self.norms:
            return math.inf
        usual = max(median(self.norms), self.config.clip_norm)
        return self.config.spike_factor * usual or math.inf  # gradients may have been zero so far

    def record(self, step: int, update: UpdateResult) -> None:
        """Counts the update of ``step``."""
        if update.applied:
            self.in_a_row = 0
            self.norms.append(update.grad_norm)
            self.warning = None
            return
        self.total += 1
        self.in_a_row += 1
        self.warning = (
            f"warning: the update of step {step} is skipped: its loss is {update.loss:.4g}, its gradient "
            f"norm {update.grad_norm:.4g}, and {self.max_norm:.4g} is the limit; {self.in_a_row} in a row, "
            f"{self.config.max_skipped_steps} end the run"
        )

    def check(self) -> None:
        """Raises TooManySkipsError after ``max_skipped_steps`` refused updates in a row."""
        if self.in_a_row >= self.config.max_skipped_steps:
            raise TooManySkipsError(
                f"{self.in_a_row} updates in a row were skipped: their loss or gradient was not finite, or "
                f"their gradient norm above optim.spike_factor={self.config.spike_factor:g} times the usual; "
                "lower optim.muon_lr and optim.adamw_lr, lengthen optim.warmup_steps, use float32 or raise "
                "optim.spike_factor, and go on from the last checkpoint with run.allow_config_change=true"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row, "norms": list(self.norms)}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` returned."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        self.norms = deque(state["norms"], maxlen=HISTORY_UPDATES)
