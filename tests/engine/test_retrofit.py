"""How much of a model is new and how much is trained, counted by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from sleeptrain.config import Config, ModelConfig, OptimConfig, RunConfig
from sleeptrain.engine.plan_report import plan_report
from sleeptrain.engine.retrofit import Budget, budget, budget_lines, check_budget
from sleeptrain.engine.trainer import train
from sleeptrain.pretrain import compose_config
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

NEW = tuple(f"stack.blocks.{i}.*" for i in (4, 9, 14, 19, 24, 29))
OURO = 1_434_652_673 - 2049  # without the exit gate
# Of a Jet block of width 2048 with 8 heads of 128 x 256: q, k (2048 x 1024 each), v, g, o (2048 x 2048 each),
# W_a and W_b (2048 x 8 each), W1 (2048 x 256), W2 (256 x 8192) and its bias, A_log, dt_bias, and two norms.
JET = 2 * 2048 * 1024 + 3 * 2048 * 2048 + 2 * 2048 * 8 + 2048 * 256 + 256 * 8192 + 8192 + 8 + 8 + 256 + 2048


def ouro(**run: object) -> Config:
    config = compose_config(["model=ouro_1b4_jet"])
    settings = {"init_from": "runs/ouro", "init_new": NEW, "device": "cpu"} | run
    return replace(config, run=replace(config.run, **settings))


def test_six_jet_blocks_in_ouro_are_a_twelfth_of_it() -> None:
    config = ouro(max_new_fraction=0.1)
    found = budget(config, 49152)
    assert found == Budget(total=OURO + 6 * JET, new=6 * JET, trained=found.total)
    assert 0.07 < found.new / found.total < 0.082
    check_budget(config, 49152)
    assert budget_lines(config, 49152) == [
        f"{found.new:,} of {found.total:,} weights ({found.new / found.total:.1%}) are new: run.init_new"
    ]


def test_more_than_the_budget_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.init_new names .*, 7.\d% of the model, and .*=0.05; insert"):
        check_budget(ouro(max_new_fraction=0.05), 49152)
    run = RunConfig(dir=str(tmp_path / "run"), init_from="absent", init_new=("*",), max_new_fraction=0.5)
    with pytest.raises(ConfigError, match=r"100.0% of the model, and run.max_new_fraction=0.5"):
        train(Config(run=run), "")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"run.max_new_fraction=1.5 must lie in 0..1"):
        RunConfig(max_new_fraction=1.5)


def test_a_pattern_that_freezes_nothing_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path / "run")), optim=OptimConfig(frozen=("blocks.0.*",)))
    with pytest.raises(ConfigError, match=r"optim.frozen='blocks.0.\*' names no weight"):
        train(config, "")
    assert not (tmp_path / "run").exists()


def test_the_plan_tells_what_is_new_and_what_is_trained() -> None:
    """One of two equal blocks, each a little under half of the model."""
    run = RunConfig(init_from="somewhere", init_new=("stack.blocks.1.*",))
    optim = OptimConfig(frozen=("*", "!stack.blocks.1.*"))
    config = Config(run=run, model=ModelConfig(pattern="attn gdn"), optim=optim)
    text = plan_report(config, make_task(config.task))
    total, new, trained = budget(config, make_task(config.task).vocab_size)
    assert new == trained < total
    assert f"  {new:,} of {total:,} weights ({new / total:.1%}) are new: run.init_new\n" in text
    assert f"  {new:,} of {total:,} weights ({new / total:.1%}) are trained: optim.frozen\n" in text
    assert "weights (" not in plan_report(Config(), make_task(config.task))
