"""How much of its time a run that is killed again and again spends on work that lasts: the soak of R22.

Two ranks train under torchrun, as with cluster=local_procs, which starts both again when one dies. Seeded
SIGKILLs at random times, the mean interval ten measured restarts, hit one of the ranks, wherever it is: amid
a step, a save, or a recovery. A short run first measures a step, a restart and the stall of a save; from
these follow the interval of the kills and the best interval of the checkpoints. Last comes the same run
without kills, whose weights must be the same bit for bit.

effective training time: steps of the run x mean seconds of a step / wall time from first to last step.
formula: 1 - d / tau - (tau / 2 + T) / MTBF at the kills that happened: d the stall of a save, tau seconds of
training between saves, T from a kill to the end of the first new step, that step not counted, MTBF the wall
time over the kills.

The ratio is the effective training time over that of the formula. It takes about an hour.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import measure

sys.path.append(str(Path(__file__).parents[1]))
if "--child" not in sys.argv:
    from cluster_costs import Faults, best_interval, goodput

NUM_RANKS, NUM_KILLS, RESTARTS_BETWEEN_KILLS, RESTARTS_COMPUTED = 2, 20, 10, 50
PARTS = ("detect", "restart", "load", "first step")
SETTINGS = (
    *("experiment=quickstart", "run.num_threads=1", "eval.every_steps=0", "log.every_steps=10"),
    *("optim.muon_lr=1e-4", "optim.adamw_lr=1e-4"),  # thousands of steps at a rate for hundreds would diverge
)
BAR_POINTS, BAR_COMPUTED, BAR_PART_SECONDS = 2.0, 95.0, 5.0
STEPS_BETWEEN_KILLS, CALIBRATION_SAVE_EVERY = 40, 10  # of the short run


class Recovery(NamedTuple):
    """Seconds from a kill to the new processes, to their imports, to the loaded checkpoint, to the first new
    step."""

    detect: float
    restart: float
    load: float
    first_step: float

    @property
    def total(self) -> float:
        return sum(self)


class Soak(NamedTuple):
    """What a run went through; ``step`` and ``stall`` are means in seconds, ``wall`` from the beginning of
    its first step to the end of its last."""

    kills: list[float]
    recoveries: list[Recovery]
    step: float
    stall: float
    wall: float

    @property
    def away(self) -> float:
        """Seconds that a kill costs beside the steps that are made again."""
        return fmean(r.total for r in self.recoveries) - self.step


def main() -> None:
    options = arguments()
    if options.child:
        child(options.child, Path(options.marks))
        return
    measure.begin()
    settings = list(SETTINGS)
    if options.quick:
        settings += ["model.d_model=32", "data.batch_sequences=4"]
    with tempfile.TemporaryDirectory() as name:
        found = calibrate(Path(name) / "short", settings, 1 if options.quick else 3)
        mtbf = (1 if options.quick else RESTARTS_BETWEEN_KILLS) * found.away
        every = max(1, round(math.sqrt(2 * found.stall * mtbf) / found.step))
        schedule = kill_times(mtbf, options.kills, options.seed)
        share = goodput(Faults(found.stall, 0.0, found.away, mtbf), every * found.step)
        num_steps = round((schedule[-1] + 3 * found.away) * share / found.step)
        print(
            f"a step takes {found.step:.3f} s, a save stalls {1e3 * found.stall:.1f} ms, a restart takes "
            f"{found.away:.2f} s: {num_steps} steps, a save every {every}, a kill every {mtbf:.0f} s",
            flush=True,
        )
        settings += [f"optim.num_steps={num_steps}", f"checkpoint.every_steps={every}"]
        soak = disturbed(Path(name) / "soak", settings, schedule, options.seed)
        report(soak, num_steps, every, options.quick)
        disturbed(Path(name) / "clean", settings, [], 0)
        tool = Path(__file__).parents[1] / "compare_runs.py"
        compared = subprocess.run([sys.executable, tool, f"{name}/soak", f"{name}/clean"])
        print(f"{'PASS' if compared.returncode == 0 else 'FAIL'}  bit-equal to the run without kills")
        sys.exit(compared.returncode)


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__ or "", rounds=1)
    parser.add_argument("--kills", type=int, default=NUM_KILLS, help=f"planned (default {NUM_KILLS})")
    parser.add_argument("--seed", type=int, default=1, help="of when and whom (default 1)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--marks", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.kills = 1
    return options


def calibrate(folder: Path, settings: list[str], num_kills: int) -> Soak:
    """A short run, killed each time it has made some steps."""
    short = [*settings, f"optim.num_steps={(num_kills + 1) * STEPS_BETWEEN_KILLS}"]
    run = Run(folder, [*short, f"checkpoint.every_steps={CALIBRATION_SAVE_EVERY}"], num_kills)
    for number in range(num_kills):
        run.await_step((number + 1) * STEPS_BETWEEN_KILLS)
        run.kill(number % NUM_RANKS)
    return run.finish()


def disturbed(folder: Path, settings: list[str], schedule: Sequence[float], seed: int) -> Soak:
    """A run that is killed so many seconds after its first step began, until it ends."""
    run, draw = Run(folder, settings, len(schedule)), random.Random(seed)
    start = run.await_step(0)
    for after in schedule:
        while time.time() < start + after and run.is_running:
            time.sleep(0.02)
        if run.is_running:
            run.kill(draw.randrange(NUM_RANKS))
    return run.finish()


def kill_times(mtbf: float, num_kills: int, seed: int) -> list[float]:
    """Seconds after the beginning, at random with that mean interval."""
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(1 / mtbf) for _ in range(num_kills)))


class Run:
    """A run under torchrun whose ranks tell what they do in a file."""

    def __init__(self, folder: Path, settings: list[str], num_kills: int) -> None:
        self.marks = folder.with_name(f"{folder.name}.marks")
        self.kills: list[float] = []
        self._told: list[dict[str, Any]] = []
        self._read_bytes = 0
        group = f"--nproc-per-node {NUM_RANKS} --max-restarts {num_kills}"
        launcher = f"-m torch.distributed.run --standalone {group}"
        child = [__file__, "--marks", str(self.marks), "--child", *settings, f"run.dir={folder}"]
        self.output = folder.with_name(f"{folder.name}.out").open("w")
        self._process = subprocess.Popen(
            [sys.executable, *launcher.split(), *child],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    @property
    def is_running(self) -> bool:
        """Until the last step is made."""
        return self._process.poll() is None and "done" not in {m["what"] for m in self.told()[-4:]}

    def told(self) -> list[dict[str, Any]]:
        """Everything so far; each line is parsed once."""
        if self.marks.exists():
            with self.marks.open("rb") as file:
                file.seek(self._read_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole + newline)
            self._told += map(json.loads, whole.splitlines())
        return self._told

    def await_step(self, step: int) -> float:
        """Until rank 0 has made so many steps, or is about to make the first; when that was."""
        while True:
            for mark in self.told()[-4:]:
                if mark["what"] in ("load", "step") and mark["step"] >= step:
                    return float(mark["time"])
            if self._process.poll() is not None:
                raise SystemExit(Path(self.output.name).read_text())
            time.sleep(0.02)

    def kill(self, rank: int) -> None:
        """The process of a rank; between two of them, the next."""
        while self._process.poll() is None:
            pid = [m["pid"] for m in self.told() if m["what"] == "start" and m["rank"] == rank][-1]
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                time.sleep(0.02)
                continue
            self.kills.append(time.time())
            print(f"kill {len(self.kills)}: rank {rank}", flush=True)
            return

    def finish(self) -> Soak:
        code = self._process.wait()
        self.output.close()
        if code:
            raise SystemExit(Path(self.output.name).read_text())
        return soak_of(self.kills, [m for m in self.told() if m["rank"] == 0])


def soak_of(kills: list[float], marks: list[dict[str, Any]]) -> Soak:
    """From what rank 0 told. A recovery that was killed itself is not among the recoveries."""
    steps = [
        after["time"] - before["time"] - after["stall"]
        for before, after in pairwise(m for m in marks if m["what"] in ("load", "step"))
        if after["what"] == "step" and before["what"] == "step"
    ]
    stalls = [m["stall"] for m in marks if m["what"] == "step" and m["stall"]]
    recoveries = []
    for kill, following in zip(kills, [*kills[1:], math.inf]):
        times = [kill]
        for what in ("start", "imports", "load", "step"):
            times += [m["time"] for m in marks if m["what"] == what and m["time"] > times[-1]][:1]
        if len(times) == 1 + len(PARTS) and times[-1] < following:
            recoveries.append(Recovery(*(after - before for before, after in pairwise(times))))
    begun = next(m["time"] for m in marks if m["what"] == "load")
    ended = next(m["time"] for m in marks if m["what"] == "done")
    return Soak(kills, recoveries, fmean(steps), fmean(stalls), ended - begun)


def formula(soak: Soak, tau: float, mtbf: float) -> float:
    return 1 - soak.stall / tau - (tau / 2 + soak.away) / mtbf


def report(soak: Soak, num_steps: int, every: int, quick: bool) -> None:
    tau, mtbf = every * soak.step, soak.wall / len(soak.kills)
    print(
        f"\n{len(soak.kills)} kills in {soak.wall:.0f} s, one every {mtbf:.1f} s; "
        f"{len(soak.kills) - len(soak.recoveries)} of them hit a recovery"
    )
    columns = list(zip(*soak.recoveries))
    rows = [(name, f"{median(c):.2f}", f"{fmean(c):.2f}", f"{max(c):.2f}") for name, c in zip(PARTS, columns)]
    totals = [r.total for r in soak.recoveries]
    whole = ("kill to first new step", f"{median(totals):.2f}", f"{fmean(totals):.2f}", f"{max(totals):.2f}")
    measure.show(("seconds of a recovery", "median", "mean", "most"), [*rows, whole])
    print(f"a step {soak.step:.4f} s, a save every {tau:.2f} s of training, stall {1e3 * soak.stall:.1f} ms")
    effective, expected = num_steps * soak.step / soak.wall, formula(soak, tau, mtbf)
    faults = Faults(soak.stall, 0.0, soak.away, mtbf)
    rare = faults._replace(mtbf=RESTARTS_COMPUTED * soak.away)
    best = best_interval(rare, soak.step)
    computed = {
        "rule": formula(soak, math.sqrt(2 * soak.stall * rare.mtbf), rare.mtbf),
        "exact": goodput(rare, best),
    }
    shares = [
        ("effective training time", effective),
        ("formula at these kills", expected),
        ("exact form of simulate.py at this MTBF", goodput(faults, tau)),
        (f"formula, a kill every {RESTARTS_COMPUTED} restarts", computed["rule"]),
        ("exact form of simulate.py, the same", computed["exact"]),
    ]
    measure.show(("share of time, %", ""), [(name, f"{100 * share:.2f}") for name, share in shares])
    print(f"ratio effective / formula: {effective / expected:.3f}")
    if not quick:
        judge_parts = partial(measure.judge, at_most=BAR_PART_SECONDS)
        measure.judge("kills", len(soak.kills), at_least=NUM_KILLS)
        measure.judge("points from the formula", 100 * abs(effective - expected), at_most=BAR_POINTS)
        measure.judge("computed for rare kills, %", 100 * computed["rule"], at_least=BAR_COMPUTED)
        for name, column in zip(PARTS, columns):
            judge_parts(f"median seconds of {name}", median(column))


def child(settings: list[str], marks: Path) -> None:
    """A rank of the run, which tells what it does."""
    file, rank = marks.open("a", buffering=1), int(os.environ["RANK"])

    def mark(what: str, at: float | None = None, **more: float) -> None:
        row = {"what": what, "rank": rank, "pid": os.getpid(), "time": at or time.time()} | more
        file.write(json.dumps(row) + "\n")

    mark("start", process_start())
    from sleeptrain.engine.trainer import Trainer
    from sleeptrain.pretrain import main as pretrain

    mark("imports")
    train_step, save, run = Trainer.train_step, Trainer._save, Trainer.run
    stalls = threading.local()

    def running(trainer: Trainer, *rest: Any) -> int:
        mark("load", step=trainer.step)
        return run(trainer, *rest)

    def stepping(trainer: Trainer) -> Any:
        result = train_step(trainer)
        mark("step", step=trainer.step, stall=stalls.__dict__.pop("seconds", 0.0))
        if trainer.step == trainer.config.optim.num_steps:
            mark("done")
        return result

    def saving(trainer: Trainer, *rest: Any) -> None:
        start = time.perf_counter()
        save(trainer, *rest)
        stalls.seconds = time.perf_counter() - start

    for name, method in {"run": running, "train_step": stepping, "_save": saving}.items():
        setattr(Trainer, name, method)
    sys.exit(pretrain(settings))


def process_start() -> float:
    """When this process was made."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
