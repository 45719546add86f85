"""One run of a study: what is asked of it when it is trained."""

from pathlib import Path
from typing import Any

import pytest
from tiny_study import TWO_RUNS, tiny

from sleeptrain.schema import ConfigError
from sleeptrain.study import trial
from sleeptrain.study.plan import plan
from sleeptrain.study.run import request_of, trials_folder

pytestmark = pytest.mark.more


def made(folder: Path, *settings: str) -> tuple[dict[str, Any], Path]:
    """The result of the run with the largest N, and its folder."""
    asked = tiny(folder, *TWO_RUNS, *settings)
    trials = plan(asked, lambda config: 1.0).trials
    name, config = max(trials.items(), key=lambda pair: pair[1].sleep.num_passes)
    where, request = trials_folder(asked) / name, request_of(asked.study, config)
    trial.prepare(where, config, request)
    assert trial.run(where) == 0
    result = trial.result_of(where, request)
    assert result is not None
    return result, where


@pytest.mark.parametrize(("backprop_passes", "is_whole"), [(0, True), (1, False)])
def test_the_cosine_is_one_where_nothing_is_cut(tmp_path: Path, backprop_passes: int, is_whole: bool) -> None:
    cut = f"sleep.backprop_passes={backprop_passes}"
    result, _ = made(tmp_path, "study.probes=[gradient_cosine]", cut)
    cosine = result["probes"]["gradient_cosine"]
    assert cosine == pytest.approx(1.0) if is_whole else -1 < cosine < 1 - 1e-4


def test_sequences_stop_by_themselves(tmp_path: Path) -> None:
    """At a tolerance of 0 after all passes, with the scores of a fixed N; at a high one after the second."""
    settings = ("study.tolerances=[0, 100]", "study.eval_passes=[2, 3]", "study.grid={sleep.num_passes: [3]}")
    result, _ = made(tmp_path, *settings)
    by_rule = {(one["num_passes"], one["stop"]): one["metrics"] for one in result["evaluations"]}
    assert by_rule[3, "tolerance 0"] == by_rule[3, ""] | {"passes": 3.0}
    assert by_rule[3, "tolerance 100"] == pytest.approx(by_rule[2, ""] | {"passes": 2.0})


def test_learned_halting_is_evaluated_at_its_thresholds(tmp_path: Path) -> None:
    learned = ("sleep.halting=learned", "study.halt_thresholds=[0.01, 1.0]", "study.tolerances=[0.5]")
    result, _ = made(tmp_path, "study.grid={sleep.num_passes: [3]}", *learned)
    passes = {one["stop"]: one["metrics"].get("passes") for one in result["evaluations"] if one["stop"]}
    assert passes == {"threshold 0.01": 1.0, "threshold 1": 3.0}


def test_the_task_may_differ_in_evaluation(tmp_path: Path) -> None:
    result, folder = made(tmp_path, "study.eval_task={steps: 5}")
    assert {one["difficulty"] for one in result["evaluations"]} == {5}
    assert "steps: 2\n" in (folder / "config.yaml").read_text()
    asked = tiny(tmp_path, "study.eval_task={num_strings: 3}")
    with pytest.raises(ConfigError, match="has a vocabulary of 5, and the training one of 4"):
        plan(asked, lambda config: 1.0)


def test_who_comes_second_leaves_it(tmp_path: Path) -> None:
    from sleeptrain.engine.resilience import RunLock

    _, folder = made(tmp_path)
    assert trial.run(folder) == 0  # done already
    (folder / trial.RESULT).unlink()
    with RunLock(folder / trial.CLAIM):
        assert trial.is_taken(folder)
        assert trial.run(folder) == trial.EXIT_TAKEN
    assert not trial.is_taken(folder)
    assert trial.result_of(folder) is None
