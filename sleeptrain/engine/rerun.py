"""Steps that are made again in the same process because replicas were found to differ, and how often."""

from collections import Counter

from sleeptrain.schema import RunError

MAX_RERUNS = 3


class ReplicasDifferError(Exception):
    """Some process holds wrong bits; raised in all processes at once, and caught by the training loop."""


class Reruns:
    """Counts the returns to each checkpoint."""

    def __init__(self) -> None:
        self._from_step: Counter[int] = Counter()

    def record(self, found: ReplicasDifferError, checkpoint_step: int | None) -> str:
        """What to warn of; RunError where no checkpoint is there, or going back to it did not help."""
        if checkpoint_step is None:
            raise RunError(f"{found}; no checkpoint is there to go back to: the same command begins again")
        self._from_step[checkpoint_step] += 1
        if self._from_step[checkpoint_step] > MAX_RERUNS:
            raise RunError(
                f"{found}, although the steps since {checkpoint_step} were made again {MAX_RERUNS} times; do "
                "not trust that process's memory and device: replace them, and the same command goes on from "
                "the last checkpoint"
            )
        return f"warning: {found}; the steps since {checkpoint_step} are made again"
