"""What simulate.py draws, and what it holds its formulas against: figures measured in small runs, simulated
kills, and published goodputs."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cluster_costs import (
    Faults,
    Point,
    best_interval,
    bubble_share,
    goodput,
    goodput_first_order,
    goodput_of_kills,
    young_interval,
)
from matplotlib.axes import Axes

from sleeptrain.model.flops import pass_ratio
from sleeptrain.model.visits import cut

sys.path.append(str(Path(__file__).parent / "bench"))
import passes

# What LOG.md has, of 2 CPU cores: a test compares them with it.
MEASURED_BUBBLE = {(2, 1): 20.35, (2, 2): 14.62, (2, 4): 9.51, (4, 1): 27.75, (4, 2): 20.47, (4, 4): 13.52}
MEASURED_TIME_OVER_FLOPS = {2: 0.940, 4: 0.934, 8: 0.928}  # T(N) / T(1) over R(N)
MEASURED_RESTART_SECONDS = {"imports": 1.23, "load": 1.02, "step": 0.34}
MEASURED_RESTART_TOTAL_SECONDS = 2.59
MEASURED_STALL_SECONDS, MEASURED_DURABLE_SECONDS = 0.0257, 0.2265  # a save, from its begin

# The soak of tools/bench/goodput.py: 20 kills of a run of two ranks.
MEASURED_SOAK_PERCENT = 89.30
MEASURED_SOAK = Faults(stall=0.0136, durable=0.0, recovery=6.56 - 0.1831, mtbf=1300 / 20)
MEASURED_SOAK_INTERVAL_SECONDS = 1.28

# GPU-hours per failure of a job; sources in docs/scale.md.
PUBLISHED_MTBF = {
    "Llama 3: 50,700 GPU-hours": 54 * 24 * 16384 / 419,
    "RSC-1: 29,500": 8 * 24 * 1000 / 6.5,
    "RSC-1, jobs of 1,024: 8,090": 7.9 * 1024,
}
PUBLISHED_GOODPUT = {  # GPUs, share, and whether more than that
    "Olmo Hybrid": (512, 0.97, False),
    "ByteRobust": (9600, 0.97, False),
    "Llama 3": (16384, 0.90, True),
}
NUM_KILLS, SEED = 20_000, 0


def validation() -> str:
    """Every formula beside what it is held against."""
    rows = [["", "formula", "found", "ratio", "found by"]]
    for (p, n), found in MEASURED_BUBBLE.items():
        formula = 100 * bubble_share(p, p, n + 1)
        rows.append(
            [f"bubble, p = m = {p}, N = {n}, %", *beside(formula, found, 2), "measured, pipeline_bubble.py"]
        )
    for n, ratio in MEASURED_TIME_OVER_FLOPS.items():
        formula = ratio_of_flops(n)
        rows.append([f"T(N) / T(1), N = {n}", *beside(formula, ratio * formula, 3), "measured, passes.py"])
    parts = sum(MEASURED_RESTART_SECONDS.values())
    restart = MEASURED_RESTART_TOTAL_SECONDS
    rows.append(["recovery, parts added up, s", *beside(parts, restart, 2), "measured, restart.py"])
    soak = 100 * goodput(MEASURED_SOAK, MEASURED_SOAK_INTERVAL_SECONDS)
    rows.append(
        ["soak of 20 kills, goodput, %", *beside(soak, MEASURED_SOAK_PERCENT, 2), "measured, goodput.py"]
    )
    for restarts in (10, 50, 1000):
        writing = MEASURED_DURABLE_SECONDS - MEASURED_STALL_SECONDS
        faults = Faults(MEASURED_STALL_SECONDS, writing, restart, restarts * restart)
        interval = best_interval(faults, 0.0)
        exact, found = goodput(faults, interval), goodput_of_kills(faults, interval, NUM_KILLS, SEED)
        name = f"goodput, MTBF {restarts} restarts, %"
        rows.append([name, *beside(100 * exact, 100 * found, 2), f"{NUM_KILLS} simulated kills"])
        rule = goodput_first_order(faults, interval)
        rows.append(["  rule of thumb", *beside(100 * rule, 100 * found, 2), "the same"])
    return "formulas of simulate.py beside what was found (LOG.md; 2 CPU cores)\n" + aligned(rows)


def beside(formula: float, found: float, digits: int) -> list[str]:
    return [f"{formula:.{digits}f}", f"{found:.{digits}f}", f"{found / formula:.3f}"]


def ratio_of_flops(num_passes: int) -> float:
    """R(N) of the model that tools/bench/passes.py times."""
    setup = passes.Setup()
    windows = cut(setup.num_tokens, setup.window_tokens, passes.WINDOWS_WITH_LOSS)
    return pass_ratio(setup.model, setup.sleep("none"), windows, passes.VOCAB_SIZE, num_passes)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first and the last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    edges = (0, len(widths) - 1)
    return "\n".join(
        "  ".join(
            x.ljust(w) if i in edges else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def draw(path: Path, over_gpus: Sequence[Point], over_n: Sequence[Point]) -> str:
    """Writes the figure as SVG and PNG beside each other; their names."""
    with plt.rc_context({"svg.hashsalt": "simulate"}):  # the same bytes each time
        figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
        draw_goodput(axes[0][0], over_gpus)
        draw_intervals(axes[0][1], over_gpus[-1])
        axes[1][0].set_xscale("log", base=2)
        draw_shares(axes[1][0], over_gpus, [p.gpus for p in over_gpus], f"N = {over_gpus[0].num_passes}")
        axes[1][0].set_xlabel("GPUs")
        draw_shares(axes[1][1], over_n, [p.num_passes for p in over_n], f"{over_n[0].gpus:,} GPUs")
        axes[1][1].set_xlabel("N, passes over a window")
        caption = (
            "python tools/simulate.py: computed from assumed speeds and published failure rates, not measured"
        )
        figure.supxlabel(caption, fontsize=7, color="dimgrey")
        names = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            figure.savefig(name, dpi=140, metadata={"Date" if name.suffix == ".svg" else "Software": None})
        plt.close(figure)
    return ", ".join(name.name for name in names)


def draw_goodput(axis: Axes, points: Sequence[Point]) -> None:
    """Over GPUs at published failure rates: the formula, simulated kills, and what others report."""
    gpus = [p.gpus for p in points]
    for label, mtbf_gpu_hours in PUBLISHED_MTBF.items():
        at_rate = [p.faults._replace(mtbf=mtbf_gpu_hours * 3600 / p.gpus) for p in points]
        pairs = [(faults, best_interval(faults, p.step.seconds)) for faults, p in zip(at_rate, points)]
        (line,) = axis.plot(gpus, [100 * goodput(*pair) for pair in pairs], label=label)
        simulated = [100 * goodput_of_kills(*pair, 2000, SEED) for pair in pairs]
        axis.plot(gpus, simulated, ".", color=line.get_color())
    for name, (num, share, is_bound) in PUBLISHED_GOODPUT.items():
        axis.plot(num, 100 * share, "^" if is_bound else "x", color="black")
        text = f"{name}: {'above ' if is_bound else ''}{100 * share:.0f} %"
        axis.annotate(text, (num, 100 * share), (-4, -12), textcoords="offset points", fontsize=7, ha="right")
    axis.set_xscale("log", base=2)
    axis.set_xticks(gpus, [str(num) for num in gpus], fontsize=7, rotation=45)
    axis.set_xlabel("GPUs")
    axis.set_ylabel("goodput, %")
    axis.set_ylim(top=100.5)
    axis.set_title("goodput at published failure rates (dots: simulated kills)", fontsize=9)
    axis.legend(fontsize=7, loc="lower left")
    axis.grid(alpha=0.3)


def draw_intervals(axis: Axes, p: Point) -> None:
    """Goodput over the checkpoint interval, for stalls of a save; the best one and Young's marked."""
    intervals = [p.step.seconds * 2 ** (k / 4) for k in range(4 * 14)]
    for stall in (0.1, 1.0, 6.3, 30.0):
        stalled = p.faults._replace(stall=stall)
        (line,) = axis.plot(
            intervals, [100 * goodput(stalled, t) for t in intervals], label=f"stall {stall:g} s"
        )
        if math.isinf(stalled.mtbf):
            continue
        best = best_interval(stalled, p.step.seconds)
        axis.plot(best, 100 * goodput(stalled, best), "o", color=line.get_color())
        young = young_interval(stall, stalled.mtbf)
        axis.plot(young, 100 * goodput(stalled, young), "|", color="black", markersize=12)
    axis.set_xscale("log")
    axis.set_ylim(60, 100)
    axis.set_xlabel("seconds of training between two saves")
    axis.set_ylabel("goodput, %")
    axis.set_title(f"checkpoint interval, {p.gpus:,} GPUs (o best, | sqrt(2 d MTBF))", fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def draw_shares(axis: Axes, points: Sequence[Point], xs: Sequence[int], title: str) -> None:
    """Where the seconds of a step go."""
    names = {
        "compute": "compute",
        "bubble": "bubble of the pipeline",
        "tensor": "sums over tensor ranks",
        "data": "sums over replicas (ZeRO)",
    }
    shares = {
        name: [100 * getattr(p.step, f"{part}_seconds") / p.step.seconds for p in points]
        for part, name in names.items()
    }
    shown = {name: values for name, values in shares.items() if any(values)}
    axis.stackplot(xs, list(shown.values()), labels=list(shown), alpha=0.8)
    axis.set_xticks(xs, [str(x) for x in xs], fontsize=7, rotation=45)
    axis.set_ylim(0, 100)
    axis.set_ylabel("share of a step, %")
    axis.set_title(f"where a step goes, {title}", fontsize=9)
    axis.legend(fontsize=7, loc="lower left")
