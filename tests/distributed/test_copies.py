"""What each rank holds of the model: at the start the same bits as one process has, counted once in all, and
copies of a weight that stay equal."""

import math
from itertools import permutations
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from runs import Piece, assembled, num_ranks, own_rows, rank_backend, weights_of
from small import VOCAB, batch_of, config_of
from torch import Tensor

from sleeptrain.config import Config
from sleeptrain.model.sleep import SleepModel
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.topology import join

pytestmark = pytest.mark.more
EVERY_KIND = {"pattern": "attn gdn swa:4 jet", "learned_initial_state": True, "norm_between_passes": True}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "tp2 pp2 dp2 zero0": {"tensor": 2, "pipeline": 2, "data": 2, "zero_stage": 0, "tie_embeddings": True},
    "tp2 pp2 dp2 zero2": {"tensor": 2, "pipeline": 2, "data": 2, "zero_stage": 2},
    "pp4": {"pipeline": 4, "tie_embeddings": True},
    "tp2 dp2 zero3": {"tensor": 2, "data": 2, "zero_stage": 3, "sequence_parallel": True},
    "dp3 zero1": {"data": 3},
    "dp3 zero3": {"data": 3, "zero_stage": 3, "tie_embeddings": True},
}


class Holding(NamedTuple):
    """At the start: what a rank computes with, what of it is counted in the global norm, and its share of the
    norm of a gradient that is 1 everywhere."""

    weights: list[Piece]
    num_counted: int
    squared_norm: float


def hold(config: Config) -> Holding:
    backend = MegatronDeepspeedBackend(config, VOCAB, join(config.parallel, torch.device("cpu")))
    fragments, update = backend.shards.fragments, backend.update
    ones = [torch.ones_like(f.weight) for f in fragments]
    num_counted = sum(len(f.weight) for f in fragments if update.is_counted(f.held))
    return Holding(weights_of(backend), num_counted, float(update._squared_norm(ones)))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ranks_start_as_one_process_and_count_every_element_once(topology: str) -> None:
    config = config_of(**EVERY_KIND, **TOPOLOGIES[topology])
    model = SleepModel(config.model, config.sleep, VOCAB, config.run.seed)
    ranks = run_ranks(num_ranks(config), hold, config)
    weights = assembled([piece for rank in ranks for piece in rank.weights])
    truth = dict(model.named_parameters())
    assert weights.keys() == truth.keys()
    assert [name for name in truth if not torch.equal(weights[name], truth[name])] == []
    num_elements = sum(p.numel() for p in model.parameters())
    assert sum(rank.num_counted for rank in ranks) == num_elements
    assert math.isclose(sum(rank.squared_norm for rank in ranks), num_elements, rel_tol=1e-6)


def train(config: Config, num_steps: int) -> list[Piece]:
    """The weights at the end."""
    backend = rank_backend(config)
    for seed in range(num_steps):
        batch = batch_of(seed=seed, num_rows=config.data.batch_sequences)
        loss = backend.forward_backward(own_rows(backend, batch), 2).loss
        assert backend.step(1.0, loss).applied
    return weights_of(backend)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_first_and_last_stage_keep_equal_copies(zero_stage: int) -> None:
    """Three replicas: two summands have one order, three have several."""
    shared = {"tie_embeddings": True, "norm_between_passes": True}
    config = config_of(pipeline=2, data=3, zero_stage=zero_stage, batch_sequences=12, **shared)
    ranks = run_ranks(6, train, config, 5)
    for name in ("embed.weight", "final_norm.weight"):
        first, *others = (piece.values for rank in ranks for piece in rank if piece.name == name)
        assert len(others) == 5
        assert all(torch.equal(first, other) for other in others)


def sum_over_ends(config: Config) -> tuple[int, Tensor]:
    """Replica and gradient of a rank that had drawn its own, of sizes far apart."""
    topology = join(config.parallel, torch.device("cpu"))
    draw = torch.Generator().manual_seed(topology.rank)
    gradient = torch.randn(999, generator=draw) * 10 ** (4 * torch.rand(999, generator=draw) - 2)
    assert topology.ends is not None
    MegatronDeepspeedBackend._sum_over_ends(SimpleNamespace(topology=topology), [gradient], topology.ends)
    return topology.replica, gradient


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_what_the_ends_hold_has_one_sum_over_the_replicas_in_any_order(replicas: int) -> None:
    """No library of collectives adds up otherwise than in some order, by twos."""
    ranks = run_ranks(2 * replicas, sum_over_ends, config_of(pipeline=2, data=replicas))
    by_end = [[g for r, g in sorted(end, key=lambda x: x[0])] for end in (ranks[:replicas], ranks[replicas:])]
    truth = by_end[0][0]
    assert truth.abs().min() > 0
    for parts in by_end:
        for a, b, *rest in permutations([*parts, torch.zeros(999)]):
            assert torch.equal(sum(rest, a + b), truth)
            assert torch.equal(a + sum(rest, b), truth)
