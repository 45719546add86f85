"""What the benchmarks share; no figure of its own.

Sides are timed in turn (A B C A B C ...), so that a slow minute of the machine meets all of them. A ratio is
the median over rounds of the wall times; beside it stands the ratio of the least CPU times, which other
processes disturb less.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

MISSING_PEER = 2  # exit code

Side = TypeVar("Side")


class Seconds(NamedTuple):
    """Wall and CPU time of this process."""

    wall: float
    cpu: float


class Ratio(NamedTuple):
    """One side over another: median over rounds of wall times, and least CPU time over least CPU time."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.3f} (cpu {self.cpu:.3f})"


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """``--quick`` and ``--rounds`` (at least 1), and ``doc`` as the help text."""
    summary, _, details = doc.partition("\n\n")
    result = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--quick", action="store_true", help="tiny sizes: does it run? its figures mean nothing"
    )
    result.add_argument("--rounds", type=_count, default=rounds, help=f"timed rounds (default {rounds})")
    return result


def begin(packages: Sequence[str] = ()) -> None:
    """One thread; prints the command, the machine and the versions."""
    torch.set_num_threads(1)
    print("command:", shlex.join(["python", *sys.argv]))
    versions = "".join(f", {name} {importlib.metadata.version(name)}" for name in packages)
    print(f"machine: {_processor()}, one thread; torch {torch.__version__}{versions}")


def require(modules: Iterable[str]) -> None:
    """Exits with MISSING_PEER and one sentence unless all of these top-level modules are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'{", ".join(missing)} not installed; pip install -e ".[bench]" brings the peers', file=sys.stderr
        )
        sys.exit(MISSING_PEER)


def failure(error: Exception) -> str:
    """What a library or its compiler said, in one line of 300 letters at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def since(start: Seconds) -> Seconds:
    end = now()
    return Seconds(end.wall - start.wall, end.cpu - start.cpu)


def timed(call: Callable[[], object]) -> Seconds:
    """The time of one call; what it returns is freed within it. Python's search for garbage waits until
    after, as in ``timeit`` and in the trainer."""
    gc.disable()
    start = now()
    call()
    seconds = since(start)
    gc.enable()
    gc.collect()
    return seconds


def interleaved(calls: dict[Side, Callable[[], object]], rounds: int) -> dict[Side, list[Seconds]]:
    """Each call once unmeasured, then ``rounds`` rounds of all calls in turn."""
    for call in calls.values():
        call()
    times: dict[Side, list[Seconds]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return times


def ratio(over: Sequence[Seconds], under: Sequence[Seconds]) -> Ratio:
    """Time of ``over`` in units of ``under``, rounds paired."""
    wall = statistics.median(a.wall / b.wall for a, b in zip(over, under, strict=True))
    return Ratio(wall, least_cpu(over) / least_cpu(under))


def median_wall(times: Sequence[Seconds]) -> float:
    return statistics.median(t.wall for t in times)


def least_cpu(times: Sequence[Seconds]) -> float:
    return min(t.cpu for t in times)


def geometric_mean(values: Sequence[Ratio]) -> Ratio:
    return Ratio(*(math.exp(statistics.fmean(map(math.log, column))) for column in zip(*values)))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares."""
    return statistics.linear_regression(xs, ys).slope


def show(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heading, *rows)]
    for row in (heading, *rows):
        print(
            "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths))).rstrip()
        )


def judge(name: str, value: float, at_most: float = math.inf, at_least: float = -math.inf) -> None:
    """One line, PASS or FAIL against a target; speed never decides the exit code."""
    bound = f"at most {at_most}" if at_most < math.inf else f"at least {at_least}"
    print(f"{'PASS' if at_least <= value <= at_most else 'FAIL'}  {name}: {value:.3f}, target {bound}")


def peak_mib(script: str, arguments: Sequence[str]) -> float:
    """Runs a script that ends in ``print_peak`` in a fresh process; its peak resident memory in MiB."""
    command = [sys.executable, script, *arguments]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def print_peak() -> None:
    """This process' own peak in MiB. Linux: ``ru_maxrss`` would inherit the parent's peak, VmHWM does not."""
    status = Path("/proc/self/status").read_text().split()
    print(int(status[status.index("VmHWM:") + 1]) / 2**10)


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process (glibc), as it does with CUDA tensors.

    Otherwise a step that needs much of it is charged for the system handing it out anew each time.
    """
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """From now on freed blocks from 64 KiB up go back to the system (glibc): a peak is what was alive."""
    _mallopt(_MMAP_THRESHOLD, 2**16)
    _mallopt(_MMAP_MAX, 2**20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of <malloc.h>


def _mallopt(option: int, value: int) -> None:
    if not ctypes.CDLL(None).mallopt(option, value):
        raise OSError(f"mallopt refused {value} for option {option}")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )
