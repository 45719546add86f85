"""Gated delta rule on a CPU thread: ours against the torch forms of transformers, megatron-core and fla.

Forward and backward in float32, with gradients of all six inputs (the initial state, too) and a gradient
coming in through the final state. A ratio is the peer's time over ours, so above 1 ours is faster. fla cannot
be imported in this process, so that transformers runs its own torch code. Outputs and gradients are compared
first: there is no ratio for a peer that computes something else.
"""

import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain import memory

SHAPES = ((2, 512, 4, 32), (1, 1024, 4, 64), (1, 2048, 8, 128))  # batch, tokens, heads, K = V
QUICK_SHAPES = ((1, 128, 2, 16), (2, 100, 1, 32))
MAX_DIFFERENCE = 1e-3  # relative, of any output or gradient

Rule = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, log_decay, beta, state) -> (out, state)


class Problem(NamedTuple):
    inputs: list[Tensor]
    d_out: Tensor
    d_state: Tensor


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=9).parse_args()
    measure.require(("transformers", "megatron", "fla"))
    rules = load_rules()
    measure.begin(("transformers", "megatron-core", "fla-core"))
    peers = [name for name in rules if name != "ours"]
    ratios: dict[str, list[measure.Ratio]] = {name: [] for name in peers}
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        compare(shape, rules, options.rounds, ratios)
    print("\ntime of each peer over ours, geometric mean over shapes")
    means = {name: measure.geometric_mean(values) for name, values in ratios.items() if values}
    for name, mean in means.items():
        print(f"ratio {name} / ours: {mean}")
    if not options.quick and {"transformers", "megatron"} <= means.keys():
        measure.judge("transformers / ours, geometric mean", means["transformers"].wall, at_least=1.3)
        slowest = min(ratio.wall for ratio in ratios["transformers"])
        measure.judge("transformers / ours, worst shape", slowest, at_least=1.0)
        measure.judge("megatron / ours, geometric mean", means["megatron"].wall, at_least=1.9)


def load_rules() -> dict[str, Rule]:
    """Ours and the peers behind one signature. The peers scale q themselves, ours leaves it to the caller."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None
    assert spec.origin is not None
    fla_folder = Path(spec.origin).parent
    sys.modules["fla"] = None  # type: ignore[assignment]
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.ssm import gated_delta_net
        from transformers.models.qwen3_next import modeling_qwen3_next

    transformers = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    assert Path(inspect.getsourcefile(transformers) or "").name == "modeling_qwen3_next.py"
    fla = load_file(fla_folder / "ops" / "gated_delta_rule" / "naive.py").naive_chunk_gated_delta_rule

    def ours(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return memory.apply(q * q.shape[-1] ** -0.5, *rest)  # type: ignore[arg-type,return-value]

    return {
        "ours": ours,
        "transformers": peer(transformers),
        "megatron": peer(gated_delta_net.torch_chunk_gated_delta_rule),
        "fla naive": peer(fla),
    }


def peer(function: Rule) -> Rule:
    """All three peers share their layout with ours, and these names."""

    def apply(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return function(q, k, v, g=log_decay, beta=beta, initial_state=state, output_final_state=True)

    return apply


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(shape: tuple[int, int, int, int], rules: dict[str, Rule], rounds: int, ratios: dict) -> None:
    """Checks and times all rules on one shape; adds a ratio for each peer that computes what ours does."""
    print("\nbatch {}, tokens {}, heads {}, K = V = {}".format(*shape))
    problem = make_problem(*shape)
    reference = solve(rules["ours"], problem)
    difference = {
        name: max(float((x - y).norm() / y.norm()) for x, y in zip(solve(rule, problem), reference))
        for name, rule in rules.items()
    }
    times = measure.interleaved({name: partial(solve, rule, problem) for name, rule in rules.items()}, rounds)
    rows = []
    for name, taken in times.items():
        agrees = difference[name] <= MAX_DIFFERENCE  # False for nan, too
        ratio = measure.ratio(taken, times["ours"])
        if agrees and name != "ours":
            ratios[name].append(ratio)
        rows.append((
            name,
            f"{1e3 * measure.median_wall(taken):.1f}",
            f"{1e3 * measure.least_cpu(taken):.1f}",
            f"{difference[name]:.1e}",
            "" if name == "ours" else str(ratio) if agrees else "refused: another result",
        ))  # fmt: skip
    measure.show(("", "median ms", "least cpu ms", "max difference", "ratio to ours"), rows)


def make_problem(num_batch: int, num_tokens: int, num_heads: int, dim: int) -> Problem:
    """Unit keys and queries, decays of about 0.9, gradients of unit variance."""
    random = torch.Generator().manual_seed(0)
    shape = (num_batch, num_tokens, num_heads)
    q, k, v, d_out = (torch.randn(*shape, dim, generator=random) for _ in range(4))
    decay_logits, beta_logits = (torch.randn(*shape, generator=random) for _ in range(2))
    state, d_state = (torch.randn(num_batch, num_heads, dim, dim, generator=random) for _ in range(2))
    inputs = [
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
        -F.softplus(decay_logits - 2),
        beta_logits.sigmoid(),
        state,
    ]
    return Problem([x.requires_grad_() for x in inputs], d_out, d_state)


def solve(rule: Rule, problem: Problem) -> tuple[Tensor, ...]:
    """out, final state, and the gradients of the six inputs."""
    results = rule(*problem.inputs)
    gradients = torch.autograd.grad(results, problem.inputs, (problem.d_out, problem.d_state))
    return (*(x.detach() for x in results), *gradients)


if __name__ == "__main__":
    main()
