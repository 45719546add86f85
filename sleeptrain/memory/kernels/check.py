"""Do the kernels compute what the plain forms compute, on this device? To run before a long run on a new
GPU, a new driver or a new Triton::

    python -m sleeptrain.memory.kernels.check                   # --backend fla or flash_qla: those of others

prints the worst error of every output and gradient by case, and ends with 1 if one is above its bar. An
error is ||x - reference|| / ||reference||; the reference is the plain form in float64 on the same rounded
inputs.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.memory.dispatch import KERNELS, choose, implementation, obstacle
from sleeptrain.memory.kernels import check_parts
from sleeptrain.memory.kernels.bars import BARS, error_of
from sleeptrain.memory.kernels.check_parts import Part, parts, parts_of_run
from sleeptrain.memory.kernels.tiles import MULTIPROCESSORS, Tiles, choose_tiles
from sleeptrain.memory.rule import RULES, recurrent
from sleeptrain.schema import ConfigError

NAMES = ("q", "k", "v", "log_decay", "beta", "state")
START_MARGIN = 4  # of a run's own sizes: the bars are for keys of 64 and more, smaller ones round less evenly
START_TOKENS = 130  # of a run's own: two chunks and a part of a third
SPLIT_TOKENS = 1024  # a sequence of so many is split where a longer one is
EXTREME_LOG_DECAYS = (0.0, -1e-6, -1e-3, -0.1, -1.0, -10.0, -60.0)
EXTREME_BETAS = (0.0, 1.0, 1.99)


class Case(NamedTuple):
    """Sizes and type of one problem; ``extreme`` gates mix the ends of their ranges in every chunk, ``slow``
    decays let hundreds of tokens pass before a state is gone. Without ``is_learned`` it has no gradients."""

    rule: str = "gated_delta"
    num_sequences: int = 2
    num_tokens: int = 130
    num_heads: int = 2
    num_key_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    extreme: bool = False
    slow: bool = False
    is_read: bool = True
    is_learned: bool = True
    seed: int = 0

    def __str__(self) -> str:
        gates = "extreme" if self.extreme else "slow" if self.slow else "usual"
        read = "" if self.is_read else ", not read"
        read += "" if self.is_learned else ", not learned"
        return (
            f"{self.rule} {str(self.dtype).removeprefix('torch.')} T {self.num_tokens} "
            f"heads {self.num_key_heads}/{self.num_heads} K {self.key_dim} V {self.value_dim} "
            f"{gates} gates{read} seed {self.seed}"
        )


STEPS = (  # of one token, as when text is written
    Case(num_tokens=1, key_dim=128, value_dim=128, is_learned=False),
    Case("delta", num_tokens=1, is_learned=False, is_read=False),
    Case("gated_hebbian", num_tokens=1, num_heads=4, key_dim=96, value_dim=256, is_learned=False),
    Case(num_tokens=1, dtype=torch.float32, is_learned=False),
)
Problem = Case | Part


def cases(num_seeds: int) -> Iterator[Case]:
    """Every rule, head size, type and kind of gate; odd lengths, one token, shared keys; sequences that are
    split; by seed."""
    for seed in range(num_seeds):
        for extreme in (False, True):
            for dim in (64, 96, 128, 256):
                yield Case(key_dim=dim, value_dim=dim, num_tokens=257, extreme=extreme, seed=seed)
            yield Case(key_dim=96, value_dim=256, num_heads=4, extreme=extreme, seed=seed)
            yield Case(num_sequences=66, num_tokens=65, extreme=extreme, seed=seed)  # a full GPU: wide tiles
            yield Case(num_tokens=1, extreme=extreme, seed=seed)
            yield from (case._replace(extreme=extreme, seed=seed) for case in STEPS)
            yield Case(num_tokens=63, dtype=torch.float32, extreme=extreme, seed=seed)
            yield Case(key_dim=128, value_dim=128, dtype=torch.float16, extreme=extreme, seed=seed)
            yield Case("delta", extreme=extreme, seed=seed)
            yield Case("gated_hebbian", extreme=extreme, seed=seed)
            yield Case(is_read=False, extreme=extreme, seed=seed)
        yield from split_cases(seed)


def split_cases(seed: int) -> Iterator[Case]:
    """One sequence long enough to be split; what a segment leaves still matters in the next one."""
    long = Case(num_sequences=1, num_tokens=1024, slow=True, seed=seed)
    for rule in RULES:
        yield long._replace(rule=rule)
    yield long._replace(slow=False, extreme=True)
    yield long._replace(is_read=False)
    yield long._replace(num_tokens=512, dtype=torch.float32)
    yield long._replace(num_heads=4, key_dim=96, value_dim=256)


def cases_of_run(run: Case) -> Iterator[Case]:
    """A few of a run's own rule, type, heads and sizes, with as many sequences as let the kernels choose the
    run's tiles. Strengths near 2 are not for the delta rule, whose small keys make the roundings grow."""
    full = -(-64 * MULTIPROCESSORS // (run.num_heads * run.value_dim))
    own = run._replace(
        num_sequences=min(run.num_sequences, full), num_tokens=min(run.num_tokens, START_TOKENS)
    )
    yield own
    yield own._replace(is_read=False)
    if RULES[run.rule].decays:
        yield own._replace(extreme=True)
    num_states, item_bytes = run.num_sequences * run.num_heads, run.dtype.itemsize
    if choose_tiles(run.num_tokens, num_states, run.key_dim, run.value_dim, item_bytes).segments > 1:
        yield run._replace(num_tokens=min(run.num_tokens, SPLIT_TOKENS), slow=True)


def errors(case: Case, device: str, tiles: Tiles | None = None, backend: str = "triton") -> dict[str, float]:
    """Of outputs and gradients, by name; 0 where both sides have none. ``tiles`` are for triton."""
    function = implementation(backend)  # its library is imported here
    if tiles:
        function = partial(function, tiles=tiles)
    inputs = make_inputs(case, device)
    others = make_inputs(case._replace(seed=case.seed + 1000), device)
    d_outputs = (others[2], others[5])

    reference = _solve(recurrent, [x.double() for x in inputs], d_outputs, case)
    actual = _solve(function, inputs, d_outputs, case)
    return {name: error_of(actual[name], x) for name, x in reference.items()}


def _solve(
    function: Callable, values: list[Tensor], d_outputs: tuple[Tensor, Tensor], case: Case
) -> dict[str, Tensor | None]:
    """Outputs, and the gradients of all inputs for these gradients of the outputs."""
    leaves = [x.detach().requires_grad_(case.is_learned) for x in values]
    out, last = function(leaves[0] if case.is_read else None, *leaves[1:], rule=case.rule)
    if not case.is_learned:
        return {"out": out, "last_state": last}
    pairs = [(x, d.to(x.dtype)) for x, d in zip((out, last), d_outputs) if x is not None]
    found = torch.autograd.grad([x for x, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
    named = {f"d_{name}": gradient for name, gradient in zip(NAMES, found)}
    return {"out": out, "last_state": last} | named


def make_inputs(case: Case, device: str) -> list[Tensor]:
    """q, k, v, log_decay, beta, state: unit keys, a state that is not zero, decays mostly near 1."""
    random = torch.Generator().manual_seed(case.seed)
    shape = (case.num_sequences, case.num_tokens)
    q, k = (torch.randn(*shape, case.num_key_heads, case.key_dim, generator=random) for _ in range(2))
    v = torch.randn(*shape, case.num_heads, case.value_dim, generator=random)
    state = torch.randn(case.num_sequences, *v.shape[2:3], case.key_dim, case.value_dim, generator=random)
    gates = torch.rand(2, *v.shape[:3], generator=random)
    if case.extreme:
        log_decay = torch.tensor(EXTREME_LOG_DECAYS)[(gates[0] * len(EXTREME_LOG_DECAYS)).long()]
        beta = torch.tensor(EXTREME_BETAS)[(gates[1] * len(EXTREME_BETAS)).long()]
    else:
        log_decay, beta = (-0.01 if case.slow else -0.2) * gates[0] ** 2, gates[1]
    q, k = F.normalize(q, dim=-1) * case.key_dim**-0.5, F.normalize(k, dim=-1)
    low = [x.to(device, case.dtype) for x in (q, k, v)]
    return low + [x.to(device) for x in (log_decay, beta, state)]


def above_bar(case: Case, found: dict[str, float], margin: float = 1) -> dict[str, float]:
    """The errors that are too large, or not a number. The delta rule forgets nothing, rounding neither: its
    bars are twice as high."""
    factor = margin if RULES[case.rule].decays else 2 * margin
    return {name: error for name, error in found.items() if not error <= factor * BARS[case.dtype][name]}


def problems(num_seeds: int) -> Iterator[Problem]:
    """Of the rules, then of what stands around them."""
    yield from cases(num_seeds)
    yield from parts(num_seeds)


def measure(
    problem: Problem, device: str, backend: str = "triton", margin: float = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """All errors, and those that are too large."""
    if isinstance(problem, Case):
        found = errors(problem, device, backend=backend)
        return found, above_bar(problem, found, margin)
    found = check_parts.errors(problem, device)
    return found, check_parts.above_bar(problem, found, margin)


def obstacle_to(problem: Problem, device: str, backend: str) -> str | None:
    """Why the backend cannot run this problem, if it cannot."""
    kind = torch.device(device).type
    if isinstance(problem, Case):
        sizes = (problem.key_dim, problem.value_dim)
        return obstacle(backend, kind, problem.dtype, *sizes, problem.rule)
    return None if backend == "triton" else f"{backend} has the rule alone"


def check_device(device: str = "cuda", num_seeds: int = 1, backend: str = "triton") -> None:
    """Raises ConfigError with the first problem whose outputs or gradients are wrong on this device, or where
    the backend can run none."""
    can_run = [problem for problem in problems(num_seeds) if not obstacle_to(problem, device, backend)]
    choose(torch.device(device).type, torch.bfloat16, 128, backend)
    check_problems(can_run, device, backend)


def check_run(run: Case, device: str, backend: str) -> None:
    """The same for a few problems of a run's own, in seconds; the kernels compiled are those of the run."""
    check_problems(cases_of_run(run), device, backend, START_MARGIN)
    around = parts_of_run(run.num_heads, run.key_dim, run.value_dim, run.dtype)
    check_problems(around, device, "triton", START_MARGIN)


def check_problems(given: Iterable[Problem], device: str, backend: str, margin: float = 1) -> None:
    for problem in given:
        try:
            _, bad = measure(problem, device, backend, margin)
            found = ", ".join(f"{name} is off by {error:.1e}" for name, error in bad.items())
        except Exception as error:  # whatever a library or its compiler raises
            found = failure(error)
        if found:
            raise ConfigError(
                f"the {backend} kernels of the fast weights fail their check on {device}, {problem}: "
                f"{found}; set model.memory_backend=chunked"
            )


def failure(error: Exception) -> str:
    """What a library or its compiler said, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="problems of each kind (default 20)")
    parser.add_argument("--backend", choices=KERNELS, default="triton", help="whose kernels (default triton)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        choose(device, torch.bfloat16, 128, options.backend)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    worst: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    num_bad = 0
    for problem in problems(options.seeds):
        label = str(problem._replace(seed=0))
        if reason := obstacle_to(problem, device, options.backend):
            skipped[label] = reason
            continue
        try:  # the other problems are still of interest
            found, bad = measure(problem, device, options.backend)
        except Exception as error:
            print(f"FAIL  {problem}: {failure(error)}")
            num_bad += 1
            continue
        num_bad += bool(bad)
        row = worst.setdefault(label, found)
        row |= {name: max(error, row[name]) for name, error in found.items()}
    for label, row in worst.items():
        print(label, " ".join(f"{name} {error:.1e}" for name, error in row.items()))
    for label, reason in skipped.items():
        print(f"skipped  {label}: {reason}")
    print(f"{'FAIL' if num_bad else 'PASS'}  {num_bad} problems above their bars")
    return int(bool(num_bad))


if __name__ == "__main__":
    sys.exit(main())
