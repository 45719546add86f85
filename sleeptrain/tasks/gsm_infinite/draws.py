"""Random choices of one problem, one after the other, from a state of their own."""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Equal ``bits``, equal choices, in every version of Python: it promises to keep the numbers of
    ``Random.random``, of which alone they are made."""

    def __init__(self, bits: int) -> None:
        self._uniform = Random(bits).random

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def between(self, least: int, most: int) -> int:
        """Even in ``least..most``."""
        return least + int(self._uniform() * (most - least + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self._uniform() * len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        rest = list(items)
        return [self.pop(rest) for _ in range(len(rest))]

    def pop(self, items: list[T]) -> T:
        """Takes one out; the order of the rest changes."""
        place = int(self._uniform() * len(items))
        items[place], items[-1] = items[-1], items[place]
        return items.pop()
