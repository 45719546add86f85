"""A loss or gradient that is not finite on one rank alone: every rank leaves every bit as it was, and goes on
as one process that met the same."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from faults import FAULTS
from ranks import run_ranks
from runs import Piece, assembled, local_backend, num_ranks, own_rows, rank_backend, weights_of
from small import batch_of, config_of
from torch import Tensor

from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend

pytestmark = pytest.mark.more


class Refused(NamedTuple):
    """What the refused step said, the bits before and after it, and the losses of all other steps."""

    applied: bool
    before: list[Tensor]
    after: list[Tensor]
    losses: list[float]
    weights: list[Piece]


def bits(backend: MegatronDeepspeedBackend) -> list[Tensor]:
    """A copy of all that an update changes here."""
    shards, update = backend.shards, backend.update
    moments = [shards.moment(i, k) for i in range(len(shards.fragments)) for k in ("exp_avg", "exp_avg_sq")]
    masters = [f.weight for f in shards.fragments]
    own = [piece.values for piece in weights_of(backend)]
    return [x.detach().clone() for x in (*own, *masters, *moments, *update.momenta.values())]


def refuse(config: Config, batches: list[Batch], where: str, rank: int, value: float) -> Refused:
    """One good step, one that ``rank`` alone spoils, three good ones."""
    backend = rank_backend(config)
    losses, result = [], ()
    for i, batch in enumerate(batches):
        is_spoilt = i == 1 and backend.topology.rank == rank
        with spoilt_gradient(backend, value) if is_spoilt and where == "gradient" else nullcontext():
            loss = backend.forward_backward(own_rows(backend, batch), 2).loss
        if is_spoilt and where == "loss":
            loss = torch.full_like(loss, value)
        before = bits(backend)
        update = backend.step(0.7, loss)
        if i == 1:
            result = update.applied, before, bits(backend)
        else:
            assert update.applied, f"step {i}: {update}"
            losses.append(update.loss)
    return Refused(*result, losses, weights_of(backend))


@contextmanager
def spoilt_gradient(backend: MegatronDeepspeedBackend, value: float) -> Iterator[None]:
    """One element of what comes back to the output of an MLP."""

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0] = value
        return gradient

    def watch(module: Any, arguments: Any, output: Tensor) -> None:
        output.register_hook(spoil)

    block = next(block for block in backend.model.stack.blocks if block is not None)
    handle = block.mlp.register_forward_hook(watch)
    yield
    handle.remove()


def alone(config: Config, batches: list[Batch]) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps without the second, which came to nothing."""
    backend = local_backend(config)
    losses = []
    for i, batch in enumerate(batches):
        loss = backend.forward_backward(batch, 2).loss
        losses.append(backend.step(0.7, loss if i != 1 else torch.tensor(torch.nan)).loss)
    return losses[:1] + losses[2:], {n: p.detach() for n, p in backend.model.named_parameters()}


def check(config: Config, where: str, rank: int, value: float) -> None:
    batches = [batch_of(seed=seed) for seed in range(5)]
    ranks = run_ranks(num_ranks(config), refuse, config, batches, where, rank, value)
    losses, weights = alone(config, batches)
    for refused in ranks:
        assert not refused.applied
        assert all(torch.equal(a, b) for a, b in zip(refused.before, refused.after, strict=True))
        assert refused.losses == pytest.approx(losses, abs=1e-5)
    ours = assembled([piece for refused in ranks for piece in refused.weights])
    for name, truth in weights.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-4, atol=1e-5, msg=name)


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "dp2 zero0": {"data": 2, "zero_stage": 0},
    "dp2 zero1": {"data": 2, "zero_stage": 1},
    "dp2 zero2": {"data": 2, "zero_stage": 2},
    "dp2 zero3": {"data": 2, "zero_stage": 3},
    "dp2 zero1 offload": {"data": 2, "zero_stage": 1, "offload_optimizer": True},
    "dp2 zero2 offload": {"data": 2, "zero_stage": 2, "offload_optimizer": True},
    "tp2 pp2 zero0": {"tensor": 2, "pipeline": 2, "zero_stage": 0},
    "tp2 pp2 zero1": {"tensor": 2, "pipeline": 2, "zero_stage": 1},
}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_all_ranks_refuse_what_one_has(topology: str, where: str) -> None:
    check(config_of(**TOPOLOGIES[topology]), where, 1, torch.nan if where == "loss" else torch.inf)


def test_it_notices_an_update_from_bad_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["bad numbers applied"](monkeypatch)
    with pytest.raises(AssertionError):
        check(config_of(**TOPOLOGIES["dp2 zero1"]), "loss", 1, torch.nan)
