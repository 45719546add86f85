"""Pipeline parallelism of looped passes: the visits of ``model/visits.py`` over the stages.

Each stage holds a part of each segment, so a visit is one trip round the stages, and the next visit
begins where it ended: visits are virtual stages that share weights. That is megatron-core's interleaved
schedule (arXiv 2104.04473) with one virtual chunk per visit; a single visit is its plain 1F1B. h travels
the ring. What a visit leaves to the next on its own stage (fast weights, convolution tails, surviving
keys and values) stays there: its graph is cut between the two, and an identity on h fetches its gradient
from the later visit, whose backward pass the schedule runs first.

With m microbatches, p stages and V visits the idle share is (p - 1) / (m V + p - 1).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import Carry, PassTrace, SleepModel, Walk
from sleeptrain.model.state import State, map_tensors
from sleeptrain.model.visits import plan
from sleeptrain.model.window_state import Passes
from sleeptrain.parallel.cpu_compat import cuda_means_cpu
from sleeptrain.parallel.mcore import (
    ModelType,
    P2PCommunicator,
    ProcessGroupCollection,
    TransformerConfig,
    schedules,
)
from sleeptrain.parallel.topology import Topology


class Pipeline:
    """Runs microbatches through the stages, forward and backward."""

    def __init__(
        self,
        model: SleepModel,
        topology: Topology,
        sequence_parallel: bool,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.model, self.topology, self.autocast = model, topology, autocast
        self.tokens_divisor = topology.tensor.size() if sequence_parallel else 1
        self.groups = ProcessGroupCollection()
        self.groups.tp, self.groups.pp = topology.tensor, topology.pipeline
        self.groups.embd = self.groups.pos_embd = None
        self.groups.cp = self.groups.dp_cp = _Alone()

    def run(
        self,
        microbatches: Sequence[Batch],
        num_passes: int,
        loss_scale: float,
        forward_only: bool = False,
        trace: list[PassTrace] | None = None,
        states: Sequence[State | None] | None = None,
    ) -> list[Walk]:
        """Walks all microbatches, of equal shape, over all stages, and adds ``loss_scale`` times the
        gradient of their summed loss to the parameters here.

        Returns their walks; on the last stage ``nll`` is filled. ``trace`` collects the norms of all. With
        ``states``, what each starts from, the next batch goes on from what the walks carry in the end.
        """
        trips = _Trips(self.model, microbatches, num_passes, loss_scale, self.autocast, trace, states)
        num_visits, windows = len(trips.visits), trips.windows
        tokens = max((w.stop - w.start for w in windows), default=0) // self.tokens_divisor
        config = self._schedule_config(num_visits)
        chunks = [_Visit(index, config) for index in range(num_visits)]
        arguments: dict[str, Any] = {
            "forward_step_func": trips.step,
            "data_iterator": [iter(range(len(microbatches))) for _ in chunks],
            "model": chunks,
            "num_microbatches": len(microbatches),
            "seq_length": len(microbatches[0].ids),  # the shape of a message is [B, T, D]
            "micro_batch_size": tokens,
            "forward_only": forward_only,
            "p2p_communicator": P2PCommunicator(self.topology.pipeline, config),
            "pg_collection": self.groups,
        }
        trips.message_tokens = tokens
        with cuda_means_cpu(self.topology.device):
            if num_visits > 1:
                schedules.forward_backward_pipelining_with_interleaving(**arguments)
            elif num_visits:
                schedules.forward_backward_pipelining_without_interleaving(**arguments)
        return trips.walks

    def _schedule_config(self, num_visits: int) -> TransformerConfig:
        is_interleaved = num_visits > 1
        return TransformerConfig(
            num_layers=num_visits * self.topology.pipeline.size(),
            hidden_size=self.model.config.d_model,
            num_attention_heads=1,
            pipeline_model_parallel_size=self.topology.pipeline.size(),
            virtual_pipeline_model_parallel_size=num_visits if is_interleaved else None,
            pipeline_dtype=self.model.dtype,
            overlap_p2p_comm=is_interleaved,  # batched, both directions of two stages would mix
            batch_p2p_comm=not is_interleaved,
            batch_p2p_sync=self.topology.device.type == "cuda",
            deallocate_pipeline_outputs=False,
            calculate_per_token_loss=True,  # the schedule leaves the loss as it is
        )


_NOTHING = Carry(Passes.opening(()))


class _Trips:
    """The walks of all microbatches and what connects the graphs of their visits."""

    def __init__(
        self,
        model: SleepModel,
        microbatches: Sequence[Batch],
        num_passes: int,
        loss_scale: float,
        autocast: Callable[[], AbstractContextManager],
        trace: list[PassTrace] | None,
        states: Sequence[State | None] | None,
    ) -> None:
        self.model, self.loss_scale, self.autocast = model, loss_scale, autocast
        self.microbatches, self.num_passes, self.trace = microbatches, num_passes, trace
        self.is_continued, self.states = states is not None, states or [None] * len(microbatches)
        self.windows = model.windows(microbatches[0])
        self.visits = plan(self.windows, num_passes, model.config, model.sleep, self.is_continued)
        self.walks: list[Walk] = []
        self.links: list[_Link] = [_Link()] * len(microbatches)
        self.message_tokens = 0

    def step(self, microbatches: Any, chunk: "_Visit") -> tuple[Tensor, Callable]:
        """One visit of the next microbatch on this stage, as megatron-core's ``forward_step_func``."""
        m, index, received = next(microbatches), chunk.index, chunk.received
        if index == 0:
            start = (self.microbatches[m], self.num_passes, self.states[m])
            self.walks.append(Walk(self.model, *start, self.trace, self.is_continued))
        else:
            self.walks[m].carry = self.links[m].cut(self.walks[m].carry)
        walk, is_final = self.walks[m], index + 1 == len(self.visits)
        window = self.windows[self.visits[index].window]
        h = walk.nll if received is None else self._unpad(received, window.stop - window.start)
        with self.autocast():
            left, loss = walk.visit(index, h)
        scaled = None if loss is None else loss * self.loss_scale
        if is_final:  # without the graph that the next visit would go on from
            walk.carry = map_tensors(Tensor.detach, walk.carry if self.is_continued else _NOTHING)
            if self.model.holds_head and scaled is not None:
                return scaled, _as_loss
        self.links[m] = _Link()
        is_summed = is_final and self.model.holds_head  # megatron-core asks for a number there
        message = walk.nll.new_zeros(()) if is_summed else self._pad(left)
        return self.links[m].tie(message, received, scaled, walk.carry), _as_loss

    def _pad(self, h_BTD: Tensor) -> Tensor:
        """Messages have one shape, that of the longest window, and are contiguous (sequence parallelism
        transposes)."""
        return nn.functional.pad(h_BTD, (0, 0, 0, self.message_tokens - h_BTD.shape[1])).contiguous()

    def _unpad(self, message: Tensor, window_tokens: int) -> Tensor:
        longest = max(w.stop - w.start for w in self.windows)
        return message[:, : self.message_tokens * window_tokens // longest]


class _Link:
    """Between two visits of one microbatch on one stage: cuts the graph of what is carried, and hands the
    gradients over."""

    def __init__(self) -> None:
        self.carried: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def tie(self, message: Tensor, received: Tensor | None, loss: Tensor | None, carry: Carry) -> Tensor:
        """The message as it is; its backward pass brings in the gradients of the carried tensors and of the
        loss, and gives ``received`` one, be it zero: the stage before waits for it."""
        found: dict[int, Tensor] = {}
        map_tensors(lambda x: found.setdefault(id(x), x), carry)
        self.carried = [x for x in found.values() if x.requires_grad]
        return _Tie.apply(self, received, loss, message, *self.carried)

    def cut(self, carry: Carry) -> Carry:
        """The same values as leaves of a new graph; a tensor that is carried twice stays one."""
        leaves: dict[int, Tensor] = {}
        for x in self.carried:
            leaves[id(x)] = x.detach().requires_grad_()
        self.leaves = list(leaves.values())
        cut = map_tensors(lambda x: leaves.get(id(x), x), carry)
        self.carried = []
        return cut


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, link: _Link, received: Tensor | None, loss: Tensor | None, message: Tensor, *carried: Tensor
    ) -> Tensor:
        ctx.link, ctx.num_carried = link, len(carried)
        ctx.received = None if received is None else (received.shape, received.dtype, received.device)
        ctx.loss = None if loss is None else loss.new_ones(())
        return message.view_as(message)

    @staticmethod
    def backward(ctx: Any, d_message: Tensor) -> tuple[Tensor | None, ...]:
        d_received = None
        if ctx.received is not None:
            shape, dtype, device = ctx.received
            d_received = torch.zeros(shape, dtype=dtype, device=device)
        d_carried = [leaf.grad for leaf in ctx.link.leaves] or [None] * ctx.num_carried
        return None, d_received, ctx.loss, d_message, *d_carried


class _Visit(nn.Module):
    """A virtual stage as megatron-core sees it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, index: int, config: TransformerConfig) -> None:
        super().__init__()
        self.index, self.config = index, config
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.received = tensors[0]


class _Alone:
    """A group of this process only, for dimensions that megatron-core knows and we do not use."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _as_loss(loss: Tensor, non_loss_data: bool = False) -> tuple[Tensor, Tensor, dict]:
    return loss, torch.zeros((), dtype=torch.int), {}
