"""Which rank hangs: what each tells of itself in the store where they met, and who stands out.

Each leaves a sign of life there every second. The first that makes no progress for too long raises the alarm;
then all tell where they are, and the one that raised it names those that the others wait for.
"""

import json
import os
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sleeptrain.parallel.failure import First, first_failure, own_store, tell

SILENCE = "it is stopped, or in a call that keeps the interpreter to itself, or its machine is gone"
POLL_SECONDS = 1.0
GATHER_SECONDS = 2.0  # for all to tell where they are
FAREWELL_SECONDS = 1.0  # for all to hear who hangs
ANSWER_SECONDS = 3.5  # for both
COLLECTIVES = re.compile(r"[/\\](torch[/\\]distributed|megatron[/\\]core|deepspeed)[/\\]")
PACKAGE = Path(__file__).parents[1]
LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class Report(NamedTuple):
    """Of one rank: when it last made progress and what it does since; where it is, and whether it waits for
    others there; how many operations of each process group it has begun."""

    since: str
    idle_seconds: float
    doing: str
    where: str
    is_waiting: bool
    sequences: dict[str, int]

    def __str__(self) -> str:
        waiting = ", waiting for others" if self.is_waiting else ""
        return (
            f"no progress since {self.since} ({self.idle_seconds:.0f} s), {self.doing}, in "
            f"{self.where}{waiting}"
        )


class Pulse:
    """When the thread that made it last made progress, and what it does since."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.note("at the start")

    def note(self, doing: str) -> None:
        """There is progress: what comes now is ``doing``. Costs a look at the clock."""
        self._last = time.monotonic(), doing

    @property
    def doing(self) -> str:
        return self._last[1]

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self._last[0]

    def report(self) -> Report:
        idle_seconds = self.idle_seconds
        frame = _frame_of(self._thread)
        return Report(
            _clock_time(time.time() - idle_seconds),
            idle_seconds,
            self.doing,
            _place(frame),
            bool(COLLECTIVES.search(frame.f_code.co_filename)),
            _sequences(),
        )


def culprits(reports: dict[int, Report]) -> list[int]:
    """The ranks that the others wait for.

    They are outside of collectives, and have begun fewer of them than others of a group. On NCCL every rank
    may look as if it were outside, since it waits for its device; and stages of a pipeline may have begun
    fewer by design. So where no rank shows both, one sign is enough.
    """
    newest: dict[str, int] = {}
    for report in reports.values():
        for group, number in report.sequences.items():
            newest[group] = max(number, newest.get(group, number))
    outside = {rank for rank, report in reports.items() if not report.is_waiting}
    behind = {
        rank
        for rank, report in reports.items()
        if any(number < newest[group] for group, number in report.sequences.items())
    }
    return sorted(outside & behind or outside or behind or reports)


def sentence_of(findings: dict[int, str]) -> str:
    """One for all ranks found."""
    if len(findings) == 1:
        return "".join(f"rank {rank} hangs: {text}" for rank, text in findings.items())
    ranks = ", ".join(map(str, findings))
    return f"ranks {ranks} hang: " + "; ".join(f"rank {rank}: {text}" for rank, text in findings.items())


class RollCall:
    """A thread that gives signs of life of this rank until there is an ``alarm``, raised here or elsewhere.
    Then it finds out, with those of the other ranks, who hangs.

    It may block for ever: when the process that holds the store is stopped.
    """

    def __init__(
        self, rank: int, world_size: int, pulse: Pulse, alarm: threading.Event, stale_seconds: float
    ) -> None:
        self.rank, self.world_size, self.pulse, self.alarm = rank, world_size, pulse, alarm
        self.stale_seconds = stale_seconds  # the clocks of two machines differ by less
        self._store, self._over = own_store(), False
        self._first: First | None = None
        self._thread = threading.Thread(target=self._run, name="roll call", daemon=True)
        self._thread.start()

    def sentence(self) -> str:
        """Who hangs: what all have agreed on after an alarm, or what this rank knows alone."""
        self._thread.join(ANSWER_SECONDS)
        if self._first:
            return self._first.sentence
        own, holder = self.pulse.report(), holder_of_store()
        if self._thread.is_alive():
            store = "the store where the ranks met, which it holds, gives no answer to rank"
            return f"{holder} hangs: {store} {self.rank} ({own})"
        return f"{sentence_of({self.rank: str(own)})}; {holder}, which held the store, is gone"

    def close(self) -> None:
        """Ends the thread without an alarm."""
        self._over = True
        self.alarm.set()
        self._thread.join(POLL_SECONDS)

    def _run(self) -> None:
        with suppress(Exception):  # the store may be gone with the process that held it
            while not self.alarm.is_set():
                self._store.set(f"beat/{self.rank}", json.dumps([time.time(), self.pulse.doing]))
                if self._store.check(["alarm"]):
                    self.alarm.set()
                self.alarm.wait(POLL_SECONDS)
            if not self._over:
                self._agree()

    def _agree(self) -> None:
        self._store.set(f"report/{self.rank}", json.dumps(self.pulse.report()))
        self._store.add("reports", 1)
        if self._store.compare_set("alarm", "", str(self.rank)) == str(self.rank).encode():
            _until(lambda: self._store.add("reports", 0) == self.world_size, GATHER_SECONDS)
            findings = self._findings()
            tell(self._store, min(findings), sentence_of(findings))
        _until(lambda: first_failure(self._store) is not None, ANSWER_SECONDS)
        self._first = first_failure(self._store)
        self._store.add("heard", 1)  # the store may end with this process
        _until(lambda: self._store.add("heard", 0) >= self._store.add("reports", 0), FAREWELL_SECONDS)

    def _findings(self) -> dict[int, str]:
        """What is wrong with each rank that hangs."""
        reports = {rank: Report(*told) for rank, told in self._told("report")}
        beats = dict(self._told("beat"))
        silent = {}
        for rank in set(range(self.world_size)) - reports.keys():
            sent, doing = beats.get(rank, (0.0, "at the start"))
            if time.time() - sent > self.stale_seconds:
                since = _clock_time(sent) if sent else "it started"
                silent[rank] = f"no sign of life since {since}, {doing} ({SILENCE})"
        return silent or {rank: str(reports[rank]) for rank in culprits(reports)}

    def _told(self, what: str) -> Iterator[tuple[int, Any]]:
        for rank in range(self.world_size):
            if self._store.check([f"{what}/{rank}"]):  # to get what is missing would be to wait for it
                yield rank, json.loads(self._store.get(f"{what}/{rank}"))


def holder_of_store() -> str:
    """Who holds the store where the ranks met."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def flight_record() -> dict[str, Any]:
    """What torch recorded of the latest collectives, by recorder: that of NCCL, and that of other
    backends."""
    found = {}
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # which exist depends on the build
        with suppress(AttributeError, RuntimeError, ValueError):
            found[name.split("_")[2]] = json.loads(getattr(torch._C._distributed_c10d, name)())
    return found


def _frame_of(thread: int) -> FrameType:
    return sys._current_frames()[thread]


def _place(frame: FrameType) -> str:
    """Its innermost line that is of no library, else the innermost."""
    outward: FrameType | None = frame
    while outward is not None:
        path = outward.f_code.co_filename
        if path.startswith(f"{PACKAGE}{os.sep}") or not path.startswith((*LIBRARIES, "<frozen")):
            frame = outward
            break
        outward = outward.f_back
    path = frame.f_code.co_filename.removeprefix(f"{PACKAGE.parent}{os.sep}")
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def _sequences() -> dict[str, int]:
    found: dict[str, int] = {}
    if dist.is_initialized():
        groups: dict[Any, str] = dict(dist.distributed_c10d._world.pg_names)
        for group, name in groups.items():
            with suppress(RuntimeError):  # not every backend counts
                found[name] = group._get_sequence_number_for_group()
    return found


def _clock_time(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _until(condition: Callable[[], bool], at_most_seconds: float) -> None:
    deadline = time.monotonic() + at_most_seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
