"""What a study found, said in numbers: each N against N = 1, by budget and difficulty, and the controls."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sleeptrain.study import words
from sleeptrain.study.collect import COST, Data, Row, by_value, is_less_better
from sleeptrain.study.spec import NUM_PASSES
from sleeptrain.study.statistics import Estimate, Paired, estimate, paired


class Against(NamedTuple):
    """A model beside the one it is compared with, where both are trained to one budget; ``steps`` of its
    training."""

    num_passes: int
    value: Estimate
    steps: int
    paired: Paired | None


def trained_rows(data: Data, metric: str, **only: Any) -> list[Row]:
    """Of the grid, evaluated with the N of the training, all passes made."""
    rows = data.select(metric=metric, role="grid", as_trained=True, **only)
    return [row for row in rows if row["budget"] != COST]


def cells(data: Data, metric: str, axes: Sequence[str]) -> list[dict[str, Any]]:
    """The places of the grid at which N is compared: arm, the other axes, difficulty."""
    columns = ["arm", *axes, "difficulty"]
    found = {tuple(row.get(c) for c in columns): None for row in trained_rows(data, metric)}
    return [dict(zip(columns, values)) for values in found]


def against_one(data: Data, metric: str, cell: dict[str, Any], budget: str) -> list[Against]:
    """Every N beside N = 1, on the same examples and seeds."""
    only = {key.replace(".", "__"): value for key, value in cell.items()}
    by_passes = by_value(trained_rows(data, metric, budget=budget, **only), NUM_PASSES)
    found = []
    for n, rows in by_passes.items():
        compared = _pair(data, rows, by_passes[1]) if n > 1 and 1 in by_passes else None
        found.append(Against(n, estimate([row["value"] for row in rows]), rows[0]["num_steps"], compared))
    return found


def controls(data: Data, metric: str, cell: dict[str, Any]) -> list[tuple[str, Estimate, Row, Paired | None]]:
    """(name, value, a row of it, the gain of the largest N over it) of every control, at equal FLOPs."""
    only = {key.replace(".", "__"): value for key, value in cell.items() if key not in ("arm", NUM_PASSES)}
    asleep = by_value(trained_rows(data, metric, budget="tokens", arm=cell["arm"], **only), NUM_PASSES)
    asleep = asleep or by_value(
        trained_rows(data, metric, budget="flops", arm=cell["arm"], **only), NUM_PASSES
    )
    found = []
    for name, rows in by_value(
        data.select(metric=metric, role="control", as_trained=True, **only), "arm"
    ).items():
        compared = _pair(data, asleep[max(asleep)], rows) if asleep else None
        found.append((name, estimate([row["value"] for row in rows]), rows[0], compared))
    return found


def _pair(data: Data, ours: Sequence[Row], theirs: Sequence[Row]) -> Paired | None:
    """On the seeds that both have."""
    others = {row["seed"]: row for row in theirs}
    both = [(row, others[row["seed"]]) for row in ours if row["seed"] in others]
    if not both:
        return None
    return paired([data.scores(a) for a, _ in both], [data.scores(b) for _, b in both])


def sentences(data: Data, metric: str, budgets: Sequence[str], axes: Sequence[str]) -> list[str]:
    """A sentence for each budget, over all places of the grid, and what follows from them."""
    told = []
    for budget in budgets:
        gains = []
        for cell in cells(data, metric, axes):
            compared = [a for a in against_one(data, metric, cell, budget) if a.paired is not None]
            gains += [(a, cell) for a in compared]
        if gains:
            told.append(_sentence(budget, metric, gains, data.difficulty_name, axes))
    return told


def _sentence(
    budget: str,
    metric: str,
    gains: Sequence[tuple[Against, dict[str, Any]]],
    difficulty_name: str,
    axes: Sequence[str],
) -> str:
    sign = -1 if is_less_better(metric) else 1
    ahead = [a for a, _ in gains if a.paired and sign * a.paired.gain.mean > 0]
    sure = [a for a in ahead if a.paired and _is_sure(a.paired.gain)]
    behind = [a for a, _ in gains if a.paired and sign * a.paired.gain.mean < 0 and _is_sure(a.paired.gain)]
    best, cell = max(gains, key=lambda pair: sign * pair[0].paired.gain.mean)  # type: ignore[union-attr]
    assert best.paired is not None
    gain = best.paired.gain
    spread = "" if math.isnan(gain.half_width) else f" ± {gain.half_width:.3f}"
    where = place(cell, difficulty_name, axes)
    return (
        f"At {words.BUDGETS[budget]}, N > 1 is ahead of N = 1 in {len(ahead)} of {len(gains)} comparisons, "
        f"in {len(sure)} of them by more than the 95 % interval over seeds; it is surely behind in "
        f"{len(behind)}. Largest gain: N = {best.num_passes}{where}, {gain.mean:+.3f}{spread} in "
        f"{words.metric(metric)}, ahead in {best.paired.seeds_ahead} of {gain.num_seeds} seeds."
    )


def _is_sure(gain: Estimate) -> bool:
    return abs(gain.mean) > gain.half_width  # false for NaN: one seed is no proof


def place(cell: dict[str, Any], difficulty_name: str, axes: Sequence[str]) -> str:
    """`` at automaton steps t 4``: where in the grid."""
    parts = [words.value(name, cell[name]) for name in axes if cell.get(name) is not None]
    if cell["arm"]:
        parts.insert(0, str(cell["arm"]))
    if cell.get("difficulty") is not None and cell["difficulty"] not in [cell.get(name) for name in axes]:
        parts.append(words.value("difficulty", cell["difficulty"], difficulty_name))
    return f" at {', '.join(parts)}" if parts else ""
