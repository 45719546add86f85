"""What a study found, said in numbers: each N against N = 1, by budget and difficulty, and the controls."""

import math
from collections.abc import Sequence
from typing import NamedTuple

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


Gains = list[tuple[Against, Row]]  # each with its place in the grid


def trained_rows(data: Data, metric: str, only: Row) -> list[Row]:
    """Of the grid, evaluated with the N of the training, all passes made."""
    rows = data.select({"metric": metric, "role": "grid", "as_trained": True} | only)
    return [row for row in rows if row["budget"] != COST]


def cells(data: Data, metric: str, axes: Sequence[str]) -> list[Row]:
    """The places of the grid at which N is compared: arm, the other axes, difficulty."""
    columns = ["arm", *axes, "difficulty"]
    found = {tuple(row.get(c) for c in columns): None for row in trained_rows(data, metric, {})}
    return [dict(zip(columns, values)) for values in found]


def against_one(data: Data, metric: str, cell: Row, budget: str) -> list[Against]:
    """Every N beside N = 1, on the same examples and seeds."""
    by_passes = by_value(trained_rows(data, metric, cell | {"budget": budget}), NUM_PASSES)
    found = []
    for n, rows in by_passes.items():
        compared = _pair(data, rows, by_passes[1]) if n > 1 and 1 in by_passes else None
        found.append(Against(n, estimate([row["value"] for row in rows]), rows[0]["num_steps"], compared))
    return found


def controls(data: Data, metric: str, cell: Row) -> list[tuple[str, Estimate, Row, Paired | None]]:
    """(name, value, a row of it, the gain of the largest N over it) of every control, at equal FLOPs."""
    there = {key: value for key, value in cell.items() if key != "arm"}
    trained = data.select(there | {"metric": metric, "role": "control", "as_trained": True})
    by_passes = by_value(trained_rows(data, metric, cell), NUM_PASSES)
    # The largest N is one run at all budgets.
    asleep = {row["seed"]: row for row in by_passes[max(by_passes)]}.values() if by_passes else []
    return [
        (name, estimate([row["value"] for row in rows]), rows[0], _pair(data, list(asleep), rows))
        for name, rows in by_value(trained, "arm").items()
    ]


def _pair(data: Data, ours: Sequence[Row], theirs: Sequence[Row]) -> Paired | None:
    """On the seeds that both have."""
    others = {row["seed"]: row for row in theirs}
    both = [(row, others[row["seed"]]) for row in ours if row["seed"] in others]
    if not both:
        return None
    our_scores, their_scores = ([data.scores(pair[side]) for pair in both] for side in (0, 1))
    return paired(our_scores, their_scores, is_less_better(ours[0]["metric"]))


def sentences(data: Data, metric: str, budgets: Sequence[str], axes: Sequence[str]) -> list[str]:
    """One for each budget, over all places of the grid, and what follows from them."""
    gains = {budget: _gains(data, metric, budget, axes) for budget in budgets}
    gains = {budget: found for budget, found in gains.items() if found}
    told = [_sentence(b, metric, found, data.difficulty_name, axes) for b, found in gains.items()]
    if {"tokens", "flops"} <= gains.keys():
        told.append(conclusion(gains["tokens"], gains["flops"], metric))
    return told


def conclusion(at_tokens: Gains, at_flops: Gains, metric: str) -> str:
    """What both budgets say together; nothing, where no gain is beyond the interval over seeds."""
    if not any(_is_sure(_gain(one)) for one, _ in (*at_tokens, *at_flops)):
        return _UNDECIDED
    return _CONCLUSIONS[_share_ahead(at_tokens, metric) > 0.5, _share_ahead(at_flops, metric) > 0.5]


_UNDECIDED = (
    "No difference between N > 1 and N = 1 is beyond the spread over seeds: at this scale the study does not "
    "tell whether more passes help."
)

_CONCLUSIONS = {
    (True, True): "More passes learn more from the same tokens, and from the same compute, too.",
    (True, False): (
        "More passes learn more from the same tokens, but less from the same compute: at this scale the "
        "compute of sleep is better spent on training the plain hybrid for longer."
    ),
    (False, True): "More passes do not learn more from the same tokens; they are ahead at equal compute.",
    (False, False): "More passes do not help at this scale, neither at equal tokens nor at equal compute.",
}


def _gains(data: Data, metric: str, budget: str, axes: Sequence[str]) -> Gains:
    """Of every N > 1 over N = 1, at every place of the grid."""
    return [
        (one, cell)
        for cell in cells(data, metric, axes)
        for one in against_one(data, metric, cell, budget)
        if one.paired is not None
    ]


def _share_ahead(gains: Gains, metric: str) -> float:
    return sum(_sign(metric) * _gain(one).mean > 0 for one, _ in gains) / len(gains)


def _sentence(budget: str, metric: str, gains: Gains, difficulty_name: str, axes: Sequence[str]) -> str:
    sign = _sign(metric)
    ahead = [one for one, _ in gains if sign * _gain(one).mean > 0]
    sure = [one for one in ahead if _is_sure(_gain(one))]
    behind = [one for one, _ in gains if sign * _gain(one).mean < 0 and _is_sure(_gain(one))]
    farthest = max if ahead else min
    best, cell = farthest(gains, key=lambda pair: sign * _gain(pair[0]).mean)
    gain, where = _gain(best), place(cell, difficulty_name, axes)
    spread = "" if math.isnan(gain.half_width) else f" ± {gain.half_width:.3f}"
    return (
        f"At {words.BUDGETS[budget]}, N > 1 is ahead of N = 1 in {len(ahead)} of {len(gains)} comparisons, "
        f"in {len(sure)} of them by more than the 95 % interval over seeds; it is behind by more than that "
        f"in {len(behind)}. The largest {'gain' if ahead else 'loss'}: {gain.mean:+.3f}{spread} in "
        f"{words.metric(metric)}, with N = {best.num_passes}{where}."
    )


def _sign(metric: str) -> int:
    return -1 if is_less_better(metric) else 1


def _gain(one: Against) -> Estimate:
    assert one.paired is not None
    return one.paired.gain


def _is_sure(gain: Estimate) -> bool:
    return abs(gain.mean) > gain.half_width  # false for NaN: one seed is no proof


def place(cell: Row, difficulty_name: str, axes: Sequence[str]) -> str:
    """`` at automaton steps t 4``: where in the grid."""
    parts = [words.value(name, cell[name]) for name in axes if cell.get(name) is not None]
    if cell["arm"]:
        parts.insert(0, str(cell["arm"]))
    if cell.get("difficulty") is not None and cell["difficulty"] not in [cell.get(name) for name in axes]:
        parts.append(words.value("difficulty", cell["difficulty"], difficulty_name))
    return f" at {', '.join(parts)}" if parts else ""
