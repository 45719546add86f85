"""Recall: which value stood behind this key, up to many windows ago? Associative recall against distance."""

import numpy as np

from sleeptrain.config import RecallConfig
from sleeptrain.tasks.base import Bits, Examples, Floats, Ints, Split, Task
from sleeptrain.tasks.counter import content_hash, in_split, random_below, random_bits, random_order


class Recall(Task):
    """Windows of ``pairs_per_window`` adjacent (key, value) tokens, then a window of queries.

    The keys of an example are distinct; each value is drawn evenly from all, so that chance is 1/num_values.
    A query is a key of the context, each at most once; its target, in place, is the value of that key. Ids:
    0 .. K-1 the keys, K .. K+V-1 the values.

    Difficulty: distance d in windows, from the pair to the queries; 1 is the last window of context. They are
    the windows of the model where ``sleep.window_tokens`` is 2 ``pairs_per_window``. By default the queries
    are drawn from all pairs, and the difficulty reads 0. At distance d the first queries, as many as that
    window has pairs, ask for these alone, and they alone are in the loss and the metrics; the queries left
    over are drawn from the other pairs and only keep the shape.

    Splits: the set of an example's pairs, in any order.

    With K = 9 and V = 4, the windows (0 12, 1 9) and (5 11, 4 10), then two queries, for 1 and for 4:

    >>> config = RecallConfig(num_windows=2, pairs_per_window=2, num_keys=9, num_values=4, num_queries=2)
    >>> example = Recall(config).example(seed=0, index=1)
    >>> example.ids.tolist()
    [[0, 12, 1, 9, 5, 11, 4, 10, 1, 4]]
    >>> example.targets[:, -2:].tolist()
    [[9, 10]]
    """

    config: RecallConfig
    difficulty_name = "distance"

    def __init__(self, config: RecallConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.num_keys + config.num_values
        powers = (2**i for i in range(config.num_windows.bit_length()))
        self.difficulties = tuple(sorted({*powers, config.num_windows}))

    def examples(
        self, seed: int, indices: Ints, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        self.check_difficulty(difficulty, 1, self.config.num_windows)
        keys, values = self._pairs(seed, indices, split)
        place = self._places_asked(seed, indices, split, difficulty)
        batch, num_queries = place.shape
        context = np.stack([keys, self.config.num_keys + values], axis=2).reshape(batch, -1)
        queries = np.take_along_axis(keys, place, axis=1)
        answers = self.config.num_keys + np.take_along_axis(values, place, axis=1)
        num_asked = num_queries if difficulty is None else min(num_queries, self.config.pairs_per_window)

        ids = np.concatenate([context, queries], axis=1)
        asked = slice(self.config.context_tokens, self.config.context_tokens + num_asked)
        targets = np.zeros_like(ids)
        targets[:, asked] = answers[:, :num_asked]
        loss_mask = np.zeros(ids.shape, dtype=bool)
        loss_mask[:, asked] = True
        return Examples(ids, targets, loss_mask, np.ones_like(loss_mask), np.full(batch, difficulty or 0))

    def score(self, predictions: Ints, nll: Floats, examples: Examples) -> dict[str, Floats]:
        """``exact_accuracy``: fraction of the queries at the distance asked for that are answered right."""
        right = (predictions == examples.targets) & examples.loss_mask
        return {"exact_accuracy": right.sum(axis=1) / examples.loss_mask.sum(axis=1)}

    def _pairs(self, seed: int, indices: Ints, split: Split) -> tuple[Ints, Ints]:
        """Keys and values, both [B, num_pairs], drawn until their set belongs to the split."""
        count, num_keys = self.config.num_pairs, self.config.num_keys
        keys = np.zeros((len(indices), count), dtype=np.int64)
        values = np.zeros_like(keys)
        rows = np.arange(len(indices))
        attempt = 0
        while len(rows):
            stream, drawn = f"recall/{split}/{attempt}", indices[rows]
            sizes = np.full(len(rows), num_keys)
            keys[rows] = random_order(sizes, seed, f"{stream}/keys", drawn, num_keys)[:, :count]
            values[rows] = random_below(self.config.num_values, seed, f"{stream}/values", drawn, count)
            rows = rows[~in_split(_hash(keys[rows], values[rows]), split)]
            attempt += 1
        return keys, values

    def _places_asked(self, seed: int, indices: Ints, split: Split, distance: int | None) -> Ints:
        """Places of the pairs asked for, [B, num_queries], those at the distance first."""
        count, per_window = self.config.num_pairs, self.config.pairs_per_window
        turns = random_bits(seed, f"recall/{split}/queries", indices, count) >> np.uint64(1)
        if distance is not None:
            is_elsewhere = np.arange(count) // per_window != self.config.num_windows - distance
            turns[:, is_elsewhere] += np.uint64(2**63)
        return np.argsort(turns, axis=1, kind="stable")[:, : self.config.num_queries]


def _hash(keys: Ints, values: Ints) -> Bits:
    """A hash of the set of pairs, [B]: a sum does not depend on their order."""
    pairs = content_hash(keys.view(np.uint64), values.view(np.uint64))
    return content_hash(pairs.sum(axis=1, dtype=np.uint64))
