"""Limiting cases, directions, and every closed form against something found without it: simulated kills, a
brute-force search, the estimate of another tool, figures measured in small runs."""

import math
import re
import sys
from functools import lru_cache
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # as where the script itself runs
import cluster_costs  # noqa: E402
import estimate  # noqa: E402
import simulate  # noqa: E402
import simulate_report  # noqa: E402
from cluster_costs import Cluster, Faults, best_interval, goodput, goodput_of_kills  # noqa: E402

SMALL = ("experiment=rule110_paper", "data.micro_batch_sequences=2")
FAULTS = Faults(stall=2.0, durable=15.0, recovery=200.0, mtbf=4000.0)


@lru_cache
def composed(settings):
    config = simulate.compose([*SMALL, *settings])
    return config, estimate.describe(config)


def point(gpus, *settings, sequences=8, interval=None, num_passes=None, **assumed):
    config, run = composed(settings)
    if num_passes:
        config = simulate.with_passes(config, num_passes)
    return simulate.point(run, sequences, interval, Cluster(**assumed), config, gpus)


def run(capsys, *arguments):
    code = simulate.main([*arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Goodput.


def test_without_failures_only_the_stall_is_lost() -> None:
    faults = FAULTS._replace(mtbf=math.inf)
    assert goodput(faults, 98.0) == 0.98
    assert goodput(FAULTS._replace(mtbf=1e15), 98.0) == pytest.approx(0.98, rel=1e-9)
    assert best_interval(faults, 1.0) == math.inf
    assert goodput(faults, math.inf) == 1


@pytest.mark.parametrize("mtbf", [400.0, 4000.0, 40_000.0])
@pytest.mark.parametrize("interval", [20.0, 120.0, 600.0])
@pytest.mark.parametrize("durable", [0.0, 15.0])
def test_goodput_is_that_of_simulated_kills(mtbf, interval, durable) -> None:
    faults = FAULTS._replace(mtbf=mtbf, durable=durable)
    found = goodput_of_kills(faults, interval, int(8e6 / mtbf), 1)
    assert goodput(faults, interval) == pytest.approx(found, abs=0.006)


@pytest.mark.parametrize("forgotten", ["stall", "durable", "recovery"])
def test_simulated_kills_notice_a_formula_that_forgets_a_part(forgotten) -> None:
    """The negative control."""
    faults = FAULTS._replace(mtbf=400.0)
    wrong = goodput(faults._replace(**{forgotten: 0.0}), 60.0)
    assert abs(wrong - goodput_of_kills(faults, 60.0, 20_000, 1)) > 0.008


def test_the_rule_of_thumb_holds_where_failures_are_rare_and_only_there() -> None:
    def distance(mtbf):
        faults = FAULTS._replace(mtbf=mtbf)
        interval = best_interval(faults, 1.0)
        return abs(cluster_costs.goodput_first_order(faults, interval) - goodput(faults, interval))

    assert distance(1e6) < 1e-3
    assert distance(400.0) > 0.05


@pytest.mark.parametrize("mtbf", [300.0, 4000.0, 1e6])
@pytest.mark.parametrize("stall", [0.1, 2.0, 60.0])
def test_no_interval_is_better_than_the_best(mtbf, stall) -> None:
    faults = Faults(stall, 0.0, 200.0, mtbf)
    best = goodput(faults, best_interval(faults, 0.0))
    assert max(goodput(faults, 1.02**k) for k in range(-200, 800)) <= best + 2e-4


def test_the_best_interval_is_youngs_where_stalls_are_short() -> None:
    assert best_interval(Faults(0.01, 0, 0, 1e6), 0.0) == pytest.approx(math.sqrt(2 * 0.01 * 1e6), rel=1e-3)


def test_an_interval_is_at_least_a_step_and_a_durable_save() -> None:
    assert best_interval(FAULTS._replace(stall=0.0), 1.0) == FAULTS.durable
    assert best_interval(FAULTS._replace(stall=0.0), 70.0) == 70.0
    assert best_interval(FAULTS._replace(stall=1e6), 1.0) == FAULTS.mtbf


@pytest.mark.parametrize("worse", [{"stall": 4.0}, {"durable": 60.0}, {"recovery": 400.0}, {"mtbf": 2000.0}])
def test_goodput_falls_with_each_fault(worse) -> None:
    assert goodput(FAULTS._replace(**worse), 120.0) < goodput(FAULTS, 120.0)


def test_hopeless_runs_have_none() -> None:
    assert goodput(FAULTS._replace(mtbf=1e-3), 1e9) == 0


# A step.


def test_one_gpu_has_neither_bubble_nor_traffic() -> None:
    step = point(1, num_passes=4).step
    assert step.seconds == step.compute_seconds > 0
    assert step.bubble == 0


@pytest.mark.parametrize("gpus", [8, 64, 4096])
@pytest.mark.parametrize("degrees", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_step_is_that_of_the_estimate_but_for_the_hops(gpus, degrees) -> None:
    tensor, pipeline = degrees
    settings = (
        f"parallel.tensor_size={tensor}",
        f"parallel.pipeline_size={pipeline}",
        "model.vocab_multiple=8",
    )
    config, facts = composed(settings)
    laid_out, replicas = cluster_costs.on_gpus(config, facts, gpus, 8)
    expected = estimate.judge(laid_out, facts, replicas)
    step = point(gpus, *settings, hop_seconds=0.0).step
    assert step.seconds == pytest.approx(expected.seconds)
    assert step.bubble == pytest.approx(expected.bubble)
    assert step.rank_bytes == expected.memory.total
    assert (step.tensor_seconds > 0) == (tensor > 1)
    assert (step.data_seconds > 0) == (replicas > 1)


def test_hops_add_their_latency_for_each_replica() -> None:
    """With ZeRO 1 three trips of a single bucket over 63 hops."""
    with_hops, without = (point(64, hop_seconds=s).step.data_seconds for s in (5e-6, 0.0))
    assert with_hops - without == pytest.approx(3 * 63 * 5e-6)


def test_passes_fill_the_pipeline() -> None:
    points = [point(8, "parallel.pipeline_size=4", num_passes=n) for n in (1, 2, 4)]
    for n, p in zip((1, 2, 4), points):
        num_visits = 4 * n + 1  # four windows to sleep on, one with the answers
        assert p.step.num_visits == num_visits
        assert p.step.bubble == pytest.approx(3 / (p.step.num_micro * num_visits + 3))
    data = [p.step.data_seconds for p in points]
    assert data == [data[0]] * 3  # gradients are summed once, whatever N is
    seconds = [p.step.seconds for p in points]
    assert seconds == sorted(seconds)


def test_more_gpus_make_more_tokens_and_less_goodput() -> None:
    points = [point(gpus, "parallel.pipeline_size=2") for gpus in (8, 64, 512, 4096, 16384)]
    goodputs = [p.goodput for p in points]
    assert goodputs == sorted(goodputs, reverse=True)
    tokens = [p.tokens_per_second for p in points]
    assert tokens == sorted(tokens)
    each = [p.tokens_per_second / p.gpus for p in points]
    assert each == sorted(each, reverse=True)


def test_times_that_are_given_are_taken() -> None:
    p = point(
        8, interval=500.0, checkpoint_seconds=3.0, load_seconds=7.0, detect_seconds=1.0, mtbf_gpu_hours=80.0
    )
    assert p.interval == 500
    assert p.faults.stall == 3
    assert p.faults.mtbf == 10 * 3600
    assert p.faults.recovery == 7 + 1 + Cluster().restart_seconds + Cluster().first_step_seconds


def test_a_save_copies_each_element_of_weights_and_moments_once() -> None:
    alone, many = (point(gpus, save_overhead_seconds=0.0).faults for gpus in (1, 64))
    assert alone.stall == pytest.approx(64 * many.stall)
    assert alone.durable == pytest.approx(64 * many.durable)


# What was measured, and the command line.


def test_measured_figures_are_those_of_the_log() -> None:
    log = (TOOLS.parent / "LOG.md").read_text()
    for (p, n), share in simulate_report.MEASURED_BUBBLE.items():
        assert re.search(rf"^\| {p} \| {n} \| [\d.]+ \| {share:.2f} \|", log, re.MULTILINE)
    for n, ratio in simulate_report.MEASURED_TIME_OVER_FLOPS.items():
        assert re.search(rf"^\| {n} \| \**{ratio:.3f}\**[ |]", log, re.MULTILINE)
    parts = simulate_report.MEASURED_RESTART_SECONDS
    assert f"(imports {parts['imports']}, load {parts['load']}, step {parts['step']})" in log
    assert f"{simulate_report.MEASURED_RESTART_TOTAL_SECONDS} s from the command" in log
    assert f"stall {cluster_costs.STALL_OVER_COPY} of a memcpy" in log
    soak = simulate_report.MEASURED_SOAK
    assert f"Effective training time {simulate_report.MEASURED_SOAK_PERCENT:.2f} %" in log
    assert (
        f"{simulate_report.MEASURED_SOAK_INTERVAL_SECONDS} s of training, stall {1e3 * soak.stall:.1f} ms"
        in log
    )
    for seconds in (simulate_report.MEASURED_STALL_SECONDS, simulate_report.MEASURED_DURABLE_SECONDS):
        assert f"| {1e3 * seconds:.1f} |" in log


def test_formulas_are_near_what_was_measured(capsys) -> None:
    code, text, _ = run(capsys, "--validate")
    assert code == 0
    for name, bound in (
        ("bubble", 0.1),
        ("T(N)", 0.08),
        ("recovery", 0.1),
        ("soak", 0.02),
        ("goodput", 0.002),
    ):
        ratios = [
            float(x) for x in re.findall(rf"^{re.escape(name)}.* ([\d.]+)  (?:measured|\d+ sim)", text, re.M)
        ]
        assert ratios
        assert max(abs(ratio - 1) for ratio in ratios) < bound


def test_the_default_is_the_model_of_the_paper(capsys, tmp_path) -> None:
    code, text, _ = run(
        capsys, "--gpus", "8,16384", "--num-passes", "1,4", "--figure", f"{tmp_path}/new/scale"
    )
    assert code == 0
    assert "1.45 B parameters" in text
    assert re.search(r"^ +16384 .*", text, re.MULTILINE)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"scale.svg", "scale.png"}


def test_settings_of_a_run_choose_another_model(capsys) -> None:
    code, text, _ = run(
        capsys, *SMALL, "--gpus", "8", "parallel=pp2", "--num-passes", "2", "--mtbf-gpu-hours", "inf"
    )
    assert code == 0
    assert "tensor 1 x pipeline 2" in text
    assert "never" in text
    assert "100.00" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "0"], "'0' must be whole numbers in 1..131072"),
        (["--gpus", "many"], "'many' must be whole numbers"),
        (["--replica-sequences", "1,2"], "'1,2' must be one number"),
        (["--mtbf-gpu-hours", "-5"], "'-5' must be a number above 0"),
        (["--checkpoint-seconds", "nan"], "'nan' must be a number from 0 up"),
        (["--interval-seconds", "inf"], "'inf' must be a number above 0"),
        (["--interval-seconds", "1e-6"], "--interval-seconds=1e-06 is below the"),
        (["--figures", "x"], "--figures"),
        (["--gpus", "6", "parallel=pp4"], "do not divide the 6"),
        (["--replica-sequences", "3", "--gpus", "1"], "data.micro_batch_sequences=2 does not divide"),
        (["--gpus", "1", "--num-passes", "1", "--figure", f"{__file__}/x"], "--figure cannot be written"),
        (["modle=tiny"], "modle"),
        (["eight"], "'eight' is no setting"),
    ],
)
def test_bad_input_gets_one_sentence(capsys, arguments, sentence) -> None:
    code, _, text = run(capsys, *SMALL, *arguments)
    assert code == 2
    assert sentence in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_passes_need_something_to_write(capsys) -> None:
    code, _, text = run(capsys, *SMALL, "baseline=transformer", "--gpus", "1", "--num-passes", "2")
    assert code == 2
    assert "num_passes=2 needs a gdn or jet block" in text


def test_help_explains(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        simulate.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--mtbf-gpu-hours",
        "--checkpoint-seconds",
        "--figure",
        "goodput:",
        "exit code",
        "docs/scale.md",
    ):
        assert word in text


def test_the_documents_table_is_what_the_tool_prints(capsys) -> None:
    _, text, _ = run(capsys)
    printed = [line for line in text.splitlines() if re.match(r" +\d", line)]
    page = (TOOLS.parent / "docs" / "scale.md").read_text()
    assert len(printed) == len(simulate.GPUS) + len(simulate.PASSES)
    for line in printed:
        assert line in page


def test_defaults_of_the_options_are_those_of_the_cluster() -> None:
    assert simulate.cluster_of(simulate.parse([])) == Cluster()
