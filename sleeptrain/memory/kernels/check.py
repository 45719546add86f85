"""Do the kernels compute what the recurrence computes, on this device? To run before a long run on a new GPU,
a new driver or a new Triton::

    python -m sleeptrain.memory.kernels.check                   # --backend fla or flash_qla: those of others

prints the worst error of every output and gradient by case, and ends with 1 if one is above its bar. An
error is ||x - reference|| / ||reference||; the reference is the recurrence in float64 on the same rounded
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
from sleeptrain.memory.kernels.tiles import MULTIPROCESSORS, Tiles
from sleeptrain.memory.rule import RULES, recurrent
from sleeptrain.schema import ConfigError

NAMES = ("q", "k", "v", "log_decay", "beta", "state")
LOW = {"out": 5e-3, "last_state": 5e-3, "d_q": 8e-3, "d_k": 8e-3, "d_v": 8e-3, "d_state": 8e-3}
LOW |= {"d_log_decay": 2e-2, "d_beta": 2e-2}  # the bars of flash-linear-attention's own tests in bfloat16
BARS = {
    torch.bfloat16: LOW,
    torch.float16: {name: bar / 8 for name, bar in LOW.items()},  # it has three more bits
    torch.float32: dict.fromkeys(LOW, 1e-5),
}
START_MARGIN = 4  # of a run's own sizes: the bars are for keys of 64 and more, smaller ones round less evenly
START_TOKENS = 130  # of a run's own: two chunks and a part of a third
EXTREME_LOG_DECAYS = (0.0, -1e-6, -1e-3, -0.1, -1.0, -10.0, -60.0)
EXTREME_BETAS = (0.0, 1.0, 1.99)
LEAST_RMS = (
    1e-3  # outputs and gradients are near 1 here; what decays have all but erased has no relative error
)


class Case(NamedTuple):
    """Sizes and type of one problem; ``extreme`` gates mix the ends of their ranges in every chunk."""

    rule: str = "gated_delta"
    num_sequences: int = 2
    num_tokens: int = 130
    num_heads: int = 2
    num_key_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    extreme: bool = False
    is_read: bool = True
    seed: int = 0

    def __str__(self) -> str:
        gates = "extreme" if self.extreme else "usual"
        read = "" if self.is_read else ", not read"
        return (
            f"{self.rule} {str(self.dtype).removeprefix('torch.')} T {self.num_tokens} "
            f"heads {self.num_key_heads}/{self.num_heads} K {self.key_dim} V {self.value_dim} "
            f"{gates} gates{read} seed {self.seed}"
        )


def cases(num_seeds: int) -> Iterator[Case]:
    """Every rule, head size, type and kind of gate; odd lengths, one token, shared keys; by seed."""
    for seed in range(num_seeds):
        for extreme in (False, True):
            for dim in (64, 96, 128, 256):
                yield Case(key_dim=dim, value_dim=dim, num_tokens=257, extreme=extreme, seed=seed)
            yield Case(key_dim=96, value_dim=256, num_heads=4, extreme=extreme, seed=seed)
            yield Case(num_sequences=66, num_tokens=65, extreme=extreme, seed=seed)  # a full GPU: wide tiles
            yield Case(num_tokens=1, extreme=extreme, seed=seed)
            yield Case(num_tokens=63, dtype=torch.float32, extreme=extreme, seed=seed)
            yield Case(key_dim=128, value_dim=128, dtype=torch.float16, extreme=extreme, seed=seed)
            yield Case("delta", extreme=extreme, seed=seed)
            yield Case("gated_hebbian", extreme=extreme, seed=seed)
            yield Case(is_read=False, extreme=extreme, seed=seed)


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
    return {name: _error(actual[name], x) for name, x in reference.items()}


def _solve(
    function: Callable, values: list[Tensor], d_outputs: tuple[Tensor, Tensor], case: Case
) -> dict[str, Tensor | None]:
    """Outputs, and the gradients of all inputs for these gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in values]
    out, last = function(leaves[0] if case.is_read else None, *leaves[1:], rule=case.rule)
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
        log_decay, beta = -0.2 * gates[0] ** 2, gates[1]
    q, k = F.normalize(q, dim=-1) * case.key_dim**-0.5, F.normalize(k, dim=-1)
    low = [x.to(device, case.dtype) for x in (q, k, v)]
    return low + [x.to(device) for x in (log_decay, beta, state)]


def above_bar(case: Case, found: dict[str, float], margin: float = 1) -> dict[str, float]:
    """The errors that are too large, or not a number. The delta rule forgets nothing, rounding neither: its
    bars are twice as high."""
    factor = margin if RULES[case.rule].decays else 2 * margin
    return {name: error for name, error in found.items() if not error <= factor * BARS[case.dtype][name]}


def obstacle_to(case: Case, device: str, backend: str) -> str | None:
    """Why the backend cannot run this problem, if it cannot."""
    return obstacle(backend, torch.device(device).type, case.dtype, case.key_dim, case.value_dim, case.rule)


def check_device(device: str = "cuda", num_seeds: int = 1, backend: str = "triton") -> None:
    """Raises ConfigError with the first case whose outputs or gradients are wrong on this device, or where
    the backend can run none."""
    can_run = [case for case in cases(num_seeds) if not obstacle_to(case, device, backend)]
    choose(torch.device(device).type, torch.bfloat16, 128, backend)
    check_cases(can_run, device, backend)


def check_run(run: Case, device: str, backend: str) -> None:
    """The same for a few cases of a run's own, in seconds; the kernels it compiles are those of the run."""
    check_cases(cases_of_run(run), device, backend, START_MARGIN)


def check_cases(problems: Iterable[Case], device: str, backend: str, margin: float = 1) -> None:
    for case in problems:
        try:
            bad = above_bar(case, errors(case, device, backend=backend), margin)
            found = ", ".join(f"{name} is off by {error:.1e}" for name, error in bad.items())
        except Exception as error:  # whatever a library or its compiler raises
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if found:
            raise ConfigError(
                f"the {backend} kernels of the fast weights fail their check on {device}, {case}: {found}; "
                "set model.memory_backend=chunked"
            )


def _error(actual: Tensor | None, reference: Tensor | None) -> float:
    """Relative, in root mean squares; None counts as zero."""
    if actual is None or reference is None:
        given = reference if actual is None else actual
        return 0.0 if given is None else float(given.detach().norm())
    reference = reference.detach()
    difference, size = (actual.detach().double() - reference).norm(), reference.norm()
    return float(difference / size.clamp(min=LEAST_RMS * reference.numel() ** 0.5))


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
    for case in cases(options.seeds):
        label = str(case._replace(seed=0))
        if reason := obstacle_to(case, device, options.backend):
            skipped[label] = reason
            continue
        found = errors(case, device, backend=options.backend)
        num_bad += bool(above_bar(case, found))
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
