"""Passes as CUDA graphs: one graph for each kind of pass, replayed over all passes, windows and steps.

A pass of a small batch is thousands of short kernels, and starting them one by one takes longer than running
them. A graph starts them at once, but has its tensors in fixed places. So what enters a pass is copied there
and what leaves is copied out; the forward graph keeps no activations, and the backward graph computes the
pass again from what had entered (checkpointing per pass) and goes back through it. The weights are in fixed
places, too: copies in the type that multiplies, made once per forward pass over the batch, beside sums of
their gradients over all passes, which are handed to autograd once.

A kind of pass is the blocks, what is read, and the shapes of all that enters. On a CPU the same work is done
without a graph, which is how the tests see it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sleeptrain.model.hybrid import HybridStack
from sleeptrain.model.layers import linear_maps
from sleeptrain.model.state import BlockState, State, Tokens, map_tensors

WARM_UPS = 3  # before a graph is recorded: kernels are compiled, workspaces made


class PassGraphs:
    """The graphs of a stack, and what they share. ``autocast_dtype``: in which linear maps multiply; None: in
    the type of the weights."""

    def __init__(self, stack: HybridStack, autocast_dtype: torch.dtype | None = None) -> None:
        self.stack, self.autocast_dtype = stack, autocast_dtype
        self.parameters = dict(stack.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        linears = linear_maps(stack) if autocast_dtype else ()
        low = {f"{name}.{own}" for name, linear in linears for own, _ in linear.named_parameters()}
        self.copies = {
            name: torch.empty_like(p, dtype=autocast_dtype if name in low else p.dtype)
            .detach()
            .requires_grad_(p.requires_grad)
            for name, p in self.parameters.items()
        }
        self.sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self.parameters.items()
            if p.requires_grad
        }
        # One for all: nothing in it outlives a replay, for what enters and leaves lies outside.
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._caller = _Caller(stack)
        self._kinds: dict[Any, _Kind] = {}

    def begin(self) -> Tensor:
        """Takes the weights as they are now. All passes of a forward pass over a batch are given what this
        returns; through it their gradients reach the parameters."""
        return _Weights.apply(self, *self.parameters.values())

    def run(
        self,
        weights: Tensor,
        h_BTD: Tensor,
        state: State,
        tokens: Tokens,
        blocks: range,
        is_read: bool,
        checkpoint_blocks: bool,
    ) -> tuple[Tensor, State]:
        """``HybridStack.forward`` with the weights that ``begin`` took."""
        entering = (h_BTD, state[blocks.start : blocks.stop])
        settings = (blocks, is_read, checkpoint_blocks)
        key = (settings, map_tensors(lambda x: (x.shape, x.dtype), (entering, tokens)))
        if key not in self._kinds:
            self._kinds[key] = _Kind(self, entering, tokens, settings)
        kind = self._kinds[key]
        if torch.is_grad_enabled():
            kind.prepare_backward()
        left = _Replay.apply(kind, weights, *leaves((entering, tokens)))
        h_BTD, of_blocks = with_leaves(kind.left, left)
        return h_BTD, (*state[: blocks.start], *of_blocks, *state[blocks.stop :])

    def with_copies(self, work: Callable[[], Any]) -> Any:
        """Does work that calls the stack, which then has the copies for its weights."""
        replaced = {f"stack.{name}": copy for name, copy in self.copies.items()}
        autocast = torch.autocast(
            self.device.type,
            self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,  # a graph must not depend on what was cast before it
        )
        with autocast:
            return torch.func.functional_call(self._caller, replaced, (work,))


class _Kind:
    """Passes of one kind: the places of all that enters and leaves, and the work between them."""

    def __init__(
        self, graphs: PassGraphs, entering: tuple[Tensor, State], tokens: Tokens, settings: tuple
    ) -> None:
        self.graphs, self.settings = graphs, settings
        self.entering = map_tensors(_place, (entering, tokens))
        self.inputs = leaves(self.entering)
        # Detached, else the places would keep the passes before, and these the graphs.
        fill(self.inputs, [x.detach() for x in leaves((entering, tokens))])
        num_differentiable = len(leaves(entering))
        self.is_learned = [
            x.is_floating_point() and i < num_differentiable for i, x in enumerate(self.inputs)
        ]
        with torch.no_grad():
            self.left = map_tensors(_place, self._pass(self.entering))
        self.outputs = leaves(self.left)
        self.forward = recorded(self._forward, graphs.device, graphs.pool)
        self.backward: Callable[[], None] | None = None

    def prepare_backward(self) -> None:
        """Before any gradient of this batch is summed: recording spoils the sums."""
        if self.backward is not None:
            return
        self.d_outputs = [torch.zeros_like(x) if x.is_floating_point() else None for x in self.outputs]
        self.d_inputs = [
            torch.zeros_like(x) if learns else None for x, learns in zip(self.inputs, self.is_learned)
        ]
        self.backward = recorded(self._backward, self.graphs.device, self.graphs.pool)
        torch._foreach_zero_(list(self.graphs.sums.values()))

    def _pass(self, entering: tuple[tuple[Tensor, State], Tokens]) -> tuple[Tensor, State]:
        (h_BTD, of_blocks), tokens = entering
        blocks, is_read, checkpoint_blocks = self.settings
        behind = len(self.graphs.stack.blocks) - blocks.stop
        state = (*[BlockState()] * blocks.start, *of_blocks, *[BlockState()] * behind)

        def work() -> tuple[Tensor, State]:
            h, after = self.graphs.stack(h_BTD, state, tokens, blocks, is_read, checkpoint_blocks)
            return h, after[blocks.start : blocks.stop]

        return self.graphs.with_copies(work)

    @torch.no_grad()
    def _forward(self) -> None:
        fill(self.outputs, leaves(self._pass(self.entering)))

    @torch.enable_grad()
    def _backward(self) -> None:
        """The pass once more, and back: gradients of what entered, and onto the sums those of the weights."""
        graphs = self.graphs
        inputs = [x.detach().requires_grad_(learns) for x, learns in zip(self.inputs, self.is_learned)]
        learned = {name: copy for name, copy in graphs.copies.items() if name in graphs.sums}
        wanted = [x for x in inputs if x.requires_grad] + list(learned.values())

        def work() -> Iterable[Tensor | None]:
            outputs = leaves(self._pass(with_leaves(self.entering, inputs)))
            pairs = [(x, d) for x, d in zip(outputs, self.d_outputs) if x.requires_grad]
            left, d_left = [x for x, _ in pairs], [d for _, d in pairs]
            with torch.autocast(graphs.device.type, enabled=False):  # as in any backward pass
                return torch.autograd.grad(left, wanted, d_left, allow_unused=True)

        # Inside, for blocks that are computed again look their weights up again.
        found = iter(graphs.with_copies(work))
        with torch.no_grad():
            for place in self.d_inputs:
                if place is not None:
                    gradient = next(found)
                    place.zero_() if gradient is None else place.copy_(gradient)
            for name, gradient in zip(learned, found):
                if gradient is not None:
                    graphs.sums[name].add_(gradient)


class _Replay(torch.autograd.Function):
    """A pass of a kind; it keeps what entered."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, weights: Tensor, *entering: Tensor) -> tuple[Tensor, ...]:
        ctx.kind = kind
        ctx.save_for_backward(weights, *entering)
        fill(kind.inputs, entering)
        kind.forward()
        left = tuple(x.clone() for x in kind.outputs)
        ctx.mark_non_differentiable(*(x for x in left if not x.is_floating_point()))
        return left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_left: Tensor) -> tuple[Tensor | None, ...]:
        kind, (weights, *entering) = ctx.kind, ctx.saved_tensors
        fill(kind.inputs, entering)
        pairs = [(place, d) for place, d in zip(kind.d_outputs, d_left) if place is not None]
        fill([place for place, _ in pairs], [d for _, d in pairs])
        kind.backward()
        d_entering = (None if d is None else d.clone() for d in kind.d_inputs)
        return None, torch.zeros_like(weights), *d_entering


class _Weights(torch.autograd.Function):
    """Parameters in; out comes a scalar that all passes depend on. So autograd asks for their gradients when
    the last pass is through."""

    @staticmethod
    def forward(ctx: Any, graphs: PassGraphs, *parameters: Tensor) -> Tensor:
        ctx.graphs = graphs
        fill([copy.detach() for copy in graphs.copies.values()], parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weights: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.graphs.sums
        found = [sums[name].clone() if name in sums else None for name in ctx.graphs.parameters]
        torch._foreach_zero_(list(sums.values()))
        return None, *found


class _Caller(nn.Module):
    """Calls whatever it is given; exists to have a stack below it whose weights can be replaced."""

    def __init__(self, stack: HybridStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def recorded(work: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """What does the work again, on the same tensors: a graph on a CUDA device, the work itself elsewhere. To
    record does the work a few times."""
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads, as those that load data, may go on with what a recording thread must not do.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def with_leaves(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """A tree of this form with these tensors."""
    others: Iterator[Tensor] = iter(tensors)
    return map_tensors(lambda _: next(others), tree)


def fill(places: list[Tensor], values: Iterable[Tensor]) -> None:
    if places:
        torch._foreach_copy_(places, list(values))


def _place(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
