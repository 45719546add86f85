"""What one pass of the 1.4B model asks of a GPU, counted without one: operations, bytes, FLOPs, least time.

The pass reads a window of 2048 tokens with Ouro 1.4B and 6 Jet blocks (configs/model/ouro_1b4_jet.yaml) under
bfloat16 autocast, forward and backward, on tensors that have sizes and no values. An operation costs at least
the larger of its arithmetic at 790 TFLOP/s and its traffic at 4.3 TB/s (one H200, as measured for the paper's
figures); the sum over operations is the floor of the pass, which no launch overhead, no cache and no kernel's
own inefficiency is part of. A kernel that fuses several operations counts as what goes in and comes out.

Variants, each with all that the one above it has: plain torch; the rule of the fast weights as kernels; also
convolution, gates and gated norm as kernels; weights cast to bfloat16 once per step and not in each pass, as
run.cuda_graphs does; norms, SwiGLU and rotary positions a kernel each, as run.compile should make them. The
ratio is plain torch's floor over a variant's. After them the bound on training with activation checkpointing
per pass: forward, forward again and backward. Last, what one token of one sequence costs awake, as the
decoder reads it (model/decoder.py) with all of the above and a window of 2048, over the time that reading all
weights once takes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from train_gpu import OURO_JET, QUICK

from sleeptrain import memory
from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.model import sleep
from sleeptrain.model.decoder import Decoder
from sleeptrain.model.layers import cast_linear_maps
from sleeptrain.model.pointwise import PLAIN, Pointwise, use
from sleeptrain.model.ragged import Rows
from sleeptrain.model.session import begin, read_on
from sleeptrain.model.sleep import SleepModel

FLOPS_PER_SECOND, BYTES_PER_SECOND = 790e12, 4.3e12
NO_KERNEL = {"_unsafe_view", "detach", "device", "promote_types", "empty", "empty_like", "new_empty", "alias"}
GROUPS = {
    "matrix products": {"mm", "bmm", "addmm", "baddbmm", "baddbmm_"},
    "casts": {"_to_copy"},
    "norms": {"rms_norm"},
}
OF_ROWS = {"embedding", "index_copy_", "index_fill_"}  # touch little of their first argument
RULE = ("apply",)
AROUND = ("short_convolution", "gates_of_logits", "gated_rms_norm")


class Variant(NamedTuple):
    """``fused``: functions of sleeptrain.memory that are kernels."""

    name: str
    fused: tuple[str, ...] = ()
    is_cast_once: bool = False
    is_compiled: bool = False


VARIANTS = (
    Variant("plain torch"),
    Variant("rule as kernels", RULE),
    Variant("also what stands around it", RULE + AROUND),
    Variant("weights cast once", RULE + AROUND, is_cast_once=True),
    Variant("pointwise work compiled", RULE + AROUND, is_cast_once=True, is_compiled=True),
)


class Cost(NamedTuple):
    operations: int = 0
    num_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def plus(self, tensors: Sequence[Any], flops: int = 0) -> "Cost":
        num_bytes = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
        seconds = max(flops / FLOPS_PER_SECOND, num_bytes / BYTES_PER_SECOND)
        return Cost(
            self.operations + 1, self.num_bytes + num_bytes, self.flops + flops, self.seconds + seconds
        )


class Counter(TorchDispatchMode):
    """Costs by group of operations; a fused function counts for its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if not self.is_paused and not func.is_view and name not in NO_KERNEL:
            counted = flop_registry.get(func._overloadpacket)
            flops = counted(*args, **kwargs, out_val=out) if counted else 0
            moved = [x for x in tree_leaves((args, kwargs, out)) if name not in OF_ROWS or x is not args[0]]
            self.add(group_of(name), moved, flops)
        return out

    def add(self, group: str, tensors: Sequence[Any], flops: int = 0) -> None:
        self.costs[group] = self.costs[group].plus(tensors, flops)

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self.is_paused = self.is_paused, True
        yield
        self.is_paused = before

    def fused(self, group: str, function: Callable) -> Callable:
        """The function as one kernel forward and one backward."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_paused:
                return function(*args, **kwargs)
            places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]

            def of_tensors(*tensors: Tensor) -> Any:
                filled = list(args)
                for i, x in zip(places, tensors):
                    filled[i] = x
                return function(*filled, **kwargs)

            return _Fused.apply(self, group, of_tensors, *(args[i] for i in places))

        return call


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counter: Counter, group: str, function: Callable, *tensors: Tensor) -> Any:
        ctx.counter, ctx.group = counter, group
        with counter.paused(), torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            ctx.out = function(*ctx.inputs)
        outputs = tree_leaves(ctx.out)
        counter.add(group, [*tensors, *outputs])
        detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in outputs)
        return detached if isinstance(ctx.out, tuple) else detached[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = [(x, d) for x, d in zip(tree_leaves(ctx.out), gradients) if isinstance(x, Tensor)]
        with ctx.counter.paused():
            wanted = [x for x in ctx.inputs if x.requires_grad]
            left, d_left = zip(*pairs)
            found = iter(torch.autograd.grad(left, wanted, d_left, allow_unused=True))
        d_inputs = [next(found) if x.requires_grad else None for x in ctx.inputs]
        ctx.counter.add(ctx.group, [*ctx.inputs, *d_left, *d_inputs])
        return None, None, None, *d_inputs


def group_of(name: str) -> str:
    if name.startswith("_scaled_dot_product"):
        return "attention"
    return next((group for group, names in GROUPS.items() if name in names), "other pointwise")


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=1).parse_args()
    measure.begin()
    config, num_tokens, vocab_size = (QUICK.model, 24, 64) if options.quick else (OURO_JET, 2048, 49152)
    floors = {}
    for variant in VARIANTS:
        forward, backward = count(config, num_tokens, variant)
        show(variant, forward, backward)
        floors[variant.name] = floor(forward), floor(backward)
    plain = sum(floors["plain torch"])
    for name, (forward, backward) in floors.items():
        print(f"ratio of floors, plain torch / {name}: {plain / (forward + backward):.3f}")
    forward, backward = floors[VARIANTS[-1].name]
    print(f"bound on pass-tokens/s with checkpointing: {num_tokens / (2 * forward + backward):,.0f}")
    show_token(*count_token(config, num_tokens, vocab_size))


def count(config: ModelConfig, num_tokens: int, variant: Variant) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """Costs of the forward and of the backward pass."""
    counter = Counter()
    with FakeTensorMode(), mock.patch.object(sleep, "initialise"):
        model = SleepModel(config, SleepConfig(window_tokens=num_tokens), vocab_size=64)
        if variant.is_cast_once:
            cast_linear_maps(model, torch.bfloat16)
            model.requires_grad_()
        if variant.is_compiled:
            use(model, Pointwise(*(counter.fused("compiled", function) for function in PLAIN)))
        h = torch.empty(1, num_tokens, config.d_model, requires_grad=True)
        tokens, state = (
            model.tokens(torch.zeros(1, num_tokens, dtype=torch.long), None),
            model.initial_state(1),
        )
        with fusing(counter, variant), counter, autocast():
            left, after = model.stack(h, state, tokens, range(len(config.blocks)))
        outputs = [left, *(block.memory for block in after if block.memory is not None)]
        costs, counter.costs = counter.costs, defaultdict(Cost)
        with counter:
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    return costs, counter.costs


def count_token(config: ModelConfig, num_tokens: int, vocab_size: int) -> tuple[dict[str, Cost], int]:
    """Costs of a token, and bytes of the weights it needs."""
    counter, variant = Counter(), VARIANTS[-1]
    with FakeTensorMode(), mock.patch.object(sleep, "initialise"), torch.no_grad():
        model = SleepModel(config, SleepConfig(window_tokens=num_tokens), vocab_size)
        cast_linear_maps(model, torch.bfloat16)
        with autocast():
            _, read = read_on(model, begin(model, 1), torch.zeros(1, 1, dtype=torch.long))
            decoder = Decoder(model, autocast)
            recording = decoder.record(decoder.places_of(Rows(read, torch.ones(1, dtype=torch.long))))
        use(model, Pointwise(*(counter.fused("compiled", function) for function in PLAIN)))
        with fusing(counter, variant), counter:
            recording.replay()
    weights = (p for p in model.parameters() if p is not model.embed.weight)
    return counter.costs, sum(p.numel() * p.element_size() for p in weights)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@contextmanager
def fusing(counter: Counter, variant: Variant) -> Iterator[None]:
    """What is a kernel of one of ours, or of torch on a GPU, counts as one."""
    with ExitStack() as patches:
        for name in variant.fused:
            fused = counter.fused("fast weights", getattr(memory, name))
            patches.enter_context(mock.patch.object(memory, name, fused))
        patches.enter_context(mock.patch.object(F, "rms_norm", counter.fused("norms", F.rms_norm)))
        yield


def floor(costs: dict[str, Cost]) -> float:
    return sum(cost.seconds for cost in costs.values())


def show(variant: Variant, forward: dict[str, Cost], backward: dict[str, Cost]) -> None:
    rows = []
    for group in sorted({*forward, *backward}):
        pair = forward.get(group, Cost()), backward.get(group, Cost())
        rows.append((group, *(text for cost in pair for text in cells(cost))))
    totals = [Cost(*map(sum, zip(*costs.values()))) for costs in (forward, backward)]
    rows.append(("all", *(text for cost in totals for text in cells(cost))))
    print(f"\n{variant.name}")
    heading = ("operations", "GB", "TFLOP", "floor ms")
    measure.show(("", *heading, *(f"{name}, back" for name in heading)), rows)


def show_token(costs: dict[str, Cost], weight_bytes: int) -> None:
    total = Cost(*map(sum, zip(*costs.values())))
    print("\na token awake")
    heading = ("", "operations", "GB", "TFLOP", "floor ms")
    measure.show(heading, [(name, *cells(cost)) for name, cost in sorted((costs | {"all": total}).items())])
    floor_seconds = weight_bytes / BYTES_PER_SECOND
    print(f"reading {weight_bytes / 1e9:.2f} GB of weights: {1e3 * floor_seconds:.3f} ms")
    print(f"ratio of floors, token / weights: {total.seconds / floor_seconds:.3f}")


def cells(cost: Cost) -> tuple[str, ...]:
    return (
        str(cost.operations),
        f"{cost.num_bytes / 1e9:.2f}",
        f"{cost.flops / 1e12:.2f}",
        f"{1e3 * cost.seconds:.2f}",
    )


if __name__ == "__main__":
    main()
