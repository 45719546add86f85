"""When the model sleeps, and how often it passes over a window."""

from dataclasses import dataclass
from typing import Literal

from sleeptrain.config.checks import require_in
from sleeptrain.schema import ConfigError, setting


@dataclass(frozen=True)
class SleepConfig:
    """When and how often the model passes over a window (method: paper section 3)."""

    window_tokens: int = setting(
        24, "L, tokens read before the model sleeps; 0: the whole sequence is one window"
    )
    num_passes: int = setting(
        2, "N, passes over a window in training, reading included; 1 is the plain hybrid"
    )
    passes_schedule: Literal["fixed", "growing", "sampled"] = setting("fixed", "N over training steps")
    min_passes: int = setting(1, "smallest N of a growing or sampled schedule")
    growth_fraction: float = setting(0.5, "part of training after which a growing N has reached num_passes")
    schedule: Literal["consolidate_or_predict", "predict_then_consolidate"] = setting(
        "consolidate_or_predict",
        "a window either sleeps or predicts, or (text) predicts in pass 1 and then sleeps",
    )
    eviction: Literal["hard", "sliding"] = setting(
        "hard", "at a window's end: clear the KV cache, or keep L-1 tokens"
    )
    sliding_kv: Literal["last_pass", "per_pass"] = setting(
        "last_pass", "the passes whose keys and values survive"
    )
    convolution: Literal["auto", "reset", "carried"] = setting(
        "auto", "convolution tail across windows; auto: reset with hard, carried with sliding eviction"
    )
    norm_between_passes: bool = setting(
        False, "apply the model's final norm to h between two passes (as Ouro loops)"
    )
    backprop_passes: int = setting(
        0, "backpropagate through the last k passes of a window only; 0: through all"
    )
    detach_state: bool = setting(False, "stop the gradient of the fast weights at window borders")
    learned_initial_state: bool = setting(False, "learn the fast weights that a sequence starts with")
    halting: Literal["none", "learned"] = setting(
        "none",
        "learned: after each pass of sleep a sequence halts with a chance that it learns, and what it "
        "remembers is the mean over the passes that may be its last",
    )
    halting_cost: float = setting(
        0.01, "learned halting: nats that each expected pass beyond reading adds to the loss of a sequence"
    )
    carry_between_batches: bool = setting(
        False,
        "row r of a batch goes on with the state (detached) that row r of the batch before left, unless a "
        "document starts there",
    )
    activation_checkpointing: Literal["none", "pass", "block", "both"] = setting(
        "none", "recompute activations in the backward pass, per pass, per block, or both nested"
    )

    @property
    def carries_convolution(self) -> bool:
        return self.convolution == "carried" or (self.convolution == "auto" and self.eviction == "sliding")

    def __post_init__(self) -> None:
        if self.num_passes < 1:
            raise ConfigError(
                f"sleep.num_passes={self.num_passes} is below 1; reading a window is already pass 1"
            )
        if not 1 <= self.min_passes <= self.num_passes:
            raise ConfigError(
                f"sleep.min_passes={self.min_passes} must lie in 1..{self.num_passes} (sleep.num_passes)"
            )
        require_in("sleep", self, ("window_tokens", "backprop_passes", "halting_cost"), 0)
        require_in("sleep", self, ("growth_fraction",), 0, 1)
        if self.halting == "learned":
            self._check_halting()

    def _check_halting(self) -> None:
        """Passes to leave out, a mixture of fast weights alone, and gradients that reach every pass."""
        refused = (
            (self.num_passes == 1, "num_passes=1", "there is no pass to leave out; raise it"),
            (self.eviction == "sliding", "eviction=sliding", "keys of passes do not mix; use eviction=hard"),
            (self.carries_convolution, "convolution=carried", "tails of passes do not mix; use reset"),
            (self.backprop_passes, f"backprop_passes={self.backprop_passes}", "every pass learns; use 0"),
            (self.detach_state, "detach_state=true", "only later windows can teach when to halt; use false"),
        )
        for is_so, setting_given, reason in refused:
            if is_so:
                raise ConfigError(f"sleep.halting=learned does not go with sleep.{setting_given}: {reason}")
