"""The order of training data: a counter, so that a restarted run reads exactly what an uninterrupted one
reads, on any number of replicas."""

import numpy as np

from sleeptrain.data.batch import Batch, make_batch
from sleeptrain.tasks.base import Task


class TrainStream:
    """Batch ``step`` holds examples ``step * batch_sequences`` and following of the task's train split;
    replica ``rank`` of ``num_replicas`` gets its equal share of them."""

    def __init__(
        self,
        task: Task,
        seed: int,
        batch_sequences: int,
        window_tokens: int,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.task, self.seed, self.window_tokens = task, seed, window_tokens
        self.batch_sequences = batch_sequences
        share = batch_sequences // num_replicas
        self.rows = np.arange(rank * share, (rank + 1) * share)

    def batch(self, step: int) -> Batch:
        indices = step * self.batch_sequences + self.rows
        # The seed spreads over what a counter never reaches, so that runs drop differently.
        keys = indices + (self.seed << 40)
        return make_batch(self.task.examples(self.seed, indices, "train"), self.window_tokens, keys)
