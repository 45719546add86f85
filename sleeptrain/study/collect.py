"""The results of a study as one table: a row holds a value of a metric, and all that it depends on."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from sleeptrain.config import Config
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.study import trial
from sleeptrain.study.cost import cost_of, task_of
from sleeptrain.study.plan import Plan, Point, shape_id
from sleeptrain.study.run import request_of, trials_folder
from sleeptrain.study.spec import NUM_PASSES, Asked
from sleeptrain.study.timing import Timing

Row = dict[str, Any]
COST = "cost"  # in place of a budget: what a step costs, whatever was trained
LESS_IS_BETTER = ("loss", "nll", "bits_per_byte")


class Data(NamedTuple):
    """``rows`` of the runs that are done; ``missing``: ids of the others; ``folder``: where the runs are."""

    rows: list[Row]
    missing: list[str]
    folder: Path
    difficulty_name: str

    def select(self, only: Row) -> list[Row]:
        """The rows that have these values in these columns."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in only.items())]

    def scores(self, row: Row) -> np.ndarray:
        """Of the single examples whose mean the row holds, float32 ``[num_examples]``."""
        name = trial.key(row["metric"], row["difficulty"], row["eval_passes"], row["stop"])
        return load_file(self.folder / row["trial"] / trial.SCORES)[name]

    def learning_curve(self, trial_id: str) -> list[Row]:
        return read_metrics(self.folder / trial_id)


def collect(asked: Asked, plan: Plan, timings: dict[str, Timing]) -> Data:
    """What there is so far."""
    folder, study = trials_folder(asked), asked.study
    results = {
        name: trial.result_of(folder / name, request_of(study, config))
        for name, config in plan.trials.items()
    }
    done = {name: result for name, result in results.items() if result is not None}
    points = best_points([p for p in plan.points if p.trial in done], done, study.metric)
    rows = [row for point in points for row in _rows_of(point, plan.trials[point.trial], done[point.trial])]
    rows += cost_rows(plan, timings)
    task = task_of(next(iter(plan.trials.values())).task)
    return Data(rows, [name for name in results if name not in done], folder, task.difficulty_name)


def best_points(points: list[Point], results: dict[str, Row], metric: str) -> list[Point]:
    """Of the settings tried for each point, those that did best on validation data, as a mean over seeds."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        place = repr((point.role, point.arm, point.budget, point.axes))
        groups.setdefault(place, {}).setdefault(repr(point.tried), []).append(point)
    kept = []
    for by_tried in groups.values():
        if len(by_tried) == 1:
            kept += next(iter(by_tried.values()))
            continue
        means = {
            tried: np.mean([results[p.trial]["training"]["validation"][f"eval/{metric}"] for p in of_tried])
            for tried, of_tried in by_tried.items()
        }
        choose = min if is_less_better(metric) else max
        kept += by_tried[choose(means, key=lambda tried: means[tried])]
    return kept


def is_less_better(metric: str) -> bool:
    return metric.startswith(LESS_IS_BETTER) or metric.endswith(LESS_IS_BETTER)


def _rows_of(point: Point, config: Config, result: Row) -> list[Row]:
    cost, training = cost_of(config), result["training"]
    shared: Row = {
        "trial": point.trial,
        "role": point.role,
        "arm": point.arm,
        "budget": point.budget,
        "seed": point.seed,
        **point.axes,
        NUM_PASSES: point.axes.get(NUM_PASSES, config.sleep.num_passes),
        **{f"best {key}": value for key, value in point.tried.items()},
        "num_steps": config.optim.num_steps,
        "tokens": cost.tokens,
        "train_flops": cost.flops,
        "train_seconds": training["seconds"],
        "parameters": cost.parameters,
        "state_bytes": cost.state_bytes,
    }
    rows = []
    for one in result["evaluations"]:
        stop = one["stop"]
        where = {
            "eval_passes": one["num_passes"],
            "difficulty": one["difficulty"],
            "stop": stop,
            # Without a rule all N are made, also where a learned halting mixes what they leave.
            "passes": one["metrics"]["passes"] if stop else one["num_passes"],
            "as_trained": one["num_passes"] == config.sleep.num_passes and not stop,
        }
        rows += [shared | where | {"metric": name, "value": value} for name, value in one["metrics"].items()]
    nowhere = {"eval_passes": config.sleep.num_passes, "difficulty": None, "stop": "", "as_trained": True}
    rows += [shared | nowhere | {"metric": k, "value": v} for k, v in result["probes"].items()]
    return rows


def cost_rows(plan: Plan, timings: dict[str, Timing]) -> list[Row]:
    """What a step of each model costs, measured and by the formula, as ratios to N = 1 of the same model."""
    points = {(p.arm, repr(p.axes)): p for p in plan.points}.values()
    costs = [(p, plan.trials[p.trial]) for p in points if shape_id(plan.trials[p.trial]) in timings]
    rows = []
    for point, config in costs:
        timing, cost = timings[shape_id(config)], cost_of(config)
        step_flops = cost.flops / config.optim.num_steps
        step_tokens = cost.tokens / config.optim.num_steps
        values: Row = {
            "step_seconds": timing.step_seconds,
            "tokens_per_second": step_tokens / timing.step_seconds,
            "flops_per_second": step_flops / timing.step_seconds,
            "memory_mib": timing.memory_mib,
            "state_bytes": cost.state_bytes,
            "parameters": cost.parameters,
            "flops_per_token": step_flops / step_tokens,
        }
        awake = next((c for p, c in costs if p.arm == point.arm and _same_but_passes(p, point)), None)
        if awake is not None:
            awake_flops = cost_of(awake).flops / awake.optim.num_steps
            values["flops_ratio"] = step_flops / awake_flops
            values["seconds_ratio"] = timing.step_seconds / timings[shape_id(awake)].step_seconds
        who = {"trial": "", "role": point.role, "arm": point.arm, "budget": COST, "seed": None}
        shared = who | point.axes | {"stop": "", "as_trained": True}
        rows += [shared | {"metric": name, "value": value} for name, value in values.items()]
    return rows


def _same_but_passes(other: Point, point: Point) -> bool:
    return other.axes == point.axes | {NUM_PASSES: 1}


def to_csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)
    return text.getvalue()


def _short(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) and math.isfinite(value) else value


def values_of(rows: Iterable[Row], column: str) -> list[Any]:
    """Those that occur: numbers in their order, words in that of the study."""
    found = list(dict.fromkeys(value for row in rows if (value := row.get(column)) is not None))
    return found if any(isinstance(value, str) for value in found) else sorted(found)


def by_way(rows: Iterable[Row], difficulty: Any) -> dict[tuple[str, int], list[Row]]:
    """Rows of a difficulty by what ends a sleep: the rule (empty: none), and the most passes."""
    ways: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["difficulty"] == difficulty:
            ways.setdefault((row["stop"], row["eval_passes"]), []).append(row)
    return ways


def by_value(rows: Iterable[Row], column: str) -> dict[Any, list[Row]]:
    rows = list(rows)
    return {value: [row for row in rows if row.get(column) == value] for value in values_of(rows, column)}
