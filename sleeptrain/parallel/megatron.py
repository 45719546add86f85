"""The backend of many processes: megatron-core's groups, layers and schedule, DeepSpeed's ZeRO, our
optimizer step.

It gives the losses and gradients of one process, in another order of sums.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from sleeptrain.checkpoint.initial import InitialWeights
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.slices import Slice
from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.halting import Stop
from sleeptrain.model.sleep import Output, PassTrace
from sleeptrain.parallel.backend import StepResult, UpdateResult, autocast, speed_up
from sleeptrain.parallel.carried import Carried, Part
from sleeptrain.parallel.cpu_compat import cuda_means_cpu
from sleeptrain.parallel.integrity import Integrity
from sleeptrain.parallel.layout import is_on_both_ends
from sleeptrain.parallel.pipeline import Pipeline
from sleeptrain.parallel.rows import micro_batch_of
from sleeptrain.parallel.stage import build_stage, initial_values
from sleeptrain.parallel.topology import Group, Topology, all_reduce_flat
from sleeptrain.parallel.update import ShardedUpdate
from sleeptrain.parallel.zero import make_shards
from sleeptrain.schema import ConfigError


class MegatronDeepspeedBackend:
    """This process's part of the run. ``batch`` of a step is this replica's rows; of an evaluation it is the
    whole, and so is the answer, on every process."""

    def __init__(self, config: Config, vocab_size: int, topology: Topology) -> None:
        self.config, self.topology, self.device = config, topology, topology.device
        self.model, self.held = build_stage(config, vocab_size, topology)
        self.shards = make_shards(self.model, self.held, config, topology)
        speed_up(self.model, config)
        self.update = ShardedUpdate(self.shards, self.held, config.optim, topology)
        if config.parallel.weights == "bfloat16":
            self._fill_masters()
        is_checked = config.run.check_replicas_every_steps and topology.data.size() > 1
        self.integrity = Integrity(self.update, topology) if is_checked else None
        rows, heads = (Part(group.rank(), group.size()) for group in (topology.data, topology.tensor))
        self.carried = Carried(self.model, config.data.batch_sequences, rows, heads)
        self.pipeline: Pipeline | None = None
        if topology.pipeline.size() > 1:
            self.pipeline = Pipeline(self.model, topology, config.parallel.sequence_parallel, self._autocast)

    def forward_backward(self, batch: Batch, num_passes: int, traced: bool = False) -> StepResult:
        """Gradients of the mean loss over the targets of all replicas; ``loss`` is this process's part of
        it."""
        batch, num_targets = self._agreed(batch)
        trace: list[PassTrace] = []
        with self.shards.reduced_at_end():
            nll = self._backward(
                batch, num_passes, self.shards.loss_factor / num_targets, trace if traced else None
            )
            self._sum_partial_gradients()
        speaks = self.topology.is_last_stage and self.topology.tensor.rank() == 0
        loss = nll / num_targets if speaks else torch.zeros_like(nll)
        return StepResult(loss + self.carried.doubt(), self._mean_norms(trace, num_passes) if traced else {})

    def step(self, lr_factor: float, loss: Tensor, max_norm: float = math.inf) -> UpdateResult:
        if self.integrity:
            self.integrity.before_update()
        result = self.update.step(lr_factor, loss, max_norm)
        self.carried.settle(result.applied)
        if self.integrity:
            self.integrity.after_update()
        return result

    def check_replicas(self) -> str | None:
        return self.integrity.check() if self.integrity else None

    @torch.no_grad()
    def evaluate(self, batch: Batch, num_passes: int, stop: Stop | None = None) -> Output:
        """Rows are spread over the replicas; every process gets all results. Raises ConfigError for a rule,
        for processes would differ in what they skip."""
        if stop is not None:
            raise ConfigError(
                f"tolerance={stop.tolerance} stops sequences one by one, and here many processes pass over "
                "them together; evaluate the checkpoint in one process, or with a fixed N"
            )
        data, pipeline = self.topology.data, self.topology.pipeline
        num_rows = len(batch.ids)
        per_replica = -(-num_rows // (data.size() * pipeline.size())) * pipeline.size()
        mine = torch.arange(data.rank() * per_replica, (data.rank() + 1) * per_replica) % num_rows
        part = batch.rows(mine).to(self.device)
        if self.pipeline is None:
            with self._autocast(), self._compatible():
                output = self.shards.model(part, num_passes)
            nll, predictions = output.nll, output.predictions
        else:
            size = per_replica // pipeline.size()
            parts = [part.rows(slice(i, i + size)) for i in range(0, per_replica, size)]
            walks = self.pipeline.run(parts, num_passes, 1.0, forward_only=True)
            nll = torch.cat([walk.nll for walk in walks])
            predictions = torch.cat([walk.predictions for walk in walks])
            last = dist.get_global_rank(pipeline, pipeline.size() - 1)
            for result in (nll, predictions):
                dist.broadcast(result, last, group=pipeline)
        nll, predictions = (self._of_all_replicas(x)[:num_rows] for x in (nll, predictions))
        return Output(nll.sum(), nll, predictions, ())

    def slices(self) -> dict[str, list[Slice]]:
        """What this process alone holds of the logical tensors."""
        return self.update.slices() | self.carried.slices()

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Takes over weights, optimizer state and what is carried, which any topology wrote, reading what it
        needs of them."""
        self.update.load(checkpoint)
        self.carried.load(checkpoint)
        if self.integrity:
            self.integrity.look()

    @torch.no_grad()
    def start_from(self, weights: InitialWeights) -> None:
        """Takes over weights that another run made, its own part of each; the rest stays as it was drawn."""
        self.update.start_from(weights)
        if self.integrity:
            self.integrity.look()

    @torch.no_grad()
    def _fill_masters(self) -> None:
        """With what was drawn, not with what bfloat16 left of it."""
        for fragment in self.shards.fragments:
            values = initial_values(fragment.held, self.config).reshape(-1)
            fragment.weight.copy_(values[fragment.start : fragment.start + len(fragment.weight)])

    def _backward(self, batch: Batch, num_passes: int, scale: float, trace: list[PassTrace] | None) -> Tensor:
        """Adds the gradients of ``scale`` times the summed loss; returns the summed loss that was seen
        here."""
        micro, carried = micro_batch_of(self.config, len(batch.ids)), self.carried
        spans = [slice(start, start + micro) for start in range(0, len(batch.ids), micro)]
        if self.pipeline is not None:
            parts = [batch.rows(rows).to(self.device) for rows in spans]
            states = [carried.read(rows) for rows in spans] if carried.is_on else None
            walks = self.pipeline.run(parts, num_passes, scale, trace=trace, states=states)
            for rows, walk in zip(spans, walks):
                carried.write(rows, walk.carry.passes.start)
            return torch.stack([walk.nll.sum() for walk in walks]).sum()
        total = torch.zeros((), device=self.device)
        for rows in spans:
            part, state = batch.rows(rows).to(self.device), carried.read(rows)
            with self._compatible():
                with self._autocast():
                    # By name: of what comes in order ZeRO-3 hands on copies.
                    options = {"state": state, "trace": trace, "is_continued": carried.is_on}
                    output = self.shards.model(part, num_passes, **options)
                    loss = output.loss_sum * scale
                loss.backward()
            total += output.loss_sum.detach()
            carried.write(rows, output.state)
        return total

    def _agreed(self, batch: Batch) -> tuple[Batch, int]:
        """The batch with the window plan of all replicas, and the number of all their targets."""
        speaks = self.topology.model.rank() == 0
        told = torch.tensor([batch.num_targets, *batch.windows_with_loss], dtype=torch.int64) * speaks
        dist.all_reduce(told, group=self.topology.host)
        num_targets, *counts = told.tolist()
        return batch.with_windows(tuple(count > 0 for count in counts)), num_targets

    def _sum_partial_gradients(self) -> None:
        """Of weights that every tensor rank holds and sees a part of; of those that both end stages hold."""
        topology = self.topology
        if topology.tensor.size() > 1:
            partial = [h.parameter for h in self.held if h.split.is_summed]
            all_reduce_flat([_gradient(p) for p in partial], topology.tensor)
        if topology.pipeline.size() > 1 and topology.ends is not None:
            shared = [h for h in self.held if is_on_both_ends(h.name, self.config)]
            in_order = sorted(shared, key=lambda h: h.name)
            self._sum_over_ends([_gradient(h.parameter) for h in in_order], topology.ends)

    def _sum_over_ends(self, gradients: list[Tensor], ends: Group) -> None:
        """Over the replicas, too, and first. Two summands have one sum, so what the two stages then hold is
        the same to the last bit; else their copies of a weight would drift apart. The first replica keeps it
        and the others hold zeros: in the sum over replicas that follows no order can change a bit."""
        if self.topology.data.size() > 1:
            all_reduce_flat(gradients, self.topology.data)
        all_reduce_flat(gradients, ends)
        if self.topology.replica > 0:
            for gradient in gradients:
                gradient.zero_()

    def _mean_norms(self, trace: list[PassTrace], num_passes: int) -> dict[int, tuple[float, float]]:
        sums = torch.zeros(num_passes, 3, device=self.device)
        if trace:
            all_reduce_flat([x for t in trace for x in (t.norm, t.update)], self.topology.tensor)
        for t in trace:
            sums[t.pass_number - 1, 0] += t.norm.sqrt().sum()
            sums[t.pass_number - 1, 1] += t.update.sqrt().sum()
            sums[t.pass_number - 1, 2] += t.norm.numel()
        dist.all_reduce(sums)
        rows = enumerate(sums.tolist(), start=1)
        return {n: (norm / count, update / count) for n, (norm, update, count) in rows if count}

    def _of_all_replicas(self, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(self.topology.data.size())]
        dist.all_gather(gathered, rows.contiguous(), group=self.topology.data)
        return torch.cat(gathered)

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.config, self.device)

    def _compatible(self) -> AbstractContextManager:
        return cuda_means_cpu(self.device) if self.config.parallel.sequence_parallel else nullcontext()


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
