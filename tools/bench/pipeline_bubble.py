"""What the looped pipeline leaves idle: the measured share against (p - 1) / (m V + p - 1).

p stages, m = p microbatches, V visits; here a window to sleep on and one with the loss, so V = N + 1. Every
stage is a process, and the schedule, its messages and a small model are those of training. On shared cores a
visit's work is a timed sleep (the visit's real computation, filled up to --unit-ms forward and twice that
backward); with p CUDA devices it is computation alone. A stage is idle whenever it is not inside a visit: the
schedule's own work counts as idle. Medians over rounds, means over stages; the ratio is measured / formula.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sleeptrain.config import Config, ModelConfig, ParallelConfig, SleepConfig, TextConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.visits import cut, plan
from sleeptrain.parallel.backend import autocast
from sleeptrain.parallel.pipeline import Pipeline
from sleeptrain.parallel.stage import build_stage
from sleeptrain.parallel.topology import Topology, join

VOCAB_SIZE = 64
WINDOWS_WITH_LOSS = (False, True)
FIGURE = Path(__file__).parents[2] / "docs" / "pipeline_bubble.svg"


@dataclass(frozen=True)
class Setup:
    """Sizes of a measurement. ``unit_seconds``: what a visit lasts forward; 0: as long as it computes."""

    unit_seconds: float
    d_model: int = 32
    window_tokens: int = 16
    sequences: int = 1  # of a microbatch
    stages: tuple[int, ...] = (2, 4)
    num_passes: tuple[int, ...] = (1, 2, 4)

    def config(self, num_stages: int) -> Config:
        return Config(
            model=ModelConfig(d_model=self.d_model, head_dim=self.d_model // 4),
            sleep=SleepConfig(window_tokens=self.window_tokens),
            task=TextConfig(sequence_tokens=2 * self.window_tokens),
            parallel=ParallelConfig(pipeline_size=num_stages),
        )

    def num_visits(self, num_passes: int) -> int:
        config = self.config(1)
        windows = cut(2 * self.window_tokens, self.window_tokens, WINDOWS_WITH_LOSS)
        return len(plan(windows, num_passes, config.model, config.sleep))

    def formula(self, num_stages: int, num_passes: int) -> float:
        return (num_stages - 1) / (num_stages * self.num_visits(num_passes) + num_stages - 1)


def main() -> None:
    parser = measure.parser(__doc__ or "", rounds=3)
    parser.add_argument("--unit-ms", type=float, default=400, help="forward time of a visit (default 400)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="the figure; none with --quick")
    options = parser.parse_args()
    measure.begin(["megatron-core"])
    setup = Setup(options.unit_ms / 1e3)
    if options.quick:
        setup = Setup(0.02, stages=(2,), num_passes=(1, 2))
    elif torch.cuda.device_count() >= max(setup.stages):
        setup = Setup(0.0, d_model=2048, window_tokens=2048, sequences=4)
    work = work_of(setup)
    print(f"{setup}\nwork of a visit: {work}\n")
    idle = {p: launch(setup, p, options.rounds) for p in setup.stages}
    report(setup, idle, judged=not options.quick)
    if not options.quick:
        draw(setup, idle, options.figure, f"{work}; python tools/bench/pipeline_bubble.py")


def work_of(setup: Setup) -> str:
    if not setup.unit_seconds:
        return "real computation, a CUDA device per stage"
    unit = 1e3 * setup.unit_seconds
    return f"timed sleep, {unit:.0f} ms forward, {2 * unit:.0f} ms backward (shared cores)"


def launch(setup: Setup, num_stages: int, rounds: int) -> dict[int, float]:
    """Idle share by N, from a process per stage."""
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("fork").SimpleQueue()
        mp.start_processes(
            run_stage, (num_stages, folder, setup, rounds, results), num_stages, start_method="fork"
        )
        return results.get()


def run_stage(
    rank: int, num_stages: int, folder: str, setup: Setup, rounds: int, results: "mp.SimpleQueue[Any]"
) -> None:
    """One process: its stage's part of every measurement; the first tells the result."""
    torch.set_num_threads(1)
    device = torch.device("cpu" if setup.unit_seconds else "cuda", None if setup.unit_seconds else rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=num_stages,
    )
    config = setup.config(num_stages)
    topology = join(config.parallel, device)
    model, _ = build_stage(config, VOCAB_SIZE, topology)
    clock = Clock(setup.unit_seconds, device)
    watch_visits(model, clock)
    pipeline = Pipeline(model, topology, False, lambda: autocast(config, device))
    batches = [batch_of(setup).to(device) for _ in range(num_stages)]
    shares: dict[int, list[float]] = {n: [] for n in setup.num_passes}
    idle_share(pipeline, batches, setup.num_passes[0], clock, topology)  # a warm-up
    for _ in range(rounds):
        for n, found in shares.items():
            found.append(idle_share(pipeline, batches, n, clock, topology))
    if rank == 0:
        results.put({n: statistics.median(found) for n, found in shares.items()})
    topology.barrier()
    dist.destroy_process_group()


def idle_share(
    pipeline: Pipeline, batches: list[Batch], num_passes: int, clock: "Clock", topology: Topology
) -> float:
    """Of one run of the schedule, forward and backward, from barrier to barrier; mean over the stages."""
    clock.spans.clear()
    topology.barrier()
    start = time.perf_counter()
    pipeline.run(batches, num_passes, 1.0)
    clock.wait()
    topology.barrier()
    wall = time.perf_counter() - start
    share = torch.tensor([1 - clock.busy_seconds() / wall])
    dist.all_reduce(share, group=topology.host)
    return float(share) / topology.pipeline.size()


class Clock:
    """Adds up the time inside visits; fills each up to its share of a unit."""

    def __init__(self, unit_seconds: float, device: torch.device) -> None:
        self.unit_seconds, self.device = unit_seconds, device
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """Seconds; on a device the moment at which it gets here."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, start: Any, units: int) -> None:
        if self.unit_seconds:
            time.sleep(max(0.0, start + units * self.unit_seconds - time.perf_counter()))
        self.spans.append((start, self.now()))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def busy_seconds(self) -> float:
        if self.device.type == "cuda":
            return sum(start.elapsed_time(end) for start, end in self.spans) / 1e3
        return sum(end - start for start, end in self.spans)


def watch_visits(model: SleepModel, clock: Clock) -> None:
    """The model's visits begin and end under the clock, forward and backward."""
    plain = model.run

    def run(h: Tensor, *arguments: Any) -> Any:
        start, backward = clock.now(), []
        left, state = plain(At.apply(lambda: clock.end(backward.pop(), 2), h), *arguments)
        left = At.apply(lambda: backward.append(clock.now()), left)
        clock.end(start, 1)
        return left, state

    model.run = run  # type: ignore[method-assign]


class At(torch.autograd.Function):
    """The identity; calls a function when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], h: Tensor) -> Tensor:
        ctx.call = call
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[None, Tensor]:
        ctx.call()
        return None, d_h


def batch_of(setup: Setup) -> Batch:
    ids = torch.randint(VOCAB_SIZE, (setup.sequences, 2 * setup.window_tokens))
    loss_mask = torch.zeros(ids.shape, dtype=torch.bool)
    loss_mask[:, setup.window_tokens :] = True
    no_labels = torch.zeros(setup.sequences, dtype=torch.int64)
    return Batch(ids, ids, loss_mask, None, None, no_labels, WINDOWS_WITH_LOSS, int(loss_mask.sum()))


def report(setup: Setup, idle: dict[int, dict[int, float]], judged: bool) -> None:
    rows, worst = [], 0.0
    for p in setup.stages:
        for n in setup.num_passes:
            formula, share = setup.formula(p, n), idle[p][n]
            worst = max(worst, abs(share / formula - 1))
            shares = (f"{100 * formula:.2f}", f"{100 * share:.2f}", f"{share / formula:.3f}")
            rows.append((str(p), str(n), str(setup.num_visits(n)), str(p), *shares))
    heading = ("stages p", "N", "visits V", "microbatches m", "formula %", "idle %", "ratio")
    measure.show(heading, rows)
    print(f"ratio measured / formula, largest distance from 1: {worst:.3f}")
    if judged:
        measure.judge("idle share over (p - 1) / (m V + p - 1), largest distance from 1", worst, at_most=0.1)


def draw(setup: Setup, idle: dict[int, dict[int, float]], path: Path, caption: str) -> None:
    """Idle share against N: the formula a line, what was measured points."""
    passes = range(1, max(setup.num_passes) + 1)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for p, color in zip(setup.stages, ("tab:blue", "tab:orange")):
        axis.plot(passes, [100 * setup.formula(p, n) for n in passes], color=color, label=f"formula, p = {p}")
        shares = [100 * idle[p][n] for n in setup.num_passes]
        axis.plot(setup.num_passes, shares, "o", color=color, label=f"measured, p = {p}")
    axis.set_xlabel("N, passes over a window")
    axis.set_ylabel("idle share of the stages, %")
    axis.set_xticks(passes)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title("Sleep fills the pipeline: (p - 1) / (m V + p - 1) idle, m = p, V = N + 1", fontsize=10)
    figure.supxlabel(caption, fontsize=7, color="dimgrey")
    figure.savefig(path, metadata={"Date": None})
    print(f"figure: {path.name}")


if __name__ == "__main__":
    main()
