"""What a task is: examples as a pure function of (seed, index, split, difficulty), and its own metrics."""

import hashlib
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sleeptrain.config import TaskConfig
from sleeptrain.schema import ConfigError, to_dict

Split = Literal["train", "validation", "test"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint64]


class Examples(NamedTuple):
    """A batch of examples.

    ``targets[b, t]`` is what the model must output at position t: already shifted where the task predicts the
    next token, and 0 where ``loss_mask`` is False.
    """

    ids: Ints  # [B, T]
    targets: Ints  # [B, T]
    loss_mask: Bools  # [B, T]
    valid: Bools  # [B, T], False on pads
    difficulty: Ints  # [B]


class Task(ABC):
    """A source of examples without random state: equal arguments, equal examples, however they are batched.

    Each underlying item belongs to one split for ever, by a hash of its content that no seed changes.
    """

    vocab_size: int
    sequence_tokens: int  # T of every example
    difficulties: tuple[int, ...]  # evaluated when the user names none
    difficulty_name: str  # heading of the difficulty in tables: "steps", "hops", ...

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.sequence_tokens = config.sequence_tokens

    @abstractmethod
    def examples(
        self, seed: int, indices: Ints, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        """The examples with these ``indices`` [B]; ``difficulty`` None: the task's own choice.

        Raises ConfigError if the task does not know the difficulty.
        """

    @abstractmethod
    def score(self, predictions: Ints, nll: Floats, examples: Examples) -> dict[str, Floats]:
        """Metrics of each example, float64 [B].

        ``predictions`` [B, T] are the most likely tokens, ``nll`` [B, T] is -log p(target) in nats.
        """

    def example(
        self, seed: int, index: int, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        """A batch of one."""
        return self.examples(seed, np.array([index], dtype=np.int64), split, difficulty)

    def num_examples(self, split: Split) -> int | None:
        """Examples that ``split`` holds before they repeat; None: it does not end."""
        return None

    def marks(self, split: Split) -> dict[str, float]:
        """Known figures that a model should beat on a split, by name; none by default."""
        return {}

    def fingerprint(self) -> dict[str, str | int]:
        """What the data is, as plain values; a resumed run must find the same.

        The hash of a few examples also notices a changed generator.
        """
        sample = hashlib.sha256()
        for part in self.examples(0, np.arange(8)):
            sample.update(part.tobytes())
        return to_dict(self.config) | {"sample_sha256": sample.hexdigest()}

    def check_difficulty(self, difficulty: int | None, least: int, most: int) -> None:
        """Raises ConfigError unless ``difficulty`` is None or lies in ``least..most``."""
        if difficulty is not None and not least <= difficulty <= most:
            raise ConfigError(
                f"eval.difficulties holds {difficulty}, which is no number of {self.difficulty_name} of task "
                f"{self.config.name}; choose from {least}..{most}"
            )
