"""Rows that go on from batch to batch, over ranks: the losses of one process, a skipped update, and what a
topology saved taken over by any other."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faults import FAULTS
from ranks import run_ranks
from runs import Case, local_backend, num_ranks, own_rows, rank_backend, wrong
from small import CARRY, batch_of, config_of

from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend

TEXT = CARRY | {"schedule": "predict_then_consolidate"}
SLIDING = TEXT | {"eviction": "sliding"}
TP2, PP2, DP2, EVERY = {"tensor": 2}, {"pipeline": 2}, {"data": 2}, (0, 1, 2)
DOCUMENTS = {"loss_windows": EVERY, "resets": True}

CASES: dict[str, Case] = {
    "tp2": (TP2, 3, SLIDING | {"pattern": "attn jet swa:9 gdn"}, DOCUMENTS),
    "pp2": (PP2, 3, TEXT | {"coda_blocks": 1, "pattern": "attn gdn attn gdn gdn"}, DOCUMENTS),
    "dp2 zero1": (DP2, 3, SLIDING | {"micro_batch_sequences": 2}, DOCUMENTS | {"padded": True}),
    "tp2 pp2": (TP2 | PP2, 3, SLIDING | {"pattern": "attn gdn"}, DOCUMENTS | {"padded": True}),
}
MORE: dict[str, Case] = {
    "pp2, one pass": (PP2, 1, SLIDING | {"tie_embeddings": True}, DOCUMENTS),
    "pp2, one visit": (PP2, 1, TEXT | {"window_tokens": 0}, DOCUMENTS),
    "pp2, windows without a loss at the end": (PP2, 3, CARRY, {"loss_windows": (0,)}),
    "pp4": ({"pipeline": 4}, 3, SLIDING | {"activation_checkpointing": "pass"}, DOCUMENTS),
    "dp2 zero0, per pass": (
        DP2,
        (3, 1, 4, 2, 3),
        SLIDING | {"zero_stage": 0, "sliding_kv": "per_pass"},
        DOCUMENTS,
    ),
    "dp2 zero2": (DP2, 3, SLIDING | {"zero_stage": 2, "activation_checkpointing": "block"}, DOCUMENTS),
    "dp2 zero3": (
        DP2,
        3,
        SLIDING | {"zero_stage": 3, "activation_checkpointing": "both", "learned_initial_state": True},
        DOCUMENTS,
    ),
    "tp2, tokens split": (TP2, 3, SLIDING | {"sequence_parallel": True, "dropout": 0.2}, DOCUMENTS),
    "tp2 pp2 dp2": (
        TP2 | PP2 | DP2,
        3,
        SLIDING | {"pattern": "attn gdn", "backprop_passes": 1, "micro_batch_sequences": 1},
        DOCUMENTS | {"padded": True},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ranks_go_on_as_one_process(case: Case) -> None:
    assert wrong(case) == set()


@pytest.mark.more
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_ranks_go_on_as_one_process_with_other_settings(case: Case) -> None:
    assert wrong(case) == set()


@pytest.mark.more
@pytest.mark.parametrize("topology", CASES)
@pytest.mark.parametrize("fault", ["nothing carried", "rows mixed"])
def test_it_notices(topology: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    assert wrong(CASES[topology], num_steps=2, factor=10) >= {"norms"}


Backend = LocalBackend | MegatronDeepspeedBackend
SETTINGS = SLIDING | {"pattern": "attn gdn jet swa:9", "muon_lr": 1e-3, "adamw_lr": 1e-3}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "single": {"micro_batch_sequences": 4},
    "tp2": TP2 | {"zero_stage": 0},
    "pp2": PP2 | {"micro_batch_sequences": 1},
    "dp2": DP2 | {"zero_stage": 2},
    "tp2 pp2 dp2": TP2 | PP2 | DP2,
    "dp2 zero3": DP2 | {"zero_stage": 3, "micro_batch_sequences": 2},
}
BATCHES = [batch_of(**DOCUMENTS, padded=True, seed=seed) for seed in range(4)]
MIDDLE = 2


def topology_of(name: str) -> Config:
    return config_of(**TOPOLOGIES[name], **SETTINGS)


def run(name: str, batches: list[Batch], start: Path | None, end: Path | None) -> list[float]:
    """The losses, the same of all ranks; from one checkpoint to another."""
    config = topology_of(name)
    if name == "single":
        return train(local_backend(config), batches, start, end)
    first, *others = run_ranks(num_ranks(config), _train_as_rank, config, batches, start, end)
    assert all(losses == first for losses in others)
    return first


def _train_as_rank(config: Config, batches: list[Batch], start: Path | None, end: Path | None) -> list[float]:
    return train(rank_backend(config), batches, start, end)


def train(backend: Backend, batches: list[Batch], start: Path | None, end: Path | None) -> list[float]:
    if start:
        backend.load(Checkpoint(start / "step_00000001"))
    losses = []
    for batch in batches:
        mine = own_rows(backend, batch) if isinstance(backend, MegatronDeepspeedBackend) else batch
        update = backend.step(1.0, backend.forward_backward(mine, 3).loss)
        assert update.applied
        losses.append(update.loss)
    if end:
        place = getattr(backend, "topology", None)
        ranks = (place.rank, place.world_size, place.barrier) if place else ()
        saver = Saver(end, 1, 0, *ranks)
        saver.save(1, backend.slices(), {})
        assert saver.wait() is None
    return losses


class Halves(NamedTuple):
    """One process: the losses of all batches, and the folder of what it saved in the middle."""

    losses: list[float]
    folder: Path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder = tmp_path_factory.mktemp("carried") / "single"
    run("single", BATCHES[:MIDDLE], None, folder)
    return Halves(run("single", BATCHES, None, None), folder)


def some(name: str) -> Any:
    """One of all is in the fast core."""
    return pytest.param(name, marks=() if name == "pp2" else pytest.mark.more)


@pytest.mark.parametrize("name", map(some, TOPOLOGIES))
def test_a_topology_goes_on_from_what_another_saved(name: str, alone: Halves) -> None:
    """R15. Rows, heads, blocks and microbatches are cut otherwise."""
    assert run(name, BATCHES[MIDDLE:], alone.folder, None) == pytest.approx(alone.losses[MIDDLE:], abs=1e-5)


@pytest.mark.more
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_topology_goes_on_bit_for_bit_and_saves_what_any_other_saves(
    name: str, alone: Halves, tmp_path: Path
) -> None:
    """R1, R15."""
    whole = run(name, BATCHES, None, None)
    assert run(name, BATCHES[:MIDDLE], None, tmp_path / name) == whole[:MIDDLE]
    assert run(name, BATCHES[MIDDLE:], tmp_path / name, None) == whole[MIDDLE:]
    ours, truth = (Checkpoint(f / "step_00000001") for f in (tmp_path / name, alone.folder))
    assert sorted(ours.names("carried")) == sorted(truth.names("carried"))
    kinds = {part.split(".", 2)[2] for part in ours.names("carried")}
    assert kinds >= {"memory", "tail.q", "tail.v", "caches.0.keys", "caches.0.positions", "caches.0.valid"}
    for part in truth.names("carried"):
        torch.testing.assert_close(
            ours.read("carried", part), truth.read("carried", part), rtol=1e-4, atol=1e-4, msg=part
        )


@pytest.mark.more
def test_it_notices_a_state_that_is_not_taken_over(alone: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeptrain.parallel.carried.Carried.load", lambda self, checkpoint: None)
    losses = run("dp2", BATCHES[MIDDLE:], alone.folder, None)
    assert abs(losses[0] - alone.losses[MIDDLE]) > 1e-4


def skip_one(config: Config) -> list[float]:
    """Three batches, of which rank 1 alone spoils what the second leaves."""
    backend = rank_backend(config)
    losses = []
    for step, batch in enumerate(BATCHES[:3]):
        write = backend.carried.write
        if step == 1 and backend.topology.rank == 1:
            backend.carried.write = lambda rows, state, write=write: write(
                rows, tuple(s if s.memory is None else s._replace(memory=s.memory / 0) for s in state)
            )
        loss = backend.forward_backward(own_rows(backend, batch), 3).loss
        backend.carried.write = write
        update = backend.step(1.0, loss)
        assert update.applied == (step != 1)
        losses.append(update.loss)
    return losses


@pytest.mark.more
@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2"])
def test_all_ranks_skip_what_one_left_and_go_on_from_the_batch_before(name: str) -> None:
    """R10."""
    expected = run("single", [BATCHES[0], BATCHES[2]], None, None)
    for losses in run_ranks(2, skip_one, topology_of(name)):
        assert [losses[0], losses[2]] == pytest.approx(expected, abs=1e-5)
