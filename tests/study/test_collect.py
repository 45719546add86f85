"""Results as a table, without training."""

import csv
import io
from typing import Any

import pytest

from sleeptrain.study.collect import best_points, by_value, is_less_better, to_csv, values_of
from sleeptrain.study.plan import Point
from sleeptrain.study.words import duration, number, probability


def point(trial: str, seed: int, rate: float, passes: int = 1) -> Point:
    return Point(trial, "grid", "", "tokens", seed, {"sleep.num_passes": passes}, {"optim.muon_lr": rate})


def results(values: dict[str, float], metric: str) -> dict[str, Any]:
    return {name: {"training": {"validation": {f"eval/{metric}": value}}} for name, value in values.items()}


def test_of_the_rates_tried_the_best_mean_over_seeds_is_kept() -> None:
    points = [point("a", 0, 0.1), point("b", 1, 0.1), point("c", 0, 0.2), point("d", 1, 0.2)]
    validation = {"a": 0.9, "b": 0.1, "c": 0.6, "d": 0.6}
    kept = best_points(points, results(validation, "exact_accuracy"), "exact_accuracy")
    assert [p.trial for p in kept] == ["c", "d"]
    kept = best_points(points, results(validation, "loss"), "loss")
    assert [p.trial for p in kept] == ["a", "b"]


def test_each_point_has_its_own_best() -> None:
    points = [point("a", 0, 0.1), point("b", 0, 0.2), point("c", 0, 0.1, 2), point("d", 0, 0.2, 2)]
    validation = {"a": 0.9, "b": 0.1, "c": 0.1, "d": 0.9}
    kept = best_points(points, results(validation, "exact_accuracy"), "exact_accuracy")
    assert [p.trial for p in kept] == ["a", "d"]


def test_less_is_better_of_losses_alone() -> None:
    assert is_less_better("loss")
    assert is_less_better("answer_nll")
    assert is_less_better("bits_per_byte")
    assert not is_less_better("exact_accuracy")


def test_a_column_that_some_rows_lack_is_empty_there() -> None:
    text = to_csv([{"a": 1, "b": 0.123456789}, {"a": 2, "c": "x,y"}])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows == [{"a": "1", "b": "0.1234568", "c": ""}, {"a": "2", "b": "", "c": "x,y"}]


def test_numbers_are_sorted_and_words_are_not() -> None:
    rows = [{"n": 3, "arm": "b"}, {"n": 1, "arm": "a"}, {"n": None, "arm": "b"}]
    assert values_of(rows, "n") == [1, 3]
    assert values_of(rows, "arm") == ["b", "a"]
    assert [len(inside) for inside in by_value(rows, "arm").values()] == [2, 1]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.01234), "0.0123"),
        (number(1234), "1234"),
        (number(32768), "32.8 k"),
        (number(2.5e12), "2.5 T"),
        (number(float("nan")), "-"),
        (probability(0.0004), "< 0.001"),
        (probability(0.25), "0.250"),
        (duration(45), "45 s"),
        (duration(600), "10 min"),
        (duration(7200), "2.0 h"),
        (duration(200000), "2.3 days"),
    ],
)
def test_figures_for_people(shown: str, expected: str) -> None:
    assert shown == expected
