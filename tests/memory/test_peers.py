"""The kernels of others behind our contract: what is handed to them, and what fla makes of it.

fla's kernels run here interpreted on a CPU, in a process of their own, and equal the recurrence. FlashQLA has
no form that runs without a GPU: its place is taken by one that only looks at what it is given.
"""

import builtins
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sleeptrain.memory import RULES, recurrent
from sleeptrain.memory.kernels.check import Case, above_bar, errors, make_inputs
from sleeptrain.memory.peers import by_fla, by_flash_qla

ONE = {"num_sequences": 1, "num_heads": 1, "num_key_heads": 1, "dtype": torch.float16}
SHARED = {"num_heads": 2, "num_key_heads": 1, "num_tokens": 7, "dtype": torch.float16}
CASES = [
    *(Case(rule, **ONE, num_tokens=70, extreme=True) for rule in RULES),
    *(Case(rule, **SHARED) for rule in RULES),
    *(Case(rule, **SHARED, is_read=False) for rule in ("gated_delta", "delta")),
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.more  # where the peers of the benchmarks are installed, fla-core among them
@pytest.mark.skipif(sys.platform != "linux" or not find_spec("fla"), reason="fla-core is not installed")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fla_equals_the_recurrence(case: Case, found: dict[str, dict[str, float]]) -> None:
    assert above_bar(case, found[str(case)]) == {}


class Recorder(ModuleType):
    """FlashQLA's function as its documentation has it, computed by the recurrence in what it is given."""

    def __init__(self) -> None:
        super().__init__("flash_qla")

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor]:
        assert q.dtype == k.dtype == v.dtype == torch.float16
        assert g.dtype == beta.dtype == initial_state.dtype == torch.float32
        assert output_final_state
        out, state = recurrent(scale * q, k, v, g, beta, initial_state)
        assert out is not None
        return out, state


@pytest.mark.parametrize("is_read", [True, False])
def test_flash_qla_gets_what_it_documents(is_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_qla", Recorder())
    case = Case(**SHARED, is_read=is_read)
    assert above_bar(case, errors(case, "cpu", backend="flash_qla")) == {}
    q, *rest = make_inputs(case, "cpu")
    out, state = by_flash_qla(q.float() if is_read else None, *rest)  # a model's queries may be float32
    assert (out is None) == (not is_read)
    assert state.dtype == torch.float32


@pytest.mark.parametrize("function", [by_fla, by_flash_qla])
def test_no_tokens_leave_the_state(function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_qla", Recorder())
    fla = ModuleType("fla.ops.gated_delta_rule")
    fla.chunk_gated_delta_rule = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fla.__name__, fla)
    q, k, v, log_decay, beta, state = make_inputs(Case(num_tokens=0), "cpu")
    out, last = function(q, k, v, log_decay, beta, state)
    assert out.shape == v.shape
    assert last is state


class Index(int):
    """A number of a loop, which fla asks for its type as if it were compiled."""

    def to(self, dtype: object) -> int:
        return int(self)


def interpret_fla() -> None:
    """fla's kernels ask a GPU for times, to tune themselves, and the numbers of their loops for a type:
    interpreted, the first of the settings is as good as any, and such a number is Python's."""
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = property(lambda self: lambda call, quantiles: (0.0, 0.0, 0.0))
    for name in ("fla.ops.common.chunk_delta_h", "fla.ops.common.chunk_h"):
        importlib.import_module(name).range = lambda *ends: map(Index, builtins.range(*map(int, ends)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpret_fla()
    print(json.dumps({str(case): errors(case, "cpu", backend="fla") for case in CASES}))
