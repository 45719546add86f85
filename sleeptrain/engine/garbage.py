"""When Python looks for garbage in reference cycles: between two steps, never inside of one.

Inside a step the search walks over the thousands of tensors that the backward pass waits for, and finds
nothing; with many ranks all of them would wait for the one that searches.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_STEPS = 50


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with the number of each finished step; what lives at the start is left
    alone."""
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % EVERY_STEPS == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()
