"""How long a killed run is away: from the command to its first new step, and what the time goes to.

A quickstart run is killed (SIGKILL) some steps after a checkpoint and started again by the same command, each
round in a folder of its own. Its process tells when it has imported what it needs, when the checkpoint is
verified and loaded, and when the first new step is done. The peer is what nobody can leave out: a process
that only imports torch, and the same load and the same step.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import measure

KILL_AT, SAVE_EVERY = 14, 10
MARKS = ("imports", "load", "step")
BAR_SECONDS = 10.0


class Restart(NamedTuple):
    """Seconds of the parts, and of ``import torch`` alone."""

    imports: float
    load: float
    step: float
    torch: float

    @property
    def total(self) -> float:
        return self.imports + self.load + self.step


def main() -> None:
    options = arguments()
    if options.child:
        child(options.child, options.kill_at)
        return
    measure.begin()
    settings = ["experiment=quickstart", f"checkpoint.every_steps={SAVE_EVERY}", "run.num_threads=1"]
    if options.quick:
        settings += ["model.d_model=32", "data.batch_sequences=4"]
    rounds = [restart(settings) for _ in range(options.rounds)]
    middle = [sorted(values)[len(rounds) // 2] for values in zip(*rounds)]
    print(f"\nseconds from the command, median over {options.rounds} rounds")
    rows = [(name, f"{value:.2f}") for name, value in zip((*MARKS, "import torch alone"), middle)]
    total = sorted(r.total for r in rounds)[len(rounds) // 2]
    measure.show(("", "seconds"), [*rows, ("kill to first new step", f"{total:.2f}")])
    floor = sorted(r.total / (r.torch + r.load + r.step) for r in rounds)[len(rounds) // 2]
    print(f"ratio kill to first new step / (import torch + load + step): {floor:.3f}")
    if not options.quick:
        measure.judge("seconds from kill to first new step", total, at_most=BAR_SECONDS)
        measure.judge("over (import torch + load + step)", floor, at_most=1.5)


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__ or "", rounds=5)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def restart(settings: list[str]) -> Restart:
    """Of one run, killed once."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--child", *settings, f"run.dir={name}/run"]
        killed = subprocess.run([*command, "--kill-at", str(KILL_AT)], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        marks = [float(x) for x in re.findall(r"^mark \w+ ([0-9.]+)$", done.stdout, re.MULTILINE)]
        assert len(marks) == len(MARKS), done.stdout
        parts = [end - begin for begin, end in zip([start, *marks], marks)]
    start = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return Restart(*parts, torch=time.time() - start)


def child(settings: list[str], kill_at: int) -> None:
    """The run, until it is killed or has made its first new step."""
    from sleeptrain.engine.trainer import Trainer
    from sleeptrain.pretrain import main as pretrain

    mark("imports")
    train_step, run = Trainer.train_step, Trainer.run

    def step(trainer: Trainer):
        result = train_step(trainer)
        if trainer.step == kill_at:
            trainer.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if not kill_at:
            assert trainer.step == KILL_AT // SAVE_EVERY * SAVE_EVERY + 1
            mark("step")
            sys.stdout.flush()
            os._exit(0)
        return result

    def started(trainer: Trainer, *rest):
        mark("load")
        return run(trainer, *rest)

    Trainer.train_step, Trainer.run = step, started  # type: ignore[method-assign]
    sys.exit(pretrain(settings))


def mark(name: str) -> None:
    print(f"mark {name} {time.time():.4f}", flush=True)


if __name__ == "__main__":
    main()
