"""Gated delta rule on one GPU: our Triton kernels, forward and backward, against fla, FlashQLA and the floor
of the device.

Values, queries and keys in bfloat16, with an initial state and a gradient coming in through the final one.
Every call is captured in a CUDA graph and replayed, so that what is timed is the kernels. The ratio is the
peer's time over ours, so above 1 ours is faster; the floor ratio is our time over the least that 790 TFLOP/s
and 4.3 TB/s (one H200) allow for the arithmetic and the unavoidable traffic of the chunked form. Where ours
splits the sequence, it is timed without that, too. A peer that is not installed, or cannot run a shape, is
left out with the reason: ``pip install -e .[gpu]`` brings both. First comes the gradient check of two
problems; the whole check is ``python -m sleeptrain.memory.kernels.check``, with ``--backend`` that of a peer.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.memory.dispatch import implementation, obstacle
from sleeptrain.memory.peers import PACKAGES

NO_DEVICE = 2  # exit code
FLOPS_PER_SECOND, BYTES_PER_SECOND = 790e12, 4.3e12  # of an H200: measured bfloat16 products, memory
CHUNK_TOKENS = 64
BACKWARD_FLOPS = 2.7  # of the forward pass, with what it computes again
MAX_DIFFERENCE = 2e-2  # relative, of any output or gradient of a peer
CALLS_PER_ROUND = 10


class Shape(NamedTuple):
    """``targets``: what our time is held against, fla's published one on an H200 over the wanted ratio."""

    num_batch: int
    num_tokens: int
    num_key_heads: int
    num_heads: int
    dim: int
    parts: tuple[str, ...]
    fla_ms: float | None = None
    target: float = 1.5

    def __str__(self) -> str:
        heads = f"{self.num_key_heads}/{self.num_heads}"
        return f"{self.num_batch} x {self.num_tokens}, heads {heads}, size {self.dim}"


SHAPES = (
    Shape(4, 8192, 32, 32, 128, ("forward",), 1.952),
    Shape(1, 8192, 16, 16, 128, ("forward",), 0.334),
    Shape(1, 8192, 16, 32, 128, ("backward",), 1.444, 1.3),
    Shape(1, 32768, 16, 32, 128, ("backward",), 5.697, 1.3),
    Shape(8, 2048, 16, 16, 64, ("forward", "backward"), None, 1.2),
    Shape(1, 8192, 8, 8, 128, ("forward", "backward"), None, 1.2),  # split in eight
)
QUICK_SHAPES = (Shape(1, 256, 2, 2, 64, ("forward", "backward")),)

Rule = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, log_decay, beta, state) -> (out, state)


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=20).parse_args()
    if not torch.cuda.is_available():
        print("error: gdn_gpu.py measures a CUDA device, and torch sees none here", file=sys.stderr)
        sys.exit(NO_DEVICE)
    peers = [package.partition("==")[0] for name, package in PACKAGES.items() if find_spec(name)]
    measure.begin(["triton", *peers])
    print("device:", torch.cuda.get_device_name())
    check()
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        for part in shape.parts:
            compare(shape, part, options)


def rules_for(shape: Shape) -> dict[str, Rule]:
    """Ours, and those of the peers that can run this shape."""
    rules: dict[str, Rule] = {"ours": implementation("triton")}  # type: ignore[dict-item]
    for name in PACKAGES:
        reason = obstacle(name, "cuda", torch.bfloat16, shape.dim, shape.dim, "gated_delta")
        if reason:
            print(f"no {name}: {reason}")
        else:
            rules[name] = implementation(name)  # type: ignore[assignment]
    return rules


def not_split(shape: Shape) -> dict[str, Rule]:
    """Ours with one scan over the whole sequence, where it would be split."""
    from sleeptrain.memory.kernels.rule import chunked_triton
    from sleeptrain.memory.kernels.tiles import choose_tiles

    sizes = (shape.num_tokens, shape.num_batch * shape.num_heads, shape.dim, shape.dim, 2)
    if choose_tiles(*sizes).segments == 1:
        return {}
    tiles = choose_tiles(*sizes, max_segments=1)
    return {"ours, not split": partial(chunked_triton, tiles=tiles)}  # type: ignore[dict-item]


def check() -> None:
    from sleeptrain.memory.kernels.check import Case, above_bar, errors

    for case in (Case(), Case(key_dim=128, value_dim=128, extreme=True)):
        bad = above_bar(case, errors(case, "cuda"))
        print(f"{'FAIL' if bad else 'PASS'}  {case}", bad or "")


def compare(shape: Shape, part: str, options) -> None:
    """Times one part of all rules, and refuses a peer that computes something else."""
    print(f"\n{part}, {shape}")
    rules = rules_for(shape) | not_split(shape)
    inputs, d_outputs = make_problem(shape)
    expected: list[Tensor] = []
    difference, times = {}, {}
    for name, rule in rules.items():
        try:  # one that fails is no reason to lose the others' figures
            found = solve(part, rule, inputs, d_outputs)
            expected = expected or found
            difference[name] = max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected))
            times[name] = milliseconds(part, rule, inputs, d_outputs, options.rounds)
        except Exception as error:
            print(f"no {name}: {measure.failure(error)}")
        if "ours" not in times:
            print(f"FAIL  {part}, {shape}")
            return
    floor = floor_ms(shape, part)
    rows = [(name, f"{ms:.3f}", f"{ms / floor:.2f}", f"{difference[name]:.1e}") for name, ms in times.items()]
    measure.show(("", "ms", f"floor ratio ({floor:.3f} ms)", "difference"), rows)
    for name in PACKAGES:
        if name in times and difference[name] <= MAX_DIFFERENCE:
            ratio = times[name] / times["ours"]
            print(f"ratio {name} / ours: {ratio:.3f}")
            if name == "fla" and not options.quick:
                measure.judge("fla here / ours", ratio, at_least=shape.target)
    if shape.fla_ms and not options.quick:
        measure.judge("fla as published / ours", shape.fla_ms / times["ours"], at_least=shape.target)


def make_problem(shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
    """Unit keys, decays of about 0.9; inputs that ask for gradients, and gradients of the outputs."""
    random = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=random)

    tokens, state = (
        (shape.num_batch, shape.num_tokens),
        (shape.num_batch, shape.num_heads, shape.dim, shape.dim),
    )
    q, k = (F.normalize(draw(*tokens, shape.num_key_heads, shape.dim), dim=-1) for _ in range(2))
    v, d_out = (draw(*tokens, shape.num_heads, shape.dim).bfloat16() for _ in range(2))
    gates = [-F.softplus(draw(*tokens, shape.num_heads) - 2), draw(*tokens, shape.num_heads).sigmoid()]
    low = [(q * shape.dim**-0.5).bfloat16(), k.bfloat16(), v]
    return [x.requires_grad_() for x in [*low, *gates, draw(*state)]], [d_out, draw(*state)]


def solve(part: str, rule: Rule, inputs: list[Tensor], d_outputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients where these are timed: a peer may have but one of the two passes here."""
    outputs = rule(*inputs)
    gradients = torch.autograd.grad(outputs, inputs, d_outputs) if part == "backward" else ()
    return [*(x.detach() for x in outputs), *gradients]


def call_of(part: str, rule: Rule, inputs: list[Tensor], d_outputs: list[Tensor]) -> Callable[[], object]:
    """A forward pass that keeps what a backward pass needs, or the backward pass of one made before."""
    if part == "forward":
        return lambda: rule(*inputs)
    outputs = rule(*inputs)
    return lambda: torch.autograd.grad(outputs, inputs, d_outputs, retain_graph=True)


def milliseconds(part: str, rule: Rule, inputs: list[Tensor], d_outputs: list[Tensor], rounds: int) -> float:
    """Median over rounds of one replay of the captured call. All of it is on one stream: a backward pass runs
    on that of its forward pass, and a capture must not meet another one."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call = call_of(part, rule, [x.detach().requires_grad_() for x in inputs], d_outputs)
        for _ in range(3):  # compiles, and warms what a capture must not meet
            call()
    aside.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        call()
    taken = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS_PER_ROUND):
            graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / CALLS_PER_ROUND)
    return statistics.median(taken)


def floor_ms(shape: Shape, part: str) -> float:
    """The larger of arithmetic and traffic, at the device's best."""
    K = V = shape.dim
    flops = CHUNK_TOKENS * (6 * K + 4 * V) + 6 * K * V  # per token and value head, in dense products
    shared = shape.num_key_heads / shape.num_heads
    num_bytes = 2 * (2 * K * shared + 2 * V) + 8  # q, k, v, out in bfloat16, gates in float32
    if part == "backward":
        flops, num_bytes = BACKWARD_FLOPS * flops, 2 * (4 * K * shared + 3 * V) + 16
    count = shape.num_batch * shape.num_tokens * shape.num_heads
    return 1e3 * count * max(flops / FLOPS_PER_SECOND, num_bytes / BYTES_PER_SECOND)


if __name__ == "__main__":
    main()
