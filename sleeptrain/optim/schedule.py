"""What changes over training: the learning rate, and N. Both are pure functions of the step."""

import hashlib

from sleeptrain.config import OptimConfig, SleepConfig


def lr_factor(step: int, config: OptimConfig) -> float:
    """Warm-up, stable, linear decay: the factor on the peak learning rate for update ``step`` (from 0)."""
    warm_up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * config.num_steps
    decay = min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0
    return min(warm_up, decay)


def num_passes_at(step: int, sleep: SleepConfig, num_steps: int, seed: int) -> int:
    """N of training step ``step``: fixed, growing by equal stages, or drawn evenly from a counter (the same
    on every rank and after every restart)."""
    choices = sleep.num_passes - sleep.min_passes + 1
    if sleep.passes_schedule == "growing":
        progress = step / max(1.0, sleep.growth_fraction * num_steps)
        return sleep.min_passes + min(choices - 1, int(progress * choices))
    if sleep.passes_schedule == "sampled":
        digest = hashlib.sha256(f"passes/{seed}/{step}".encode()).digest()
        return sleep.min_passes + int.from_bytes(digest[:8], "big") % choices
    return sleep.num_passes
