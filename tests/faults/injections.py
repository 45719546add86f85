"""Whole runs of one or many ranks with faults inside: bad numbers and flipped bits at a chosen place of a
chosen step. The ranks are forked, and a fault is put in place in the child."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from e2e_runs import TINY
from ranks import run_ranks
from torch import Tensor

from sleeptrain.engine import trainer as engine
from sleeptrain.engine.trainer import Trainer
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import State, Tokens
from sleeptrain.model.visits import Visit
from sleeptrain.parallel.backend import Backend, LocalBackend, StepResult
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.update import ShardedUpdate
from sleeptrain.pretrain import main

NUM_STEPS = 12
SETTINGS = [
    *TINY,
    *(f"optim.num_steps={NUM_STEPS}", "checkpoint.every_steps=5", "eval.every_steps=0", "log.every_steps=1"),
    *("sleep.num_passes=3", "eval.num_passes=[]", "run.num_threads=1"),
]
TOPOLOGIES: dict[str, tuple[int, list[str]]] = {
    "local": (1, []),
    "dp2 zero0": (2, ["parallel.data_size=2", "parallel.zero_stage=0"]),
    "dp2 zero1": (2, ["parallel.data_size=2", "parallel.zero_stage=1"]),
    "dp2 zero2": (2, ["parallel.data_size=2", "parallel.zero_stage=2"]),
    "dp2 zero3": (2, ["parallel.data_size=2", "parallel.zero_stage=3"]),
    "pp2": (2, ["parallel.pipeline_size=2"]),
    "dp3 zero0": (3, ["parallel.data_size=3", "parallel.zero_stage=0", "data.batch_sequences=9"]),
    "dp3 zero1": (3, ["parallel.data_size=3", "parallel.zero_stage=1", "data.batch_sequences=9"]),
    "tp2 dp2": (4, ["parallel.tensor_size=2", "parallel.data_size=2", "parallel.zero_stage=0"]),
}


class Report(NamedTuple):
    """Of one rank: its exit code, the steps (from 0) whose update was refused, and the weights and moments
    that changed all the same."""

    code: int
    refused: list[int]
    changed: list[str]


class Now:
    """In a child: the step that is being computed, how often it has been begun, and by what."""

    step, times_begun = -1, 0
    backend: Backend


Fault = Callable[[int], None]  # put in place in the child of this rank


def run(folder: Path, topology: str, *settings: str, faults: tuple[Fault, ...] = ()) -> list[Report]:
    """By rank. What they print is in the logs of the run folder."""
    num_ranks, degrees = TOPOLOGIES[topology]
    return run_ranks(num_ranks, _run, [f"run.dir={folder}", *SETTINGS, *degrees, *settings], faults)


def _run(arguments: list[str], faults: tuple[Fault, ...]) -> Report:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    engine.draw_learning_curve = lambda *arguments: []
    gc.freeze()  # the trainer collects garbage, and would look through all that the test's process holds
    refused, changed = _observe()
    for fault in faults:
        fault(int(os.environ["RANK"]))
    return Report(main(arguments), refused, changed)


def _observe() -> tuple[list[int], list[str]]:
    refused: list[int] = []
    changed: list[str] = []
    begun: dict[int, int] = {}
    train_step = Trainer.train_step

    def observed(trainer: Trainer) -> Any:
        Now.step, Now.backend = trainer.step, trainer.backend
        begun[Now.step] = Now.times_begun = begun.get(Now.step, 0) + 1
        before = {name: x.clone() for name, x in held(trainer.backend).items()}
        result = train_step(trainer)
        if trainer.guard.warning:
            refused.append(Now.step)
            after = held(trainer.backend)
            changed.extend(name for name, x in before.items() if not _same_bits(x, after[name]))
        return result

    Trainer.train_step = observed  # type: ignore[method-assign]
    return refused, changed


def held(backend: Backend) -> dict[str, Tensor]:
    """All that an update changes in this process."""
    if isinstance(backend, LocalBackend):
        return {f"{group}/{s.name}": s.values for group, slices in backend.slices().items() for s in slices}
    assert isinstance(backend, MegatronDeepspeedBackend)
    found = {f"weight/{h.name}": h.parameter.data for h in backend.held}
    for i, f in enumerate(backend.shards.fragments):
        found[f"master/{f.held.name}"] = f.weight
        found |= {f"{key}/{f.held.name}": x for key, x in backend.update.moments(i).items()}
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def log_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank_{rank}.log").read_text()


def bad_memory(step: int, block: int, pass_number: int, value: float, rank: int = 0) -> Fault:
    """One element of the fast weights that a block leaves after a pass."""

    def spoil(memory: Tensor) -> Tensor:
        spoilt = memory.clone()
        spoilt[0, 0, 0, 0] = value
        return spoilt

    return _at_memory(step, block, pass_number, rank, spoil)


def bad_gradient(step: int, block: int, pass_number: int, value: float, rank: int = 0) -> Fault:
    """One element of the gradient that comes back to those fast weights."""

    def hooked(memory: Tensor) -> Tensor:
        memory = memory.view_as(memory)
        memory.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
        return memory

    return _at_memory(step, block, pass_number, rank, hooked)


def _at_memory(
    step: int, block: int, pass_number: int, rank: int, change: Callable[[Tensor], Tensor]
) -> Fault:
    """Of the first window. A stage that does not hold the block has nothing to change."""

    def fault(own_rank: int) -> None:
        run_blocks = SleepModel.run

        def changed(
            model: SleepModel, h: Tensor, state: State, tokens: Tokens, visit: Visit, weights: Tensor | None
        ) -> tuple[Tensor, State]:
            left, after = run_blocks(model, h, state, tokens, visit, weights)
            is_here = own_rank == rank and block in model.held[visit.segment]
            place = (visit.window, visit.pass_number)
            if is_here and place == (0, pass_number) and Now.step == step and torch.is_grad_enabled():
                states = list(after)
                states[block] = after[block]._replace(memory=change(after[block].memory))
                after = tuple(states)
            return left, after

        SleepModel.run = changed  # type: ignore[method-assign]

    return fault


def bad_loss(step: int, value: float, rank: int = 0) -> Fault:
    """The loss that a rank tells of its part of a batch."""

    def change(backend: Backend, result: StepResult) -> StepResult:
        return result._replace(loss=torch.full_like(result.loss, value))

    return after_backward(step, change, rank)


def spike(step: int, factor: float) -> Fault:
    """All gradients, on all ranks."""

    def change(backend: Backend, result: StepResult) -> StepResult:
        for gradient in gradients_of(backend):
            gradient.mul_(factor)
        return result

    return after_backward(step, change)


def bad_copy(step: int, value: float, rank: int) -> Fault:
    """One element of a rank's own copy of the gradient, after the replicas have summed theirs."""

    def change(backend: Backend, result: StepResult) -> StepResult:
        gradients_of(backend)[0][0] = value
        return result

    return after_backward(step, change, rank)


def gradients_of(backend: Backend) -> list[Tensor]:
    if isinstance(backend, LocalBackend):
        return [p.grad for p in backend.model.parameters() if p.grad is not None]
    assert isinstance(backend, MegatronDeepspeedBackend)
    return backend.shards.gradients()


def after_backward(
    step: int, change: Callable[[Backend, StepResult], StepResult], rank: int | None = None
) -> Fault:
    """Without ``rank`` on all of them."""

    def fault(own_rank: int) -> None:
        if rank not in (None, own_rank):
            return
        for kind in (LocalBackend, MegatronDeepspeedBackend):
            kind.forward_backward = _then(kind.forward_backward, step, change)  # type: ignore[method-assign]

    return fault


def _then(forward_backward: Any, step: int, change: Callable[[Backend, StepResult], StepResult]) -> Any:
    def changed(backend: Backend, *arguments: Any) -> StepResult:
        result = forward_backward(backend, *arguments)
        return change(backend, result) if Now.step == step else result

    return changed


FLIPS = {
    "step": (MegatronDeepspeedBackend, "forward_backward"),
    "update": (ShardedUpdate, "step"),
    "evaluation": (Trainer, "_evaluate"),
}


def flipped_bit(where: str, step: int, tensor: str, bit: int, rank: int, times: int = 1) -> Fault:
    """In a tensor of ``held``, before the gradients of a step are computed, or after an update or an
    evaluation; also the next times that the step is made."""

    def fault(own_rank: int) -> None:
        if own_rank != rank:
            return
        owner, name = FLIPS[where]
        work = getattr(owner, name)

        def flipping(*arguments: Any) -> Any:
            is_due = step == Now.step and Now.times_begun <= times
            if is_due and where == "step":
                flip(held(Now.backend)[tensor], bit)
            result = work(*arguments)
            if is_due and where != "step":
                flip(held(Now.backend)[tensor], bit)
            return result

        setattr(owner, name, flipping)

    return fault


def flip(values: Tensor, bit: int) -> None:
    """Of the element in the middle."""
    middle = values.view(-1).view(torch.int32)[values.numel() // 2 :][:1]
    middle.bitwise_xor_(torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32))
