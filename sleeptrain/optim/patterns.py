"""Weights chosen by patterns of their names (``optim.frozen``, ``optim.scaled``)."""

import fnmatch
from collections.abc import Collection, Sequence

from sleeptrain.config import OptimConfig
from sleeptrain.schema import ConfigError


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether the last pattern that fits the name is one without a leading ``!``.

    >>> [fits(name, ("*", "!stack.blocks.4.*")) for name in ("embed.weight", "stack.blocks.4.mixer.A_log")]
    [True, False]
    """
    fitting = [p for p in patterns if fnmatch.fnmatchcase(name, p.removeprefix("!"))]
    return bool(fitting) and not fitting[-1].startswith("!")


def rate_factor(name: str, config: OptimConfig) -> float:
    """On the learning rates of a weight: 0 where it is frozen, ``scaled_factor`` where it is scaled, else
    1."""
    if fits(name, config.frozen):
        return 0.0
    return config.scaled_factor if fits(name, config.scaled) else 1.0


def check_patterns(names: Collection[str], config: OptimConfig) -> None:
    """Raises ConfigError for a pattern that fits none of the ``names``, and where nothing is left to
    train."""
    for setting in ("frozen", "scaled"):
        for pattern in getattr(config, setting):
            if not fnmatch.filter(names, pattern.removeprefix("!")):
                raise ConfigError(f"optim.{setting}={pattern!r} names no weight of this model; correct it")
    if all(fits(name, config.frozen) for name in names):
        raise ConfigError(
            f"optim.frozen={list(config.frozen)} leaves no weight to train; take some out with a pattern "
            "that begins with !, as in ['*','!stack.blocks.4.*']"
        )
