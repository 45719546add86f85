"""Mistakes that one could make in ``parallel/``; a test that does not notice them shows nothing."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import Carry
from sleeptrain.model.state import BlockState, State, map_tensors
from sleeptrain.parallel import megatron, pipeline, update, zero
from sleeptrain.parallel.carried import Carried
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.stage import Held, part_of
from sleeptrain.parallel.update import ShardedUpdate
from sleeptrain.parallel.zero import Shards

Fault = Callable[[pytest.MonkeyPatch], None]


def _no_gradient_of(what: str) -> Fault:
    """Of one kind of the tensors that a visit leaves to the next."""

    def detached(carry: Carry) -> Carry:
        if what == "core_left":
            return carry._replace(core_left=map_tensors(Tensor.detach, carry.core_left))

        def of_block(state: BlockState) -> BlockState:
            return state._replace(**{what: map_tensors(Tensor.detach, getattr(state, what))})

        passes = carry.passes
        start, latest = (tuple(of_block(b) for b in state) for state in (passes.start, passes.latest))
        caches = map_tensors(Tensor.detach, passes.caches) if what == "caches" else passes.caches
        return carry._replace(passes=passes._replace(start=start, latest=latest, caches=caches))

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        cut = pipeline._Link.cut
        monkeypatch.setattr(pipeline._Link, "cut", lambda self, carry: detached(cut(self, carry)))

    return inject


def _no_gradient_of_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of windows before the last one with a loss."""
    backward = pipeline._Tie.backward

    def without(ctx: Any, d_message: Tensor) -> tuple[Tensor | None, ...]:
        of_link, d_received, _, *rest = backward(ctx, d_message)
        return (of_link, d_received, None, *rest)

    monkeypatch.setattr(pipeline._Tie, "backward", staticmethod(without))


def _partial_sums_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights whose gradient each tensor rank, or each end stage, sees a part of."""
    monkeypatch.setattr(MegatronDeepspeedBackend, "_sum_partial_gradients", lambda self: None)


def _own_targets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the replicas' means."""
    agreed = MegatronDeepspeedBackend._agreed

    def own(self: MegatronDeepspeedBackend, batch: Batch) -> tuple[Batch, int]:
        return agreed(self, batch)[0], batch.num_targets * self.topology.data.size()

    monkeypatch.setattr(MegatronDeepspeedBackend, "_agreed", own)


def _replicas_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replica updates with its own gradients alone."""
    monkeypatch.setattr(zero, "all_reduce_flat", lambda tensors, group: None)


def _engine_takes_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over replicas in place of the sum."""
    make = megatron.make_shards

    def shards(*arguments: Any) -> Shards:
        made = make(*arguments)
        made.loss_factor = 1.0
        return made

    monkeypatch.setattr(megatron, "make_shards", shards)


def _muon_on_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank orthogonalises what it holds of a matrix."""

    def gathered(self: ShardedUpdate, group: list[Held], owned: dict[str, tuple[int, Tensor]]) -> Tensor:
        matrices = torch.zeros(len(group), *group[0].shape)
        for matrix, held in zip(matrices, group):
            start, values = owned.get(held.name, (0, matrix.new_empty(0)))
            part = part_of(matrix, held.box)
            flat = part.flatten()
            flat[start : start + len(values)] = values
            part.copy_(flat.view_as(part))
        return matrices

    monkeypatch.setattr(ShardedUpdate, "_gathered", gathered)


def _copies_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the global norm."""
    monkeypatch.setattr(ShardedUpdate, "is_counted", lambda self, held: True)


def _bad_numbers_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = SimpleNamespace(isfinite=lambda x: True, nan=math.nan, sqrt=math.sqrt, prod=math.prod)
    monkeypatch.setattr(update, "math", blind)


def _nothing_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ranks; one process goes on as it should."""
    read = Carried.read
    monkeypatch.setattr(
        Carried, "read", lambda self, rows: None if dist.is_initialized() else read(self, rows)
    )


def _rows_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of a replica goes on with the state of its neighbour."""
    read = Carried.read

    def mixed(self: Carried, rows: slice) -> State | None:
        state = read(self, rows)
        is_alone = state is None or not dist.is_initialized()
        return state if is_alone else map_tensors(lambda x: x.roll(1, 0), state)

    monkeypatch.setattr(Carried, "read", mixed)


FAULTS: dict[str, Fault] = {
    **{f"no gradient of {what}": _no_gradient_of(what) for what in ("memory", "caches", "tail", "core_left")},
    "no gradient of losses": _no_gradient_of_losses,
    "partial sums skipped": _partial_sums_skipped,
    "own targets only": _own_targets_only,
    "replicas apart": _replicas_apart,
    "engine takes a mean": _engine_takes_a_mean,
    "Muon on parts": _muon_on_parts,
    "copies counted": _copies_counted,
    "bad numbers applied": _bad_numbers_applied,
    "nothing carried": _nothing_carried,
    "rows mixed": _rows_mixed,
}
