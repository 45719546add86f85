"""Checks that sections of settings share."""

from sleeptrain.schema import ConfigError


def require_positive(section: str, config: object, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{section}.{name}={getattr(config, name)} must be at least 1")


def require_in(
    section: str, config: object, names: tuple[str, ...], low: float, high: float | None = None
) -> None:
    for name in names:
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            allowed = f"lie in {low}..{high}" if high is not None else f"be at least {low}"
            raise ConfigError(f"{section}.{name}={value} must {allowed}")
