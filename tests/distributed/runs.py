"""A few steps of training, in one process or as one rank of many, and how far apart they end."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from ranks import run_ranks
from small import VOCAB, batch_of, config_of, disturbed, held_out, rows_of
from torch import Tensor

from sleeptrain.config import Config, ParallelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import PassTrace
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.parallel.layout import Box
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.stage import part_of
from sleeptrain.parallel.topology import join

Passes = int | tuple[int, ...]  # N of all steps, or of each
Case = tuple[dict[str, int], Passes, dict[str, Any], dict[str, Any]]  # degrees, N, settings, batch


def of_steps(passes: Passes) -> Iterable[int]:
    return passes if isinstance(passes, tuple) else repeat(passes)


class Piece(NamedTuple):
    """The elements from ``start`` on, in row-major order, of what lies in a box of a logical tensor."""

    name: str
    shape: torch.Size
    box: Box
    start: int
    values: Tensor


class Run(NamedTuple):
    """What training gave; ``gradients`` and ``memory_norms`` are those of the first step, ``weights`` those
    after the last."""

    losses: list[float]
    norms: list[float]
    memory_norms: dict[int, tuple[float, float]]
    gradients: list[Piece]
    weights: list[Piece]
    nll: Tensor
    predictions: Tensor


def train(config: Config, passes: Passes, batches: list[Batch]) -> Run:
    """A step on each batch, then an evaluation of some rows of the last: as a rank."""
    backend = rank_backend(config)
    topology, shards = backend.topology, backend.shards
    result = Run([], [], {}, [], [], torch.empty(0), torch.empty(0))
    for num_passes, batch in zip(of_steps(passes), batches):
        is_first = batch is batches[0]
        forward = backend.forward_backward(own_rows(backend, batch), num_passes, traced=is_first)
        if is_first:
            result.memory_norms.update(forward.memory_norms)
            result.gradients.extend(
                Piece(f.held.name, f.held.shape, f.held.box, f.start, g.clone())
                for f, g in zip(shards.fragments, shards.gradients())
            )
        update = backend.step(0.7, forward.loss)
        assert update.applied
        result.losses.append(update.loss)
        result.norms.append(update.grad_norm)
    output = backend.evaluate(held_out(batches[-1]), num_passes)
    assert output.nll.shape == output.predictions.shape
    topology.barrier()
    return result._replace(weights=weights_of(backend), nll=output.nll, predictions=output.predictions)


def rank_backend(config: Config) -> MegatronDeepspeedBackend:
    """This rank's backend, with weights that are ``disturbed``."""
    backend = MegatronDeepspeedBackend(config, VOCAB, join(config.parallel, torch.device("cpu")))
    with torch.no_grad():
        for held, start, weight in backend.shards.fragments:
            values = part_of(disturbed(held.name, held.shape), held.box).reshape(-1)
            weight.add_(values[start : start + len(weight)])
        backend.shards.refresh(0)
    return backend


def own_rows(backend: MegatronDeepspeedBackend, batch: Batch) -> Batch:
    data = backend.topology.data
    size = len(batch.ids) // data.size()
    return rows_of(batch, slice(data.rank() * size, (data.rank() + 1) * size))


def weights_of(backend: MegatronDeepspeedBackend) -> list[Piece]:
    """What this rank computes with, or owns where it has no more than that."""
    if hasattr(backend.held[0].parameter, "ds_id"):  # ZeRO-3
        return [
            Piece(f.held.name, f.held.shape, f.held.box, f.start, f.weight.clone())
            for f in backend.shards.fragments
        ]
    return [Piece(h.name, h.shape, h.box, 0, h.parameter.detach().flatten().clone()) for h in backend.held]


def train_alone(config: Config, passes: Passes, batches: list[Batch]) -> Run:
    """The same in one process of plain torch."""
    backend = local_backend(config)
    result = Run([], [], {}, [], [], torch.empty(0), torch.empty(0))
    for num_passes, batch in zip(of_steps(passes), batches):
        forward = backend.forward_backward(batch, num_passes)
        if batch is batches[0]:
            trace: list[PassTrace] = []
            with torch.no_grad():
                backend.model(batch, num_passes, trace=trace, is_continued=backend.carried.is_on)
            result.memory_norms.update(norms_of(trace))
            result.gradients.extend(whole(n, p.grad) for n, p in backend.model.named_parameters())
        update = backend.step(0.7, forward.loss)
        assert update.applied
        result.losses.append(update.loss)
        result.norms.append(update.grad_norm)
    output = backend.evaluate(held_out(batches[-1]), num_passes)
    weights = [whole(n, p) for n, p in backend.model.named_parameters()]
    return result._replace(weights=weights, nll=output.nll, predictions=output.predictions)


def local_backend(config: Config) -> LocalBackend:
    eager = replace(config.run, cuda_graphs=False)
    backend = LocalBackend(replace(config, parallel=ParallelConfig(), run=eager), VOCAB)
    with torch.no_grad():
        for name, parameter in backend.model.named_parameters():
            parameter += disturbed(name, parameter.shape)
    return backend


def norms_of(trace: list[PassTrace]) -> dict[int, tuple[float, float]]:
    """By pass, means over sequences and blocks."""
    found = {}
    for n in sorted({t.pass_number for t in trace}):
        of_pass = [torch.stack([t.norm, t.update]).sqrt().flatten(1) for t in trace if t.pass_number == n]
        found[n] = tuple(torch.cat(of_pass, dim=1).mean(1).tolist())
    return found


def whole(name: str, values: Tensor | None) -> Piece:
    assert values is not None, f"the model does not use {name}"
    box = tuple((0, n) for n in values.shape)
    return Piece(name, values.shape, box, 0, values.detach().flatten().clone())


def assembled(pieces: list[Piece]) -> dict[str, Tensor]:
    """The logical tensors; raises AssertionError where an element is missing, or two ranks differ in one."""
    found: dict[str, Tensor] = {}
    for name, shape, box, start, values in pieces:
        tensor = found.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
        part = part_of(tensor, box)
        flat = part.flatten()
        known = flat[start : start + len(values)]
        is_new = known.isnan()
        assert torch.equal(known[~is_new], values[~is_new]), f"ranks differ in {name}"
        flat[start : start + len(values)] = values
        part.copy_(flat.view_as(part))
    missing = [name for name, tensor in found.items() if tensor.isnan().any()]
    assert not missing, f"no rank has all of {missing}"
    return found


class Distance(NamedTuple):
    """Between ranks and the single process: ``losses``, ``nll`` absolute, all else relative; gradients over
    all parameters and of the worst one, in Frobenius norm."""

    losses: float
    nll: float
    norms: float
    memory_norms: float
    gradients: float
    worst_gradient: tuple[float, str]
    worst_weight: tuple[float, str]


def distance(ranks: list[Run], alone: Run) -> Distance:
    """The largest over all ranks."""

    def worst(which: str) -> tuple[float, float, str]:
        ours = assembled([piece for run in ranks for piece in getattr(run, which)])
        truth = assembled(getattr(alone, which))
        assert ours.keys() == truth.keys()
        apart = {name: float((ours[name] - truth[name]).norm()) for name in truth}
        sizes = {name: float(truth[name].norm()) for name in truth}
        total = sum(x**2 for x in apart.values()) ** 0.5 / sum(x**2 for x in sizes.values()) ** 0.5
        return total, *max((apart[name] / sizes[name], name) for name in truth)

    gradients, *worst_gradient = worst("gradients")
    _, *worst_weight = worst("weights")
    return Distance(
        max(abs(a - b) for run in ranks for a, b in zip(run.losses, alone.losses, strict=True)),
        max(float((run.nll - alone.nll).abs().max()) for run in ranks),
        max(abs(a / b - 1) for run in ranks for a, b in zip(run.norms, alone.norms, strict=True)),
        max(
            abs(x / y - 1)
            for run in ranks
            for n in run.memory_norms.keys() | alone.memory_norms.keys()
            for x, y in zip(run.memory_norms[n], alone.memory_norms[n])
        ),
        gradients,
        tuple(worst_gradient),
        tuple(worst_weight),
    )


def num_ranks(config: Config) -> int:
    parallel = config.parallel
    return parallel.tensor_size * parallel.pipeline_size * (parallel.data_size or 1)


def compared(config: Config, passes: Passes, batches: list[Batch]) -> Distance:
    """Between all ranks' runs and that of the single process."""
    ranks = run_ranks(num_ranks(config), train, config, passes, batches)
    return distance(ranks, train_alone(config, passes, batches))


IN_FLOAT32 = Distance(
    losses=1e-5,
    nll=1e-4,
    norms=1e-5,
    memory_norms=1e-5,
    gradients=1e-6,
    worst_gradient=(1e-4, ""),  # of a small one, whose rounding errors come from large ones
    worst_weight=(1e-4, ""),
)


def wrong(case: Case, num_steps: int = 5, factor: float = 1, limits: Distance = IN_FLOAT32) -> set[str]:
    """What is further apart than ``factor`` times what rounding explains."""
    degrees, passes, settings, batch = case
    batches = [batch_of(**batch, seed=seed) for seed in range(num_steps)]
    found = compared(config_of(**degrees, **settings), passes, batches)
    flat = [(x if isinstance(x, float) else x[0]) for x in (*found, *limits)]
    half = len(found)
    return {n for n, x, limit in zip(found._fields, flat[:half], flat[half:]) if not x <= factor * limit}
