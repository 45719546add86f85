"""What the steps since the last row of metrics amounted to."""

from typing import NamedTuple


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
