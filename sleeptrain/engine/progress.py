"""What a person sees of a run: a bar with the time left on a terminal, plain lines in a log file."""

import sys
import time
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """``update`` after every step, ``line`` for what should stay readable."""

    def __init__(self, total_steps: int, done_steps: int) -> None:
        self._total, self._first, self._start = total_steps, done_steps, time.monotonic()
        self._bar = (
            tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True, smoothing=0.05)
            if sys.stderr.isatty()
            else None
        )

    def update(self, step: int, figures: dict[str, str] | None = None) -> None:
        """``figures`` come with a logged step: beside the bar, or as a line of their own where there is no
        terminal."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if figures:
                self._bar.set_postfix(figures, refresh=False)
        elif figures:
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            self.line(f"step {step}/{self._total}  {shown}  left {self._left(step)}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        pace = (time.monotonic() - self._start) / max(1, step - self._first)
        return str(timedelta(seconds=round(pace * (self._total - step))))
