"""Which runs a study makes, and what they cost."""

from pathlib import Path

import pytest
from tiny_study import tiny

from sleeptrain.schema import with_changes
from sleeptrain.study.cost import cost_of
from sleeptrain.study.plan import Plan, Point, plan, shape_id, shapes, trial_id
from sleeptrain.study.spec import NUM_PASSES


def steps(planned: Plan, points: list[Point]) -> dict[int, int]:
    return {p.axes[NUM_PASSES]: planned.trials[p.trial].optim.num_steps for p in points}


def of(planned: Plan, budget: str, role: str = "grid", automaton_steps: int = 2) -> list[Point]:
    chosen = [p for p in planned.points if p.budget == budget and p.role == role and p.seed == 0]
    return [p for p in chosen if p.axes["task.steps"] == automaton_steps]


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(tiny(tmp_path, "optim.num_steps=1000"), lambda config: 1.0 + 0.3 * config.sleep.num_passes)


def test_budgets_are_equal_to_a_step(planned: Plan) -> None:
    tokens = [cost_of(planned.trials[p.trial]).tokens for p in of(planned, "tokens")]
    assert len(set(tokens)) == 1
    flops = [cost_of(planned.trials[p.trial]).flops for p in of(planned, "flops")]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)
    seconds = [n * (1.0 + 0.3 * passes) for passes, n in steps(planned, of(planned, "seconds")).items()]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-3)


def test_the_largest_passes_serve_every_budget_by_one_run(planned: Plan) -> None:
    largest = {
        p.trial for b in ("tokens", "flops", "seconds") for p in of(planned, b) if p.axes[NUM_PASSES] == 2
    }
    assert len(largest) == 1


def test_budgets_that_come_to_nearly_the_same_share_a_run(tmp_path: Path) -> None:
    asked = tiny(tmp_path, "optim.num_steps=1000")
    grid = [c for c in shapes(asked.study) if c.model.pattern_repeats == 1]
    flops_of = {c.sleep.num_passes: cost_of(c).flops / c.optim.num_steps for c in grid}

    def shared(factor: float) -> bool:
        planned = plan(
            asked, lambda c: flops_of[c.sleep.num_passes] * (factor if c.sleep.num_passes == 2 else 1)
        )
        return steps(planned, of(planned, "flops")) == steps(planned, of(planned, "seconds"))

    assert shared(1.04)
    assert not shared(1.1)


def test_a_control_costs_what_the_largest_passes_cost(tmp_path: Path) -> None:
    controls = "study.controls=[deeper,wider_state,full_attention,cleared_cache]"
    planned = plan(tiny(tmp_path, "optim.num_steps=1000", controls), lambda config: 1.0)
    asleep, awake = ({p.axes[NUM_PASSES]: p for p in of(planned, "flops")}[n] for n in (2, 1))
    most = cost_of(planned.trials[asleep.trial]).flops
    for point in of(planned, "flops", "control"):
        config, cost = planned.trials[point.trial], cost_of(planned.trials[point.trial])
        assert config.sleep.num_passes == 1
        if point.arm == "cleared_cache":  # so cheap that the tokens are the limit
            assert config.optim.num_steps == planned.trials[awake.trial].optim.num_steps
            assert cost.flops < most
        else:
            assert cost.flops == pytest.approx(most, rel=2e-3)
    by_arm = {p.arm: planned.trials[p.trial] for p in of(planned, "flops", "control")}
    assert by_arm["deeper"].model.pattern_repeats == 2
    assert by_arm["wider_state"].model.memory_value_dim == 16
    assert by_arm["full_attention"].sleep.window_tokens == 0
    assert not any(block.is_fast_weight for block in by_arm["cleared_cache"].model.blocks)


def test_an_id_is_of_what_shapes_the_result(planned: Plan) -> None:
    config = next(iter(planned.trials.values()))
    for free in ("run.dir", "log.wandb", "checkpoint.keep_last", "eval.every_steps", "run.num_threads"):
        value = {"log.wandb": "offline", "run.dir": "elsewhere"}.get(free, 5)
        assert trial_id(with_changes(config, {free: value})) == trial_id(config)
    for shaping in ("run.seed", "optim.num_steps", "task.steps", "model.d_model"):
        assert trial_id(with_changes(config, {shaping: 40})) != trial_id(config)
    assert trial_id(with_changes(config, {"data.shards": ["a"]})) != trial_id(config)


def test_the_same_study_has_the_same_ids(planned: Plan, tmp_path: Path) -> None:
    again = plan(
        tiny(tmp_path / "elsewhere", "optim.num_steps=1000"), lambda c: 1.0 + 0.3 * c.sleep.num_passes
    )
    assert list(again.trials) == list(planned.trials)


def test_whoever_stops_early_has_whole_seeds(planned: Plan) -> None:
    seeds = [config.run.seed for config in planned.trials.values()]
    assert seeds == sorted(seeds)


def test_seeds_and_difficulty_do_not_change_a_shape(planned: Plan) -> None:
    config = next(iter(planned.trials.values()))
    assert shape_id(with_changes(config, {"run.seed": 9, "task.steps": 9})) == shape_id(config)
    assert shape_id(with_changes(config, {"model.d_model": 32})) != shape_id(config)


def test_arms_and_rates_multiply_the_grid(tmp_path: Path) -> None:
    arms = "study.arms={gated: {}, plain: {model.rule: delta}}"
    rates = "study.best_of={optim.muon_lr: [0.01, 0.02]}"
    planned = plan(tiny(tmp_path, arms, rates, "study.budgets=[tokens]", "study.controls=[]"), lambda c: 1.0)
    assert len(planned.points) == len(planned.trials) == 2 * 2 * 2 * 2
    assert {config.model.rule for config in planned.trials.values()} == {"gated_delta", "delta"}
    assert {point.tried["optim.muon_lr"] for point in planned.points} == {0.01, 0.02}
