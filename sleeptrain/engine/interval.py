"""What the steps since the last row of metrics amounted to."""

from typing import NamedTuple

from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.flops import training_flops
from sleeptrain.model.visits import cut, plan


class Work(NamedTuple):
    """Tokens times passes, and FLOPs with and without what checkpointing runs again."""

    pass_tokens: float = 0.0
    model_flops: float = 0.0
    hardware_flops: float = 0.0

    def utilisation(self, seconds: float, peak: float) -> dict[str, float]:
        """As fractions of the ``peak`` FLOP/s of the device."""
        return {
            "train/mfu": self.model_flops / seconds / peak,
            "train/hfu": self.hardware_flops / seconds / peak,
        }


class WorkOfSteps:
    """What a step with so many passes amounts to; N may change from step to step."""

    def __init__(self, config: Config, sequence_tokens: int, vocab_size: int) -> None:
        self.config, self.sequence_tokens, self.vocab_size = config, sequence_tokens, vocab_size
        self._known: dict[tuple[int, tuple[bool, ...]], Work] = {}

    def __call__(self, batch: Batch, num_passes: int) -> Work:
        key = (num_passes, batch.windows_with_loss)
        if key not in self._known:
            config = self.config
            windows = cut(self.sequence_tokens, config.sleep.window_tokens, batch.windows_with_loss)
            visits = plan(windows, num_passes, config.model, config.sleep)
            passes = {(v.window, v.pass_number) for v in visits}
            cost = training_flops(config.model, config.sleep, windows, visits, self.vocab_size)
            per_sequence = (sum(windows[w].stop - windows[w].start for w, _ in passes), *cost[1:])
            self._known[key] = Work(*(config.data.batch_sequences * x for x in per_sequence))
        return self._known[key]


class Interval:
    """What happened since the last row of metrics; part of the checkpoint, so that rows do not depend on
    restarts."""

    def __init__(self) -> None:
        self.loss_sum, self.num_losses = 0.0, 0
        self.num_steps, self.seconds, self.data_seconds = 0, 0.0, 0.0
        self.work = Work()

    def add(
        self, loss: float | None, grad_norm: float, num_passes: int, lr_factor: float, work: Work
    ) -> None:
        if loss is not None:
            self.loss_sum += loss
            self.num_losses += 1
        self.num_steps += 1
        self.grad_norm, self.num_passes, self.lr_factor = grad_norm, num_passes, lr_factor
        self.work = Work(*(a + b for a, b in zip(self.work, work)))

    def mean_loss(self) -> float | None:
        return self.loss_sum / self.num_losses if self.num_losses else None

    def state(self) -> dict[str, float]:
        return {"loss_sum": self.loss_sum, "num_losses": self.num_losses}

    def load(self, state: dict[str, float]) -> None:
        self.loss_sum, self.num_losses = state["loss_sum"], int(state["num_losses"])
