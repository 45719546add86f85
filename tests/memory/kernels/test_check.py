"""The check at the start of a run lets right kernels pass and finds broken ones, interpreted on a CPU.

Triton reads TRITON_INTERPRET when it is imported, so this file is run as a script, too.
"""

import json
import sys

import pytest
import torch
from own_process import interpreted

from sleeptrain.memory import recurrent
from sleeptrain.memory.kernels import check
from sleeptrain.memory.kernels.check import Case, cases, check_device, check_run, obstacle_to
from sleeptrain.schema import ConfigError

SIZES = {"num_tokens": 20, "num_key_heads": 1, "key_dim": 16, "value_dim": 16}
RUN = Case(num_sequences=1, **SIZES, dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_right_kernels_pass_and_wrong_ones_are_named() -> None:
    right, wrong = interpreted(__file__)
    assert right == ""
    label = "the triton kernels of the fast weights fail their check on cpu"
    assert wrong.startswith(f"{label}, {RUN}: d_q is off by 2.5e-01, d_k is off by 2.5e-01;")


def test_a_backend_that_is_not_here_is_no_passed_check() -> None:
    with pytest.raises(ConfigError, match=r"model\.memory_backend=flash_qla cannot run: .* are on cpu"):
        check_device("cpu", backend="flash_qla")


@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
def test_cases_that_the_kernels_of_others_cannot_run_are_skipped(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleeptrain.memory.peers.find_spec", lambda name: name)
    reasons = {obstacle_to(case, "cuda", backend) for case in cases(1)}
    assert None in reasons
    assert f"{backend} takes float16 and bfloat16, not float32" in reasons


def test_the_command_names_what_it_skips_and_fails_on_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The recurrence stands in for fla, and then that of another rule."""
    monkeypatch.setattr(check, "choose", lambda *problem: None)
    monkeypatch.setattr(check, "problems", lambda num_seeds: [RUN, RUN._replace(dtype=torch.float64)])
    monkeypatch.setattr(check, "obstacle_to", lambda case, *_: "no" if case.dtype == torch.float64 else None)
    monkeypatch.setattr(check, "implementation", lambda backend: recurrent)
    monkeypatch.setattr(sys, "argv", ["check", "--backend", "fla"])
    assert check.main() == 0
    said = capsys.readouterr().out
    assert f"skipped  {RUN._replace(dtype=torch.float64)}: no\nPASS  0 problems above their bars" in said
    monkeypatch.setattr(check, "implementation", lambda backend: lambda *x, rule: recurrent(*x, "delta"))
    assert check.main() == 1
    assert "FAIL  1 problems above their bars" in capsys.readouterr().out
    monkeypatch.setattr(check, "implementation", lambda backend: refuses)
    assert check.main() == 1
    said = capsys.readouterr().out
    assert f"FAIL  {RUN}: RuntimeError: no backward pass here\n" in said  # and on it went
    assert said.endswith("FAIL  1 problems above their bars\n")


def test_the_command_says_what_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check", "--backend", "flash_qla"])
    assert check.main() == 2
    assert "error: model.memory_backend=flash_qla cannot run: " in capsys.readouterr().err


def refuses(*inputs: torch.Tensor, rule: str) -> None:
    raise RuntimeError("no backward\npass here")


def found() -> str:
    try:
        check_run(RUN, "cpu", "triton")
    except ConfigError as error:
        return str(error)
    return ""


def break_gradients_of_keys() -> None:
    """They, and those of queries, come out too large by a quarter."""
    from sleeptrain.memory.kernels import rule

    summed = rule._of_key_heads
    rule._of_key_heads = lambda d_BTHK, k: None if d_BTHK is None else 1.25 * summed(d_BTHK, k)


if __name__ == "__main__":
    torch.set_num_threads(1)
    right = found()
    break_gradients_of_keys()
    print(json.dumps([right, found()]))
