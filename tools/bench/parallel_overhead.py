"""What many-process training costs where there is nothing to gain: one process of the parallel backend
against the local one; and two replicas beside plain torch DistributedDataParallel.

All sides train the quickstart model on the same batches, from the same weights, one thread per process, steps
in turn: forward, backward and update. The ratios are megatron_deepspeed / local, with one process and ZeRO
stage 1 (and 0), and megatron_deepspeed / DDP with two processes; DDP has our optimizer. First losses and
gradients are compared: where they differ, no time is given.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from sleeptrain.config import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig
from sleeptrain.data.batch import Batch
from sleeptrain.data.stream import TrainStream
from sleeptrain.parallel.backend import LocalBackend, StepResult
from sleeptrain.parallel.cpu_compat import prepare_deepspeed
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.topology import join
from sleeptrain.tasks import Task, make_task

TOLERANCE = 1e-5  # relative, of a loss and of the gradient of a weight, in float32
CPU = torch.device("cpu")

Times = dict[str, list[measure.Seconds]]


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=30).parse_args()
    measure.begin(["megatron-core", "deepspeed"])
    warnings.simplefilter("ignore")  # the libraries announce themselves at length
    logging.disable(logging.WARNING)
    prepare_deepspeed(CPU)  # imports it once, before the processes are forked
    times = launch(1, one_process, options)
    ratios = {
        name: measure.ratio(times[name], times["local"]) for name in ("parallel, ZeRO 0", "parallel, ZeRO 1")
    }
    print("\none process: milliseconds per step")
    show(times)
    for name, ratio in ratios.items():
        print(f"ratio {name} / local: {ratio}")
    if not options.quick:
        measure.judge("megatron_deepspeed / local, ZeRO 1", ratios["parallel, ZeRO 1"].wall, at_most=1.1)
    times = launch(2, two_replicas, options)
    print("\ntwo replicas, a process each: milliseconds per step")
    show(times)
    print(f"ratio parallel, ZeRO 1 / DDP: {measure.ratio(times['parallel, ZeRO 1'], times['DDP'])}")


def show(times: Times) -> None:
    rows = [
        (name, f"{1e3 * measure.median_wall(side):.2f}", f"{1e3 * measure.least_cpu(side):.2f}")
        for name, side in times.items()
    ]
    measure.show(("", "median", "least cpu"), rows)


def quickstart(quick: bool, **parallel: Any) -> Config:
    config = Config(
        run=RunConfig(device="cpu", num_threads=1),
        parallel=ParallelConfig(backend="megatron_deepspeed", **parallel),
    )
    return replace(config, model=ModelConfig(d_model=32), data=DataConfig(4)) if quick else config


def launch(num_processes: int, function: Callable[[Any], Times], options: Any) -> Times:
    """Runs it in so many processes; the result of the first."""
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("fork").SimpleQueue()
        arguments = (num_processes, folder, function, options, results)
        mp.start_processes(enter, arguments, num_processes, start_method="fork")
        return results.get()


def enter(rank: int, num_processes: int, folder: str, function: Any, options: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed insists
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=num_processes)
    times = function(options)
    if rank == 0:
        results.put(times)
    dist.barrier()
    dist.destroy_process_group()


def one_process(options: Any) -> Times:
    """The local backend and the parallel one of degree 1."""
    config = quickstart(options.quick)
    task = make_task(config.task)
    topology = join(config.parallel, CPU)
    sides: dict[str, Any] = {"local": LocalBackend(config, task.vocab_size)}
    for stage in (0, 1):
        of_stage = quickstart(options.quick, zero_stage=stage)
        sides[f"parallel, ZeRO {stage}"] = MegatronDeepspeedBackend(of_stage, task.vocab_size, topology)
    return in_turn(sides, batches(config, task), config, options.rounds)


def two_replicas(options: Any) -> Times:
    """DDP around the plain model, and the parallel backend with ZeRO 1."""
    config = quickstart(options.quick, data_size=2)
    task = make_task(config.task)
    parallel = MegatronDeepspeedBackend(config, task.vocab_size, join(config.parallel, CPU))
    sides = {"DDP": Ddp(config, task.vocab_size), "parallel, ZeRO 1": parallel}
    return in_turn(sides, batches(config, task), config, options.rounds)


def batches(config: Config, task: Task) -> list[Batch]:
    """Some, with the rows of this replica."""
    size, length = config.data.batch_sequences, config.sleep.window_tokens
    stream = TrainStream(task, 0, size, length, dist.get_rank(), dist.get_world_size())
    return [stream.batch(step) for step in range(8)]


class Ddp(LocalBackend):
    """Plain torch. DistributedDataParallel takes the mean of the replicas' gradients; their rows have equally
    many targets, so that of their mean losses is the gradient of the mean loss over all."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.replicated = DistributedDataParallel(self.model)

    def forward_backward(self, batch: Batch, num_passes: int, traced: bool = False) -> StepResult:
        loss = self.replicated(batch, num_passes).loss_sum / batch.num_targets
        loss.backward()
        return StepResult(loss.detach(), {})


def in_turn(sides: dict[str, Any], data: list[Batch], config: Config, rounds: int) -> Times:
    """Times of steps; the first side is what the others must agree with."""
    plain, *others = sides.values()
    num_passes = config.sleep.num_passes
    losses = {name: side.forward_backward(data[0], num_passes).loss for name, side in sides.items()}
    for side in others:
        require_equal_gradients(side, plain)
    updates = [side.step(1.0, losses[name]) for name, side in sides.items()]
    if max(abs(u.grad_norm / updates[0].grad_norm - 1) for u in updates) > TOLERANCE:
        raise SystemExit(f"the gradient norms differ: {updates}")

    def step(side: Any) -> Callable[[], None]:
        following = cycle(data)
        return lambda: side.step(1.0, side.forward_backward(next(following), num_passes).loss)

    return measure.interleaved({name: step(side) for name, side in sides.items()}, rounds)


def require_equal_gradients(side: Any, plain: LocalBackend) -> None:
    """Of the fragments that this process owns, against those of the whole weights."""
    whole, worst = dict(plain.model.named_parameters()), 0.0
    for fragment, gradient in zip(side.shards.fragments, side.shards.gradients()):
        expected = whole[fragment.held.name].grad
        assert expected is not None
        part = expected.reshape(-1)[fragment.start :][: len(gradient)]
        worst = max(worst, float((gradient - part).norm() / expected.norm()))
    if not worst <= TOLERANCE:
        raise SystemExit(f"the gradients differ by {worst:.1e}, relative")
    if dist.get_rank() == 0:
        print(f"gradients equal: largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
