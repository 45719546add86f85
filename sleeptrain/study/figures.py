"""Figures of a report: SVG that reads without the text beside it, the same bytes from the same data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sleeptrain.study import words
from sleeptrain.study.collect import Data, Row, by_value, by_way, values_of
from sleeptrain.study.spec import NUM_PASSES, Curve
from sleeptrain.study.statistics import Estimate, estimate

PANEL_INCHES = (4.4, 3.5)
COLOURS = ("#1f5fa8", "#d1651a", "#2e8b57", "#a13d63", "#6a51a3", "#8c6d31", "#4d4d4d", "#17a2b8")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sleeptrain",  # ids inside the file do not change from one drawing to the next
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw_curve(
    rows: Sequence[Row], curve: Curve, difficulty_name: str, chance: float | None, path: Path
) -> bool:
    """A panel for each value of one column, a line for each of another: means over seeds with their 95 %
    intervals, single seeds as dots. False where there is nothing to draw."""
    rows = [row for row in rows if row.get(curve.x) is not None]
    panels = by_value(rows, curve.panels) if curve.panels else {"": rows}
    if not rows or not panels:
        return False
    with _figure(len(panels), path, curve.title) as axes:
        for axis, (panel, inside) in zip(axes, panels.items()):
            for index, (line, of_line) in enumerate(_lines(inside, curve.lines).items()):
                label = words.value(curve.lines, line, difficulty_name) if curve.lines else ""
                _draw_line(axis, of_line, curve.x, index, label)
            if chance is not None:
                axis.axhline(chance, color="grey", linestyle=":", linewidth=1, label="guessing")
            if curve.panels:
                axis.set_title(words.value(curve.panels, panel, difficulty_name), fontsize=10)
            _ticks(axis, values_of(rows, curve.x), curve.log_x)
            axis.set_xlabel(words.column(curve.x, difficulty_name))
        axes[0].set_ylabel(words.metric(rows[0]["metric"]))
        _legend(axes)
    return True


def draw_matrix(rows: Sequence[Row], difficulty_name: str, metric: str, path: Path) -> bool:
    """N in training down, N in evaluation across, a panel for each difficulty; means over seeds."""
    by_difficulty = by_value(rows, "difficulty")
    trained, evaluated = values_of(rows, NUM_PASSES), values_of(rows, "eval_passes")
    if len(trained) < 2 or len(evaluated) < 2:
        return False
    title = f"{words.metric(metric)}: N in training against N in evaluation"
    with _figure(len(by_difficulty), path, title) as axes:
        for axis, (difficulty, inside) in zip(axes, by_difficulty.items()):
            cells = [[_mean(inside, **{NUM_PASSES: n, "eval_passes": m}) for m in evaluated] for n in trained]
            top = 1.0 if is_share(metric) else max(v for line in cells for v in line if v is not None)
            axis.imshow([[v or 0.0 for v in line] for line in cells], cmap="Blues", vmin=0, vmax=1.3 * top)
            for i, line in enumerate(cells):
                for j, v in enumerate(line):
                    weight = "bold" if trained[i] == evaluated[j] else "normal"
                    shade = "white" if (v or 0) > 0.8 * top else "black"
                    axis.text(j, i, "" if v is None else f"{v:.2f}", ha="center", va="center", color=shade,
                              fontweight=weight, fontsize=9)  # fmt: skip
            axis.set_xticks(range(len(evaluated)), evaluated)
            axis.set_yticks(range(len(trained)), trained)
            axis.grid(False)
            axis.set_xlabel("N in evaluation")
            axis.set_title(words.value("difficulty", difficulty, difficulty_name), fontsize=10)
        axes[0].set_ylabel("N in training")
    return True


def draw_learning_curves(data: Data, points: Sequence[Row], metric: str, path: Path) -> bool:
    """Training loss, and the held-out metric, over tokens and over training FLOPs; a thin line for each seed,
    a colour for each N."""
    named = {row["trial"]: row for row in points}
    if not named:
        return False
    panels: list[tuple[str, str, Callable[[Row, Row], float]]] = [
        ("train/loss", "training loss, nats per target", lambda point, row: row["step"] / point["num_steps"]),
        (f"eval/{metric}", words.metric(metric), lambda point, row: row["step"] / point["num_steps"]),
    ]
    with _figure(2 * len(panels), path, "Learning curves, a thin line for each seed", columns=2) as axes:
        for k, (name, label, share) in enumerate(panels):
            for axis, unit in zip(axes[2 * k : 2 * k + 2], ("tokens", "train_flops")):
                for trial, point in named.items():
                    rows = [row for row in data.learning_curve(trial) if row.get(name) is not None]
                    passes = values_of(points, NUM_PASSES).index(point[NUM_PASSES])
                    axis.plot(
                        [share(point, row) * point[unit] for row in rows],
                        [row[name] for row in rows],
                        color=COLOURS[passes % len(COLOURS)],
                        linewidth=1,
                        alpha=0.8,
                        label=words.value(NUM_PASSES, point[NUM_PASSES]),
                    )
                axis.set_xlabel("tokens" if unit == "tokens" else "training FLOPs")
                axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
                axis.set_ylabel(label)
        _legend(axes)
    return True


def draw_passes_made(
    lines: Mapping[str, Sequence[Row]], difficulty_name: str, path: Path, title: str
) -> None:
    """The metric against the passes made on average: a point for each N or rule of a line, means over seeds;
    a panel for each difficulty."""
    difficulties = values_of([row for rows in lines.values() for row in rows], "difficulty")
    with _figure(len(difficulties), path, title) as axes:
        for axis, difficulty in zip(axes, difficulties):
            for index, (label, rows) in enumerate(lines.items()):
                places = sorted(
                    tuple(estimate([row[key] for row in of_one]).mean for key in ("passes", "value"))
                    for of_one in by_way(rows, difficulty).values()
                )
                axis.plot(*zip(*places), color=COLOURS[index], marker=MARKERS[index], label=label)
            axis.set_xlabel("passes made over a window, mean")
            axis.set_title(words.value("difficulty", difficulty, difficulty_name), fontsize=10)
        axes[0].set_ylabel(words.metric(next(iter(lines.values()))[0]["metric"]))
        _legend(axes)


def draw_controls(names: Sequence[str], values: Sequence[Estimate], metric: str, path: Path) -> None:
    """A dot with its 95 % interval for each model."""
    with _figure(1, path, "Against models that never sleep, at equal training FLOPs", width=7.5) as [axis]:
        for place, (estimated, colour) in enumerate(zip(values, _cycle(len(values)))):
            width = 0.0 if estimated.num_seeds < 2 else estimated.half_width
            axis.errorbar(estimated.mean, place, xerr=width, fmt="o", color=colour, capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel(words.metric(metric))


class _figure:
    """Context manager: axes in a row, or in ``columns``; writes the file at the end."""

    def __init__(
        self, count: int, path: Path, title: str, columns: int = 3, width: float | None = None
    ) -> None:
        self.count, self.path, self.title = count, path, title
        self.columns, self.width = min(count, columns), width

    def __enter__(self) -> list[Axes]:
        self._style = matplotlib.rc_context(STYLE)
        self._style.__enter__()
        rows = -(-self.count // self.columns)
        size = (self.width or PANEL_INCHES[0] * self.columns, PANEL_INCHES[1] * rows)
        self.figure: Figure
        self.figure, axes = plt.subplots(
            rows, self.columns, figsize=size, squeeze=False, layout="constrained", sharey=self.columns == 3
        )
        self.figure.suptitle(self.title, fontsize=11, fontweight="bold")
        flat = list(axes.flat)
        for axis in flat[self.count :]:
            axis.set_visible(False)
        return flat[: self.count]

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.figure.savefig(self.path, metadata={"Date": None})
        plt.close(self.figure)
        self._style.__exit__(None, None, None)


def _lines(rows: list[Row], column: str) -> dict[Any, list[Row]]:
    return by_value(rows, column) if column else {"": rows}


def _draw_line(axis: Axes, rows: list[Row], x: str, index: int, label: str) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    points = {place: [row["value"] for row in inside] for place, inside in by_value(rows, x).items()}
    estimates = [estimate(values) for values in points.values()]
    means = [e.mean for e in estimates]
    axis.plot(list(points), means, color=colour, marker=marker, markersize=5, label=label or None)
    if all(e.num_seeds > 1 for e in estimates):
        low, high = zip(*((e.mean - e.half_width, e.mean + e.half_width) for e in estimates))
        if is_share(rows[0]["metric"]):
            low, high = (tuple(min(1.0, max(0.0, value)) for value in edge) for edge in (low, high))
        axis.fill_between(list(points), low, high, color=colour, alpha=0.12, linewidth=0)
    for place, values in points.items():
        if len(values) > 1:
            axis.plot([place] * len(values), values, ".", color=colour, alpha=0.5, markersize=4)


def is_share(metric: str) -> bool:
    """Whether it lies between 0 and 1."""
    return metric.endswith("accuracy")


def _ticks(axis: Axes, places: list[Any], log_x: bool) -> None:
    if log_x:
        axis.set_xscale("log", base=2)
    if len(places) <= 10:
        axis.set_xticks(places, [f"{p:g}" if isinstance(p, float) else str(p) for p in places])
        axis.minorticks_off()


def _legend(axes: Sequence[Axes]) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    if len(unique) > 1 or "guessing" in unique:
        axes[0].legend(unique.values(), unique.keys(), fontsize=8)


def _mean(rows: Sequence[Row], **only: Any) -> float | None:
    values = [row["value"] for row in rows if all(row.get(k) == v for k, v in only.items())]
    return estimate(values).mean if values else None


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
