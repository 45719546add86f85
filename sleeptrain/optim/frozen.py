"""Which weights a run leaves as they are (``optim.frozen``)."""

import fnmatch
from collections.abc import Collection, Sequence

from sleeptrain.schema import ConfigError


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether the last pattern that fits the name is one without a leading ``!``.

    >>> [is_frozen(name, ("*", "!stack.blocks.4.*")) for name in ("embed.weight", "stack.blocks.4.A_log")]
    [True, False]
    """
    fitting = [p for p in patterns if fnmatch.fnmatchcase(name, p.removeprefix("!"))]
    return bool(fitting) and not fitting[-1].startswith("!")


def check_frozen(names: Collection[str], patterns: Sequence[str]) -> None:
    """Raises ConfigError for a pattern that fits none of the ``names``, and where nothing is left to
    train."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern.removeprefix("!")):
            raise ConfigError(f"optim.frozen={pattern!r} names no weight of this model; correct it")
    if all(is_frozen(name, patterns) for name in names):
        raise ConfigError(
            f"optim.frozen={list(patterns)} leaves no weight to train; take some out with a pattern that "
            "begins with !, as in [*, !stack.blocks.4.*]"
        )
