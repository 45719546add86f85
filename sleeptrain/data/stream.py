"""The order of training data: a counter, so that a restarted run reads exactly what an uninterrupted one
reads."""

import numpy as np

from sleeptrain.data.batch import Batch, make_batch
from sleeptrain.tasks.base import Task


class TrainStream:
    """Batch ``step`` holds examples ``step * batch_sequences`` and following of the task's train split."""

    def __init__(self, task: Task, seed: int, batch_sequences: int, window_tokens: int) -> None:
        self.task, self.seed = task, seed
        self.batch_sequences, self.window_tokens = batch_sequences, window_tokens

    def batch(self, step: int) -> Batch:
        indices = np.arange(step * self.batch_sequences, (step + 1) * self.batch_sequences)
        return make_batch(self.task.examples(self.seed, indices, "train"), self.window_tokens)
