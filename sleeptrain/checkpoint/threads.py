"""Several threads for work that leaves the interpreter alone: copying, reading, checksums."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

NUM_CORES = os.cpu_count() or 1


def run_all(jobs: Iterable[Callable[[], object]], num_threads: int) -> None:
    """Does all jobs, in any order; raises the error of the first that failed, and does no more after it."""
    waiting = deque(jobs)

    def work(_: int) -> None:
        while waiting:
            try:
                job = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                job()
            except BaseException:
                waiting.clear()
                raise

    num_threads = min(num_threads, len(waiting))
    if num_threads <= 1:
        return work(0)
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(work, range(num_threads)):
            pass
    return None
