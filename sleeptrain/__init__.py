"""Language models that sleep: ``Session`` reads and writes with one; ``python -m sleeptrain.pretrain`` trains
one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleeptrain.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:
    """Imports what it needs only when it is asked for: a run starts sooner."""
    if name == "Session":
        from sleeptrain.session import Session

        return Session
    raise AttributeError(f"module 'sleeptrain' has no attribute {name!r}")
