"""Frozen and scaled weights on tensor, pipeline and data parallel ranks: frozen ones stay, the others learn
what they learn in one process, and a checkpoint holds the same moments."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import Piece, assembled, local_backend, num_ranks, own_rows, rank_backend, weights_of, whole
from small import batch_of, config_of

from sleeptrain.config import Config
from sleeptrain.optim.patterns import fits

pytestmark = pytest.mark.more
NUM_STEPS, NUM_PASSES = 3, 2
ONE_BLOCK = ("*", "!stack.blocks.1.*")


def train(config: Config) -> tuple[list[float], list[Piece], set[str]]:
    """As a rank: norms of the gradient, weights, and what of the optimizer is saved."""
    backend = rank_backend(config)
    norms = []
    for seed in range(NUM_STEPS):
        result = backend.forward_backward(own_rows(backend, batch_of(seed=seed)), NUM_PASSES)
        norms.append(backend.step(0.7, result.loss).grad_norm)
    return norms, weights_of(backend), {piece.name for piece in backend.slices()["optimizer"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor": 2, "frozen": ONE_BLOCK},
        {"pipeline": 2, "frozen": ONE_BLOCK},
        {"data": 2, "zero_stage": 0, "frozen": ("embed.*",), "scaled": ONE_BLOCK},
        {"data": 2, "zero_stage": 2, "frozen": ("stack.blocks.*.mlp.*", "embed.*", "*norm*")},
        {"data": 2, "zero_stage": 3, "frozen": ONE_BLOCK, "scaled": ("*.mlp.*",)},
        {"data": 2, "zero_stage": 1, "offload_optimizer": True, "frozen": ("stack.*",)},
    ],
    ids=["tp2", "pp2", "dp2", "zero2", "zero3", "offload"],
)
def test_ranks_freeze_what_one_process_freezes(settings: dict[str, Any]) -> None:
    config = config_of(**settings)
    alone = local_backend(config)
    before = {name: p.detach().clone() for name, p in alone.model.named_parameters()}
    norms = []
    for seed in range(NUM_STEPS):
        result = alone.forward_backward(batch_of(seed=seed), NUM_PASSES)
        norms.append(alone.step(0.7, result.loss).grad_norm)
    expected = assembled([whole(name, p) for name, p in alone.model.named_parameters()])
    ranks = run_ranks(num_ranks(config), train, config)
    found = assembled([piece for _, pieces, _ in ranks for piece in pieces])
    assert found.keys() == expected.keys()
    for name, values in found.items():
        if fits(name, config.optim.frozen):
            assert torch.equal(values, before[name]), name
        else:
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5, msg=name)
            assert not torch.equal(values, before[name]), name
    for of_rank, _, _ in ranks:
        assert of_rank == pytest.approx(norms, rel=1e-4)
    saved = set().union(*(names for _, _, names in ranks))
    assert saved == alone.optimizer.state().keys()
