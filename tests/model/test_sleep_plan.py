"""The plan of visits: which are run, in which order, and which nobody would read."""

from dataclasses import replace
from itertools import pairwise

import pytest

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.model import Visit, Window, cut, plan


def visits(
    losses: list[int], pattern: str, num_passes: int, sleep: dict | None = None, **model: int
) -> list[str]:
    """Visits as ``window.pass segment``, then ``loss``, or ``write`` where only the state is kept."""
    windows = [Window(i, i + 1, bool(loss)) for i, loss in enumerate(losses)]
    found = plan(windows, num_passes, ModelConfig(pattern=pattern, **model), SleepConfig(**sleep or {}))
    last = max((i for i, visit in enumerate(found) if visit.has_loss), default=-1)
    assert [visit.is_after_loss for visit in found] == [i > last for i in range(len(found))]
    if found and not (sleep or {}).get("carry_between_batches"):
        assert found[-1].has_loss
    return [
        f"{v.window}.{v.pass_number} {v.segment}{' loss' * v.has_loss}{' write' * (not v.is_read)}"
        for v in found
    ]


@pytest.mark.parametrize(
    ("sequence", "length", "borders"),
    [
        (100, 24, [(0, 24), (24, 48), (48, 72), (72, 96), (96, 100)]),  # the paper's automaton
        (360, 75, [(0, 75), (75, 150), (150, 225), (225, 300), (300, 360)]),  # Depo
        (48, 24, [(0, 24), (24, 48)]),
        (7, 0, [(0, 7)]),
    ],
)
def test_cut(sequence: int, length: int, borders: list[tuple[int, int]]) -> None:
    losses = [False] * (len(borders) - 1) + [True]
    assert cut(sequence, length, losses) == [Window(*b, loss) for b, loss in zip(borders, losses)]


@pytest.mark.parametrize(("sequence", "length"), [(100, 24), (360, 75)])
def test_plan_of_the_automaton_and_of_depo(sequence: int, length: int) -> None:
    windows = cut(sequence, length, [False] * 4 + [True])
    found = plan(windows, 3, ModelConfig(pattern="attn gdn attn gdn"), SleepConfig(window_tokens=length))
    sleeping = [Visit(w, n, "core", False, n < 3) for w in range(4) for n in (1, 2, 3)]
    last = Visit(4, 1, "core", True, True)
    assert [visit._replace(is_kept=False) for visit in found] == [*sleeping, last]


def test_order_of_both_schedules() -> None:
    ends = {"prelude_blocks": 1, "coda_blocks": 1}
    assert visits([0, 1], "gdn gdn gdn", 3, **ends) == [
        "0.1 prelude",
        "0.1 core",
        "0.2 core",
        "0.3 core",
        "0.3 coda write",
        "1.1 prelude",
        "1.1 core",
        "1.1 coda loss",
    ]
    both = {"schedule": "predict_then_consolidate"}
    assert visits([1, 1], "gdn gdn gdn", 3, both, **ends) == [
        "0.1 prelude",
        "0.1 core",
        "0.1 coda loss",
        "0.2 core",
        "0.3 core write",
        "1.1 prelude",
        "1.1 core",
        "1.1 coda loss",
    ]


def test_a_predicting_window_is_awake_for_one_pass() -> None:
    assert visits([1, 0, 1], "gdn", 2) == ["0.1 core loss", "1.1 core", "1.2 core write", "2.1 core loss"]


def test_windows_after_the_last_loss_are_not_run() -> None:
    assert visits([1, 0, 0], "attn gdn", 4) == ["0.1 core loss"]
    assert visits([0, 0], "attn gdn", 4) == []
    assert visits([1, 1], "gdn", 4, {"schedule": "predict_then_consolidate"})[-1] == "1.1 core loss"


CARRY = {"carry_between_batches": True}


def test_the_last_window_is_slept_on_where_the_next_batch_goes_on() -> None:
    both = {"schedule": "predict_then_consolidate", **CARRY}
    assert visits([1, 1], "gdn gdn", 3, both, coda_blocks=1) == [
        *("0.1 core", "0.1 coda loss", "0.2 core", "0.3 core write"),
        *("1.1 core", "1.1 coda loss", "1.2 core", "1.3 core write"),
    ]
    assert visits([1, 0, 0], "attn gdn", 2, CARRY) == [
        "0.1 core loss",
        *("1.1 core", "1.2 core write"),
        *("2.1 core", "2.2 core write"),
    ]
    assert visits([0, 1], "gdn attn", 2, CARRY) == ["0.1 core", "0.2 core write", "1.1 core loss"]


def test_a_batch_that_nobody_goes_on_from_has_the_plan_of_one() -> None:
    """As in evaluation, whatever the run carries in training."""
    windows = [Window(0, 4, True), Window(4, 8, True)]
    config, alone = ModelConfig(pattern="attn gdn"), SleepConfig(schedule="predict_then_consolidate")
    carried = replace(alone, carry_between_batches=True)
    assert plan(windows, 3, config, carried, is_continued=False) == plan(windows, 3, config, alone)
    assert plan(windows, 3, config, alone, is_continued=True) == plan(windows, 3, config, carried)


def test_a_coda_without_state_is_not_run_in_sleep() -> None:
    assert visits([0, 1], "gdn attn", 2, coda_blocks=1) == [
        "0.1 core",
        "0.2 core write",
        "1.1 core",
        "1.1 coda loss",
    ]
    assert visits([0, 1], "gdn attn", 2, {"eviction": "sliding"}, coda_blocks=1)[:3] == [
        "0.1 core",
        "0.2 core",
        "0.2 coda write",
    ]


def test_a_core_without_state_is_run_only_for_who_reads_it() -> None:
    assert visits([0, 1], "gdn attn", 1, prelude_blocks=1) == [
        "0.1 prelude write",
        "1.1 prelude",
        "1.1 core loss",
    ]
    assert visits([0, 1], "attn attn", 1) == ["1.1 core loss"]


@pytest.mark.parametrize(
    ("lengths", "num_kept"),
    [((24, 24, 4), 2), ((24, 24, 12), 2), ((24, 24, 13), 1), ((24, 24), 1), ((4, 4, 4), 1), ((24,), 1)],
)
def test_the_visits_kept_at_the_end_have_the_activations_of_one_window_and_a_half(
    lengths: tuple[int, ...], num_kept: int
) -> None:
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    windows = [Window(*pair, pair[1] == borders[-1]) for pair in pairwise(borders)]
    found = plan(windows, 3, ModelConfig(pattern="attn gdn"), SleepConfig())
    assert [v.is_kept for v in found] == [False] * (len(found) - num_kept) + [True] * num_kept


def test_of_visits_after_the_last_loss_none_is_kept() -> None:
    windows = [Window(0, 8, True), Window(8, 16, False)]
    found = plan(windows, 2, ModelConfig(pattern="attn gdn"), SleepConfig(**CARRY))
    assert [(v.window, v.pass_number, v.is_kept) for v in found] == [
        (0, 1, True),
        (1, 1, False),
        (1, 2, False),
    ]


def test_a_visit_counts_by_its_blocks_too() -> None:
    windows = [Window(0, 8, False), Window(8, 10, True)]
    found = plan(windows, 1, ModelConfig(pattern="attn gdn gdn gdn", prelude_blocks=1), SleepConfig())
    assert [(v.segment, v.is_kept) for v in found] == [
        ("prelude", False),  # with it 8 + 24 + 2 + 6 = 40 tokens x blocks, more than 1.5 x 24
        ("core", True),
        ("prelude", True),
        ("core", True),
    ]
