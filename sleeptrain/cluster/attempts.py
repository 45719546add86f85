"""What the driver and the workers of a run on a cluster tell each other: attempts, their ends, stops.

An attempt is one start of all processes. A failure of the program that comes again at the same step would
come for ever, so it ends the run; a machine that died does not. Plain Python: ``ray_driver.py`` makes it an
actor.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sleeptrain.engine.resilience import EXIT_CONFIG, EXIT_REQUEUE

Order = Literal["go on", "stop", "end"]  # stop: save first; end: at once

MOST_BACKOFF_SECONDS = 60.0
GRACE_SECONDS = 8.0  # for the processes to end by themselves once one has failed (parallel/failure.py)


class Orders(NamedTuple):
    """For a worker at the start of an attempt: whether to train at all, and after which pause."""

    shall_train: bool
    pause_seconds: float


class Outcome(NamedTuple):
    """Of the run: the exit code of the driver, and what there is to say."""

    code: int
    sentence: str


@dataclass
class Attempt:
    """``codes`` are the exit codes by rank; negative: the signal that killed it."""

    name: str
    world_size: int
    started: float
    first_step: int | None = None
    step: int | None = None
    codes: dict[int, int] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    first_failure: float | None = None

    @property
    def has_ended(self) -> bool:
        return len(self.codes) == self.world_size

    @property
    def is_well(self) -> bool:
        return self.has_ended and all(code in (0, EXIT_REQUEUE) for code in self.codes.values())

    @property
    def is_program_failure(self) -> bool:
        """Every process ended by itself, and some with an error: no machine and no process was killed."""
        return self.has_ended and min(self.codes.values()) >= 0 and not self.is_well

    @property
    def has_progressed(self) -> bool:
        return self.step is not None and self.first_step is not None and self.step > self.first_step


class Attempts:
    """All attempts of a run. Every method returns at once."""

    def __init__(self) -> None:
        self._attempts: list[Attempt] = []
        self._orders = Orders(True, 0.0)
        self._stop_requested = False
        self._broken: tuple[float, str] | None = None  # since when, and why
        self._row: dict[str, Any] = {}

    def begin(self, name: str, world_size: int) -> Orders:
        """A worker asks; the first of an attempt begins it."""
        if not self._attempts or self._attempts[-1].name != name:
            self._orders = self._judge()
            self._attempts.append(Attempt(name, world_size, time.monotonic()))
        return self._orders

    def beat(self, name: str, row: dict[str, Any] | None = None) -> Order:
        """A worker is alive and asks what to do; rank 0 brings the newest row of the metrics."""
        attempt = self._attempts[-1]
        if row and "step" in row and name == attempt.name:
            attempt.step = int(row["step"])
            attempt.first_step = attempt.step if attempt.first_step is None else attempt.first_step
            self._row = row
        failed = attempt.first_failure or (self._broken[0] if self._broken else None)
        if name != attempt.name or (failed is not None and time.monotonic() > failed + GRACE_SECONDS):
            return "end"
        return "stop" if self._stop_requested or self._broken else "go on"

    def end(self, name: str, rank: int, code: int, sentence: str = "") -> None:
        """The process of a rank ended."""
        attempt = self._attempts[-1]
        if name != attempt.name:
            return
        attempt.codes[rank] = code
        if code not in (0, EXIT_REQUEUE):
            attempt.first_failure = attempt.first_failure or time.monotonic()
            attempt.sentences.append(sentence)

    def all_ended(self, name: str) -> bool:
        """Of an attempt that is the newest."""
        return self._attempts[-1].name != name or self._attempts[-1].has_ended

    def request_stop(self) -> None:
        """All save and leave."""
        self._stop_requested = True

    def break_off(self, sentence: str) -> None:
        """The run cannot go on: all save and leave, and those who cannot are ended."""
        self._broken = self._broken or (time.monotonic(), sentence)

    def status(self) -> dict[str, Any]:
        """For people: how often it was started, with how many processes, the newest row of the metrics."""
        world_size = self._attempts[-1].world_size if self._attempts else 0
        return {"starts": len(self._attempts), "processes": world_size} | self._row

    def outcome(self) -> Outcome:
        """Once no worker is left."""
        if self._broken:
            return Outcome(1, self._broken[1])
        if self._attempts and self._attempts[-1].is_well:
            return Outcome(max(self._attempts[-1].codes.values()), "")
        failed = [attempt for attempt in self._attempts if attempt.codes or attempt.first_failure]
        if not failed:
            return Outcome(1, "no worker of the run has ended in a way that says why")
        last, why = failed[-1], next((s for s in failed[-1].sentences if s), "a process was killed")
        if EXIT_CONFIG in last.codes.values():
            return Outcome(EXIT_CONFIG, why)
        if self._repeats(failed):
            return Outcome(1, f"it failed twice at the same place, after step {last.step}: {why}")
        return Outcome(1, f"it failed after {len(self._attempts)} starts: {why}")

    def _judge(self) -> Orders:
        """What the ends of the attempts so far mean for the next."""
        if not self._attempts:
            return Orders(True, 0.0)
        last = self._attempts[-1]
        if (
            EXIT_CONFIG in last.codes.values()
            or self._repeats(self._attempts)
            or self._stop_requested
            or self._broken
        ):
            return Orders(False, 0.0)
        in_vain = 0
        for attempt in reversed(self._attempts):
            if attempt.has_progressed:
                break
            in_vain += 1
        return Orders(True, min(2.0**in_vain - 1, MOST_BACKOFF_SECONDS))

    @staticmethod
    def _repeats(attempts: list[Attempt]) -> bool:
        """Whether the last two failed by themselves after the same step."""
        two = attempts[-2:]
        return len(two) == 2 and all(a.is_program_failure for a in two) and two[0].step == two[1].step
