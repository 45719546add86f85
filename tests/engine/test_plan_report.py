"""What a dry run prints, against the plan and the arithmetic of cost."""

from dataclasses import replace

import pytest

from sleeptrain.config import (
    Config,
    DataConfig,
    DepoConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Rule110Config,
    SleepConfig,
)
from sleeptrain.engine.plan_report import human, plan_report, window_notation
from sleeptrain.model import flops
from sleeptrain.model.visits import cut, plan
from sleeptrain.parallel.layout import shares_of_stage
from sleeptrain.parallel.rank_memory import rank_bytes
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

SLEEP = SleepConfig(window_tokens=24, num_passes=3)
RULE110 = Config(
    task=Rule110Config(width=24, num_strings=4, steps=32), sleep=SLEEP, data=DataConfig(batch_sequences=8)
)


def report(config: Config) -> str:
    return plan_report(config, make_task(config.task))


def row(text: str, start: str) -> list[str]:
    """The words of the one line that starts with this word."""
    lines = [line.split() for line in text.splitlines() if line.split()[:1] == [start]]
    assert len(lines) == 1
    return lines[0]


def test_automaton_of_the_paper() -> None:
    text = report(RULE110)
    assert "windows 24x4/4, hard eviction; visits at N = 3" in text
    assert text.count("sleeps    core 1-3  end of core 3") == 4
    assert "96..99  predicts  core 1\n" in text
    assert max(map(len, text.splitlines())) < 100


def test_depo_of_the_paper() -> None:
    text = report(
        replace(RULE110, task=DepoConfig(), sleep=SleepConfig(window_tokens=75), data=DataConfig(8))
    )
    assert "windows 75x4/60" in text
    assert text.count("sleeps") == 4
    assert text.count("predicts") == 1


def test_costs_are_those_of_flops() -> None:
    config = replace(RULE110, eval=EvalConfig(num_passes=(6,)))
    text = report(config)
    windows = cut(100, 24, (False,) * 4 + (True,))
    table = [line for line in text.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"], ["4"], ["6"])]
    for line, n in zip(table[-5:], (1, 2, 3, 4, 6)):  # the windows come before
        visits = plan(windows, n, config.model, SLEEP)
        cost = flops.training_flops(config.model, SLEEP, windows, visits, 6)
        ratio = flops.pass_ratio(config.model, SLEEP, windows, 6, n)
        held = [
            flops.activation_bytes(config.model, SLEEP, windows, visits, 6, per_pass)
            for per_pass in (False, True)
        ]
        numbers = [human(value / 100) for value in cost] + [f"{ratio:.2f}"] + [human(value) for value in held]
        assert line.split() == f"{n} {len(visits)} {' '.join(numbers)}".split()


def test_parameters_and_fixed_memory_are_those_of_flops() -> None:
    text = report(RULE110)
    parts = flops.count_parameters(RULE110.model, SLEEP, 6)
    assert row(text, "mlp") == f"mlp {human(parts.mlp)}".split()
    assert f"  total           {human(sum(parts))}\n" in text
    fixed = flops.fixed_bytes(RULE110.model, SLEEP, 6)
    assert row(text, "optimizer") == f"optimizer {human(fixed.optimizer)}".split()
    assert f"fast weights: {human(flops.state_bytes(RULE110.model))} B/sequence" in text


def test_schedules_add_over_a_growing_n() -> None:
    sleep = replace(SLEEP, num_passes=2, passes_schedule="growing")
    config = replace(RULE110, sleep=sleep, optim=OptimConfig(num_steps=100, warmup_steps=10))
    text = report(config)
    assert "steps: 10 warm-up, 60 stable, 30 decay" in text
    assert "growing; steps: 25 with N = 1, 75 with N = 2" in text
    windows = cut(100, 24, (False,) * 4 + (True,))
    costs = [
        flops.training_flops(config.model, sleep, windows, plan(windows, n, config.model, sleep), 6).model
        for n in (1, 2)
    ]
    assert "8 sequences, 800 tokens" in text
    assert f"80 K tokens, {human(8 * (25 * costs[0] + 75 * costs[1]))} FLOP training" in text


def test_predicting_windows_that_sleep_and_blocks_that_do_not_loop() -> None:
    model = ModelConfig(prelude_blocks=1, coda_blocks=1)
    sleep = replace(SLEEP, schedule="predict_then_consolidate", passes_schedule="sampled", num_passes=40)
    text = report(replace(RULE110, model=model, sleep=sleep))
    assert "sleeps    prelude 1, core 1-40, coda 40" not in text
    assert "predicts  prelude 1, core 1, coda 1" in text
    assert "passes 2-40" in text
    assert max(map(len, text.splitlines())) < 100


def test_a_model_without_fast_weights_is_shown_at_one_pass() -> None:
    text = report(
        replace(RULE110, model=ModelConfig(pattern="attn attn"), sleep=replace(SLEEP, num_passes=1))
    )
    assert text.count("not run") + text.count("all\n") > 0
    assert "R(N)" in text
    assert "\n  2 " not in text.split("R(N)")[1]


def test_every_stage_of_a_pipeline_has_its_lines() -> None:
    parallel = ParallelConfig(tensor_size=2, pipeline_size=2, data_size=2)
    config = replace(RULE110, parallel=parallel, sleep=replace(SLEEP, norm_between_passes=True))
    text = report(config)
    assert "ranks: tensor 2 x pipeline 2 x data 2, ZeRO 1" in text
    windows = cut(100, 24, (False,) * 4 + (True,))
    for stage, held in ((0, "core 0-1  embed, final_norm"), (1, "core 2-3  final_norm, head")):
        first, second = [line for line in text.splitlines() if line.startswith(f"  {stage}  ")][-2:]
        needed = rank_bytes(config, 6, windows, 2, stage)
        parameters = human(sum(share.num_elements for share in shares_of_stage(config, 6, stage)))
        assert held in first
        assert parameters in first
        assert second.endswith(human(needed.total))
    assert max(map(len, text.splitlines())) < 100
    assert "ranks:" not in report(RULE110)


def test_degrees_that_do_not_divide_are_refused_before_anything_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pipeline_size=3 does not divide"):
        report(replace(RULE110, parallel=ParallelConfig(pipeline_size=3)))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1 K"), (1234567, "1.23 M"), (3.1e17, "310 P"), (2e18, "2 E")],
)
def test_human_sizes(number, text) -> None:
    assert human(number) == text


def test_window_notation() -> None:
    assert window_notation(cut(100, 24, (True,) * 5)) == "24x4/4"
    assert window_notation(cut(96, 24, (True,) * 4)) == "24x4"
    assert window_notation(cut(10, 0, (True,))) == "10x1"
