"""The command where lm-eval is not asked."""

import sys

import pytest

from sleeptrain.harness.__main__ import main


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "num_passes=null" in capsys.readouterr().out


def test_without_lm_eval_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--model", "sleeptrain", "--tasks", "x"]) == 2
    told = capsys.readouterr().err
    assert "lm_eval is not installed" in told
    assert 'pip install --editable ".[lm-eval]"' in told
