"""What fits, what is proposed, and what bad input gets. That the bytes are right is shown in
tests/parallel/test_layout.py."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sleeptrain.parallel.check import check_degrees
from sleeptrain.parallel.rank_memory import rank_bytes
from sleeptrain.pretrain import compose_config

SCRIPT = Path(__file__).parents[2] / "tools" / "estimate.py"
spec = importlib.util.spec_from_file_location("estimate", SCRIPT)
estimate = importlib.util.module_from_spec(spec)
sys.modules["estimate"] = estimate
spec.loader.exec_module(estimate)

SMALL = ["experiment=rule110_paper", "data.batch_sequences=32"]


def run(capsys, *arguments):
    code = estimate.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def proposed(settings, gpus, gib):
    config = compose_config(settings)
    return estimate.propose(config, estimate.describe(config), gpus, int(gib * 2**30))


@pytest.mark.parametrize("gpus", [1, 2, 8, 32])
def test_proposals_pass_the_checks_of_a_run_and_fit(gpus) -> None:
    found = proposed(SMALL, gpus, 8)
    assert found
    for c in found:
        parallel = c.config.parallel
        facts = estimate.describe(c.config)
        assert check_degrees(c.config, facts.vocab_size, facts.sequence_tokens, gpus) == c.replicas
        assert parallel.tensor_size <= 8
        assert c.memory.total <= 8 * 2**30
        for stage in range(parallel.pipeline_size):
            needed = rank_bytes(c.config, facts.vocab_size, facts.windows, c.replicas, stage).total
            assert needed <= c.memory.total
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)


def test_the_settings_of_a_proposal_are_arguments_of_a_run() -> None:
    [best, *_] = proposed(SMALL, 8, 8)
    assert compose_config([*SMALL, *estimate.settings_of(best).split()]) == best.config


def test_less_memory_asks_for_checkpointing() -> None:
    plenty, little = proposed(SMALL, 1, 80)[0], proposed(SMALL, 1, 0.1)[0]
    assert plenty.config.sleep.activation_checkpointing == "none"
    assert little.config.sleep.activation_checkpointing != "none"
    assert little.seconds > plenty.seconds


def test_bubble_is_the_formula() -> None:
    config = compose_config([*SMALL, "sleep.num_passes=2", "data.micro_batch_sequences=4"])
    config = replace(config, parallel=replace(config.parallel, pipeline_size=2))
    facts = estimate.describe(config)
    candidate = estimate.judge(config, facts, 1)
    num_visits = 4 * 2 + 1  # four windows to sleep on, one with the answers
    assert candidate.bubble == pytest.approx(1 / (8 * num_visits + 1))


def test_more_passes_need_more_memory_unless_checkpointed() -> None:
    def needed(num_passes, policy):
        config = compose_config([*SMALL, f"sleep.num_passes={num_passes}"])
        config = replace(config, sleep=replace(config.sleep, activation_checkpointing=policy))
        return estimate.judge(config, estimate.describe(config), 1).memory.activations

    growth = {policy: needed(4, policy) - needed(2, policy) for policy in ("none", "pass")}
    assert 0 < growth["pass"] < 0.15 * growth["none"]


@pytest.mark.parametrize("option", ["offload_optimizer=true", "weights=bfloat16"])
def test_options_that_need_zero_1_or_2_are_proposed_so_and_need_less(option) -> None:
    with_option, without = (proposed([*SMALL, *more], 8, 8) for more in ([f"parallel.{option}"], []))
    assert {c.config.parallel.zero_stage for c in with_option} <= {1, 2}

    def least(found):
        return min(c.memory.weights + c.memory.masters + c.memory.optimizer for c in found)

    assert least(with_option) < least(without)


def test_a_layout_that_fits_and_one_that_does_not(capsys) -> None:
    layout = ["parallel=tp2_pp2_dp2", "gpus=8"]
    code, text, _ = run(capsys, *SMALL, *layout, "gpu_gib=8")
    assert code == 0
    assert "tensor 2 x pipeline 2 x data 2" in text
    assert re.search(r"^  it fits: .* of 8 GiB$", text, re.MULTILINE)
    code, text, _ = run(capsys, *SMALL, *layout, "gpu_gib=0.05")
    assert code == 1
    assert "it does not fit" in text


def test_where_nothing_fits_the_smallest_layout_is_told(capsys) -> None:
    code, text, _ = run(capsys, *SMALL, "gpus=2", "gpu_gib=0.001")
    assert code == 1
    assert "nothing fits on 2 GPUs: parallel.tensor_size=" in text
    assert "layouts that fit" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gpus=0"], "gpus=0 must be a whole number in 1..4096"),
        (["gpus=5000"], "gpus=5000 must be a whole number in 1..4096"),
        (["gpu_gib=much"], "gpu_gib=much must be a number above 0"),
        (["gpus=7"], "no layout spreads data.batch_sequences=32"),
        (["gpus=4", "parallel=tp2_pp2_dp2"], "needs 8 processes and there are 4"),
        (["gpus=8", "modle=tiny"], "modle"),
        (["gpus=3", "parallel.pipeline_size=3"], "parallel.pipeline_size=3 does not divide"),
        (["gpus=1", "eight"], "'eight' is no setting"),
    ],
)
def test_bad_input_gets_one_sentence(capsys, arguments, sentence) -> None:
    code, _, text = run(capsys, *SMALL, *arguments)
    assert code == 2
    assert sentence in text
    assert text.count("\n") == 1


def test_help_explains(capsys) -> None:
    code, text, _ = run(capsys, "--help")
    assert code == 0
    for word in ("gpus=", "gpu_gib=", "memory:", "ranking:", "exit code"):
        assert word in text
