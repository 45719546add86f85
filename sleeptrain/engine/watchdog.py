"""Ends a run that makes no progress: stacks on the disk, one line that names the rank and the place, exit 1.

A thread looks at the clock once per second. Behind it stands a timer in C: where a call keeps the interpreter
to itself, no thread of Python runs, and the timer writes the stacks and ends the process.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path

from sleeptrain.parallel.failure import EXIT_FAILED, found_hanging
from sleeptrain.parallel.roll_call import Pulse, RollCall, flight_record, sentence_of

POLL_SECONDS = 1.0
LAST_SECONDS = 4.0  # after the timeout the timer ends the process, whatever it does


class Watchdog:
    """Context manager: ends the process when the thread that made it calls ``note`` no more for
    ``timeout_seconds`` (0: never)."""

    def __init__(self, timeout_seconds: int, logs_dir: Path, rank: int) -> None:
        self.timeout_seconds, self.logs_dir, self.rank = timeout_seconds, logs_dir, rank
        self._pulse, self._alarm, self._over = Pulse(), threading.Event(), False
        self._roll_call: RollCall | None = None

    def note(self, doing: str) -> None:
        """There is progress: what comes now is ``doing``."""
        self._pulse.note(doing)

    def meet(self, world_size: int) -> None:
        """Once the processes of the run have met: from here on they find out together who hangs."""
        if self.timeout_seconds and world_size > 1:
            stale_seconds = self.timeout_seconds / 2
            self._roll_call = RollCall(self.rank, world_size, self._pulse, self._alarm, stale_seconds)

    def __enter__(self) -> "Watchdog":
        if self.timeout_seconds:
            path = self.logs_dir / f"stacks_rank_{self.rank}.txt"
            self._made_file = not path.exists()
            self._stacks = path.open("a")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.timeout_seconds:
            return
        self._over = True
        if self._roll_call:
            self._roll_call.close()  # first: it takes an alarm for one while it is open
        self._alarm.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        path = Path(self._stacks.name)
        # Who is refused, since another process trains in this folder, must not take that one's file away.
        if (kind is None or self._made_file) and path.exists() and not path.stat().st_size:
            path.unlink()

    def _watch(self) -> None:
        while not self._alarm.is_set():
            left_seconds = self.timeout_seconds - self._pulse.idle_seconds
            if left_seconds <= 0:
                self._alarm.set()
                break
            self._set_timer(left_seconds + LAST_SECONDS)
            self._alarm.wait(min(POLL_SECONDS, left_seconds))
        if not self._over:
            self._end()

    def _end(self) -> None:
        """Never returns."""
        try:
            found_hanging.set()
            self._set_timer(LAST_SECONDS)
            own = self._pulse.report()
            self._stacks.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}: {own}\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks)
            sentence = self._roll_call.sentence() if self._roll_call else sentence_of({self.rank: str(own)})
            print(
                f"error: {sentence}; all stacks are in {self.logs_dir}/stacks_rank_*.txt; raise "
                f"run.hang_timeout_seconds={self.timeout_seconds} if this was slow and not stuck",
                file=sys.stderr,
            )
            sys.stdout.flush()
            sys.stderr.flush()
            if self._roll_call:
                record = self.logs_dir / f"flight_recorder_rank_{self.rank}.json"
                record.write_text(json.dumps(flight_record()))
        finally:
            os._exit(EXIT_FAILED)

    def _set_timer(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)
