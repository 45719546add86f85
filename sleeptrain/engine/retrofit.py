"""What is new in a model that starts from another one's weights, and what of it is trained: by the settings
alone, so that it is known before any checkpoint is opened."""

import fnmatch
import math
from collections.abc import Callable
from typing import NamedTuple

from sleeptrain.config import Config
from sleeptrain.optim.patterns import check_patterns, fits
from sleeptrain.parallel.layout import logical_shapes
from sleeptrain.schema import ConfigError


class Budget(NamedTuple):
    """Numbers of weights: of the whole model, of those that ``run.init_new`` names, of those that learn."""

    total: int
    new: int
    trained: int


def budget(config: Config, vocab_size: int) -> Budget:
    """Tied weights count once."""
    shapes, frozen = logical_shapes(config, vocab_size), config.optim.frozen

    def count(is_in: Callable[[str], bool]) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if is_in(name))

    return Budget(
        count(lambda name: True),
        count(lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in config.run.init_new)),
        count(lambda name: not fits(name, frozen)),
    )


def check_budget(config: Config, vocab_size: int) -> None:
    """Raises ConfigError where patterns of ``optim`` fit nothing or leave nothing, and where more is new than
    ``run.max_new_fraction`` allows."""
    check_patterns(logical_shapes(config, vocab_size).keys(), config.optim)
    found, most = budget(config, vocab_size), config.run.max_new_fraction
    if found.new > most * found.total:
        raise ConfigError(
            f"run.init_new names {found.new:,} of {found.total:,} weights, {found.new / found.total:.1%} of "
            f"the model, and run.max_new_fraction={most:g}; insert fewer or smaller blocks, or raise it"
        )


def budget_lines(config: Config, vocab_size: int) -> list[str]:
    """A line for what is new, and one for what is trained, where not all weights are."""
    found, lines = budget(config, vocab_size), []
    for number, what in ((found.new, "new: run.init_new"), (found.trained, "trained: optim.frozen")):
        if 0 < number < found.total:
            share = f"{number / found.total:.1%}"
            lines.append(f"{number:,} of {found.total:,} weights ({share}) are {what}")
    return lines
