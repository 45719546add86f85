"""Automaton: t steps of a one-dimensional rule on strings that were read and evicted (paper section 4.1)."""

from typing import get_args

import numpy as np

from sleeptrain.config import Rule110Config
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.base import Bits, Examples, Floats, Ints, Split, Task
from sleeptrain.tasks.counter import content_hash, in_split, random_bits

_ENUMERABLE_WIDTH = 16  # wider rings have too many strings for a split to be empty

_MOST_STEPS = 10**6


class Rule110(Task):
    """``num_strings`` random strings, one per window of ``width`` tokens, then one answer slot for each.

    Slot i holds the query token 2+i; its target, in place, is the first bit of string i after ``steps`` steps
    on a periodic ring. Difficulty: steps. Splits: each string on its own.

    One step on a ring of 8: the first bit of 00000101 has left neighbour 1 (the last bit), self 0 and right
    neighbour 0, number 4, and bit 4 of 110 is 0. That of 10110001 has 1, 1, 0, number 6, and bit 6 is 1.

    >>> task = Rule110(Rule110Config(width=8, num_strings=2, steps=1))
    >>> example = task.example(seed=0, index=3)
    >>> example.ids.tolist()
    [[0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 2, 3]]
    >>> example.targets[:, -2:].tolist()
    [[0, 1]]
    """

    config: Rule110Config
    difficulty_name = "steps"

    def __init__(self, config: Rule110Config) -> None:
        super().__init__(config)
        self.vocab_size = 2 + config.num_strings
        self.difficulties = (config.steps,)
        if config.width <= _ENUMERABLE_WIDTH:
            hashes = self._hash(np.arange(2**config.width, dtype=np.uint64))
            for split in get_args(Split):
                if not in_split(hashes, split).any():
                    raise ConfigError(
                        f"task.width={config.width} leaves no string for the {split} split; use 8 or more"
                    )

    def examples(
        self, seed: int, indices: Ints, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        self.check_difficulty(difficulty, 0, _MOST_STEPS)
        steps = self.config.steps if difficulty is None else difficulty
        num_strings, width = self.config.num_strings, self.config.width
        strings = self._draw(seed, indices, split)
        bits = (strings[:, :, None] >> np.arange(width, dtype=np.uint64)) & 1
        answers = evolve(strings, width, self.config.rule_number, steps) & 1

        batch = len(indices)
        ids = np.empty((batch, self.sequence_tokens), dtype=np.int64)
        ids[:, :-num_strings] = bits.reshape(batch, num_strings * width)
        ids[:, -num_strings:] = np.arange(2, 2 + num_strings)
        targets = np.zeros_like(ids)
        targets[:, -num_strings:] = answers
        loss_mask = np.zeros(ids.shape, dtype=bool)
        loss_mask[:, -num_strings:] = True
        return Examples(ids, targets, loss_mask, np.ones_like(loss_mask), np.full(batch, steps))

    def score(self, predictions: Ints, nll: Floats, examples: Examples) -> dict[str, Floats]:
        """``exact_accuracy``: whether all answers are right; ``answer_accuracy``: the fraction of them."""
        slots = slice(-self.config.num_strings, None)
        right = predictions[:, slots] == examples.targets[:, slots]
        return {"exact_accuracy": right.all(axis=1).astype(np.float64), "answer_accuracy": right.mean(axis=1)}

    def _draw(self, seed: int, indices: Ints, split: Split) -> Bits:
        """Packed strings [B, num_strings]: each the first of its candidates that is in the split."""
        shape = (len(indices), self.config.num_strings)
        strings = np.zeros(shape, dtype=np.uint64)
        missing = np.ones(shape, dtype=bool)
        attempt = 0
        while missing.any():
            rows = np.flatnonzero(missing.any(axis=1))
            stream = f"rule110/{split}/{attempt}"
            candidates = random_bits(seed, stream, indices[rows], shape[1]) >> np.uint64(
                64 - self.config.width
            )
            accepted = missing[rows] & in_split(self._hash(candidates), split)
            strings[rows] = np.where(accepted, candidates, strings[rows])
            missing[rows] &= ~accepted
            attempt += 1
        return strings

    def _hash(self, strings: Bits) -> Bits:
        return content_hash(self.config.width, strings)


def evolve(strings: Bits, width: int, rule_number: int, steps: int) -> Bits:
    """``steps`` steps of a Wolfram rule on periodic rings, any shape; bit j of a number is cell j.

    Cell j's new value is bit 4*left + 2*self + right of ``rule_number``, left being cell j-1.
    """
    ring = np.uint64(2**width - 1)
    for _ in range(steps):
        left = ((strings << 1) | (strings >> (width - 1))) & ring
        right = ((strings >> 1) | (strings << (width - 1))) & ring
        new = np.zeros_like(strings)
        for number in range(8):
            if rule_number >> number & 1:
                mismatch = ~left if number & 4 else left
                mismatch = mismatch | (~strings if number & 2 else strings)
                mismatch |= ~right if number & 1 else right
                new |= ring & ~mismatch
        strings = new
    return strings
