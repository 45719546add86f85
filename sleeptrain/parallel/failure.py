"""When one process fails, all end within seconds, and each knows which failed first and why.

A process that waits in a collective for one that is gone would wait for the time limit of the group, ten
minutes by default. So whoever fails says so in the store where the processes met, and a thread of each
looks there.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator

import torch.distributed as dist

from sleeptrain.schema import ConfigError, RunError

KEY = "sleeptrain/first_failure"
POLL_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for a process to end by its own error, once another has failed
EXIT_FAILED = 1


@contextlib.contextmanager
def failing_together(rank: int) -> Iterator[None]:
    """Around the work of a process group. A failure here ends the others; a failure elsewhere ends this
    one with exit code 1 and a line that names the rank and its error."""
    store = dist.PrefixStore(KEY, dist.distributed_c10d._get_default_store())
    done = threading.Event()
    threading.Thread(target=_watch, args=(store, rank, done), daemon=True).start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = _text_of(error)
        with contextlib.suppress(Exception):  # the store may be gone with the process that held it
            store.compare_set("told", "", f"{rank} {text}")
        done.set()
        first = _first(store)
        if first is not None and first[0] != rank and first[1] != text:
            _say(*first)  # ours is a consequence, most likely a lost connection
            raise RunError(f"rank {rank} ended because rank {first[0]} failed") from error
        raise
    finally:
        done.set()


def _text_of(error: BaseException) -> str:
    if isinstance(error, (ConfigError, RunError)):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def _first(store: dist.Store) -> tuple[int, str] | None:
    with contextlib.suppress(Exception):
        if store.check(["told"]):
            rank, _, text = store.get("told").decode().partition(" ")
            return int(rank), text
    return None


def _watch(store: dist.Store, rank: int, done: threading.Event) -> None:
    while not done.wait(POLL_SECONDS):
        first = _first(store)
        if first is not None and first[0] != rank and not done.wait(GRACE_SECONDS):
            _say(*first)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)


def _say(rank: int, text: str) -> None:
    print(f"error: rank {rank} failed first: {text}", file=sys.stderr, flush=True)
