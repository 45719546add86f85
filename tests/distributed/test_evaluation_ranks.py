"""Evaluation of any number of rows gives every rank what one process finds, and disturbs no training."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import local_backend, num_ranks, own_rows, rank_backend
from small import batch_of, config_of

from sleeptrain.config import Config
from sleeptrain.model.halting import Stop
from sleeptrain.model.sleep import Output
from sleeptrain.schema import ConfigError

pytestmark = pytest.mark.more
ROWS = (1, 2, 3, 5, 8)
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "tp2 pp2 dp2": {"tensor": 2, "pipeline": 2, "data": 2},
    "pp4": {"pipeline": 4, "eviction": "sliding"},
    "dp3 zero3": {"data": 3, "zero_stage": 3, "batch_sequences": 3},
    "tp2": {"tensor": 2, "sequence_parallel": True},
}


def evaluate(config: Config, num_passes: int) -> list[Output]:
    backend = rank_backend(config)
    return [backend.evaluate(batch_of(num_rows=n, loss_windows=(0, 2)), num_passes) for n in ROWS]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("num_passes", [1, 3])
def test_every_rank_gets_all_rows(topology: str, num_passes: int) -> None:
    config = config_of(**TOPOLOGIES[topology])
    backend = local_backend(config)
    expected = [backend.evaluate(batch_of(num_rows=n, loss_windows=(0, 2)), num_passes) for n in ROWS]
    for outputs in run_ranks(num_ranks(config), evaluate, config, num_passes):
        for output, truth in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output.nll, truth.nll, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output.loss_sum, truth.loss_sum)
            assert torch.equal(output.predictions, truth.predictions)


def refusal(config: Config) -> str:
    try:
        rank_backend(config).evaluate(batch_of(), 3, Stop(0.1))
    except ConfigError as error:
        return str(error)
    return "none"


def test_processes_do_not_stop_row_by_row() -> None:
    assert "in one process" in run_ranks(1, refusal, config_of(data=1))[0]


def train(config: Config, evaluates: bool) -> list[float]:
    backend = rank_backend(config)
    losses = []
    for seed in range(3):
        result = backend.forward_backward(own_rows(backend, batch_of(seed=seed)), 2)
        losses.append(backend.step(0.7, result.loss).loss)
        if evaluates:
            backend.evaluate(batch_of(num_rows=3, seed=seed), 1)
    return losses


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_training_goes_on_as_without_it(zero_stage: int) -> None:
    config = config_of(data=2, zero_stage=zero_stage)
    assert run_ranks(2, train, config, True) == run_ranks(2, train, config, False)
