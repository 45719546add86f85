"""When one process fails, all end within seconds, and each knows which failed first and why.

A process that waits in a collective for one that is gone would wait for the time limit of the group, ten
minutes by default. So whoever fails says so in the store where the processes met, and a thread of each
looks there.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist

from sleeptrain.schema import ConfigError, RunError

KEY = "sleeptrain/first_failure"
POLL_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for a process to end by its own error, once another has failed
EXIT_FAILED = 1

found_hanging = threading.Event()  # the watchdog of this process is about to end it, and says why


class First(NamedTuple):
    """The rank that failed first, and the sentence for it."""

    rank: int
    sentence: str


@contextlib.contextmanager
def failing_together(rank: int) -> Iterator[None]:
    """Around the work of a process group. A failure here ends the others; a failure elsewhere ends this
    one with exit code 1 and a line that names the rank and its error."""
    store = own_store()
    done = threading.Event()
    threading.Thread(target=_watch, args=(own_store(), rank, done), daemon=True).start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if found_hanging.is_set():  # ours is a consequence: another rank ended a moment earlier
            time.sleep(GRACE_SECONDS)
        sentence = f"rank {rank} failed first: {_text_of(error)}"
        with contextlib.suppress(Exception):  # the store may be gone with the process that held it
            tell(store, rank, sentence)
        done.set()
        first = first_failure(store)
        if first is not None and first.rank != rank and not first.sentence.endswith(_text_of(error)):
            _say(first)  # ours is a consequence, most likely a lost connection
            raise RunError(f"rank {rank} ended because rank {first.rank} failed") from error
        raise
    finally:
        done.set()


def own_store() -> dist.Store:
    """A connection to the store where the processes met that blocks no other thread."""
    return dist.PrefixStore(KEY, dist.distributed_c10d._get_default_store()).clone()  # type: ignore


def tell(store: dist.Store, rank: int, sentence: str) -> None:
    """That a rank failed; the first one told stays."""
    store.compare_set("told", "", f"{rank} {sentence}")


def first_failure(store: dist.Store) -> First | None:
    """The one that was told first, if any."""
    with contextlib.suppress(Exception):
        if store.check(["told"]):
            rank, _, sentence = store.get("told").decode().partition(" ")
            return First(int(rank), sentence)
    return None


def _text_of(error: BaseException) -> str:
    if isinstance(error, (ConfigError, RunError)):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def _watch(store: dist.Store, rank: int, done: threading.Event) -> None:
    while not done.wait(POLL_SECONDS):
        first = first_failure(store)
        if first is not None and first.rank != rank and not done.wait(GRACE_SECONDS):
            _say(first)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)


def _say(first: First) -> None:
    print(f"error: {first.sentence}", file=sys.stderr, flush=True)
