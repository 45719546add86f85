"""How far the runs of a study are: a line for each model, over its seeds."""

import time
from collections.abc import Iterator

from sleeptrain.study import trial, words
from sleeptrain.study.plan import Plan, Point
from sleeptrain.study.run import failure_of, is_done, step_of, trials_folder
from sleeptrain.study.spec import NUM_PASSES, Asked

REFRESH_SECONDS = 5.0
CLEAR = "\033[2J\033[H"  # a terminal's screen, from its first line on


def show(asked: Asked, plan: Plan) -> None:
    """Once, or with ``study.watch`` until no run is left to do."""
    while True:
        states = {name: _state(asked, plan, name) for name in plan.trials}
        if asked.execution.watch:
            print(CLEAR, end="")
        print("\n".join(_lines(asked, plan, states)))
        if not asked.execution.watch or all(state == "done" for state in states.values()):
            return
        time.sleep(REFRESH_SECONDS)


def _state(asked: Asked, plan: Plan, name: str) -> str:
    folder = trials_folder(asked) / name
    if is_done(asked, name, plan.trials[name]):
        return "done"
    if trial.is_taken(folder):
        return "running"
    if failure_of(folder):
        return "failed"
    return "stopped" if step_of(folder) else "waiting"


def _lines(asked: Asked, plan: Plan, states: dict[str, str]) -> Iterator[str]:
    rows = [["model", "budget", "steps made", "done", "running", "stopped", "failed", "waiting", "so far"]]
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in plan.points:
        groups.setdefault((point.arm, repr(point.axes), repr(point.tried)), []).append(point)
    for points in groups.values():
        for budget in dict.fromkeys(point.budget for point in points):
            of_budget = [point for point in points if point.budget == budget]
            rows.append(_row(asked, plan, states, of_budget))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
    num_done = sum(state == "done" for state in states.values())
    yield f"\n{num_done} of {len(states)} runs are done, in {asked.folder}"
    for name, state in states.items():
        if state == "failed":
            yield f"failed: {name}: {failure_of(trials_folder(asked) / name)}"


def _row(asked: Asked, plan: Plan, states: dict[str, str], points: list[Point]) -> list[str]:
    names = [point.trial for point in points]
    total = sum(plan.trials[name].optim.num_steps for name in names)
    made = sum(step_of(trials_folder(asked) / name) for name in names)
    counts = [
        sum(states[name] == s for name in names) for s in ("done", "running", "stopped", "failed", "waiting")
    ]
    values = [value for name in names if (value := _value(asked, plan, name)) is not None]
    so_far = f"{sum(values) / len(values):.3f}" if values else ""
    settings = {NUM_PASSES: points[0].axes.get(NUM_PASSES, "")} | points[0].axes | points[0].tried
    described = ", ".join([*([points[0].arm] if points[0].arm else []), *_described(settings)])
    budget = words.BUDGETS.get(points[0].budget, points[0].budget)
    return [described, budget, f"{made / total:.0%}", *(str(count or "") for count in counts), so_far]


def _described(settings: dict[str, object]) -> list[str]:
    """``N = 2, task.steps=4``"""
    return [
        words.value(NUM_PASSES, value) if name == NUM_PASSES else f"{name}={value}"
        for name, value in settings.items()
    ]


def _value(asked: Asked, plan: Plan, name: str) -> float | None:
    """The main metric with the N of the training, over all difficulties."""
    result = trial.result_of(trials_folder(asked) / name)
    if result is None:
        return None
    num_passes = plan.trials[name].sleep.num_passes
    values = [
        one["metrics"][asked.study.metric]
        for one in result["evaluations"]
        if one["num_passes"] == num_passes and not one["stop"]
    ]
    return sum(values) / len(values)
