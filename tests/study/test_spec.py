"""Studies as YAML and as arguments."""

from pathlib import Path

import pytest

from sleeptrain.schema import ConfigError
from sleeptrain.study.plan import plan
from sleeptrain.study.spec import STUDIES, ask, names, to_yaml


def scales(name: str) -> list[str]:
    from omegaconf import OmegaConf

    return list(OmegaConf.load(STUDIES / f"{name}.yaml").get("scales", {"": {}}))


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name in names() for scale in scales(name)])
def test_every_study_plans_at_every_scale(name: str, scale: str, tmp_path: Path) -> None:
    asked = ask([f"study={name}", f"study.dir={tmp_path}", *([f"study.scale={scale}"] if scale else [])])
    planned = plan(asked, lambda config: float(config.sleep.num_passes))
    assert planned.trials
    assert {point.trial for point in planned.points} == planned.trials.keys()
    assert asked.study.title
    assert asked.study.question
    seeds = {config.run.seed for config in planned.trials.values()}
    assert seeds == set(asked.study.seeds)


def test_settings_reach_every_run_and_keys_of_the_study_the_study(tmp_path: Path) -> None:
    asked = ask(["study=rule110_n", "study.seeds=[7]", "optim.num_steps=30", f"study.dir={tmp_path}"])
    assert asked.study.seeds == (7,)
    assert asked.folder == tmp_path
    assert {c.optim.muon_lr for c in plan(asked, lambda config: 1.0).trials.values()} == {0.005}
    tokens = [p for p in plan(asked, lambda config: 1.0).points if p.budget == "tokens"]
    assert {plan(asked, lambda config: 1.0).trials[p.trial].optim.num_steps for p in tokens} == {30}


def test_the_command_leaves_out_where_it_runs() -> None:
    asked = ask(["study=rule110_n", "study.slots=3", "study.dir=x", "study.seeds=[1]", "task.width=10"])
    assert asked.command == "python -m sleeptrain.study study=rule110_n 'study.seeds=[1]' task.width=10"


def test_a_scale_replaces_keys_and_adds_settings() -> None:
    small, paper = (ask(["study=rule110_n", f"study.scale={s}"]) for s in ("cpu_minutes", "paper"))
    assert small.study.choices == ("experiment=quickstart",)
    assert paper.study.choices == ("experiment=rule110_paper",)
    assert small.study.title == paper.study.title
    assert small.folder.name == "rule110_n_cpu_minutes"
    assert "scale: paper" in to_yaml(paper)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give study=NAME: "),
        (["study=rule11_n"], "unknown study 'rule11_n'; did you mean 'rule110_n'?"),
        (["study=rule110_n", "study.scale=cpu"], "unknown study.scale of rule110_n: 'cpu'"),
        (["study=rule110_n", "study.sedes=[1]"], "unknown setting 'study.sedes'"),
        (["study=rule110_n", "study.seeds=[]"], "study.seeds is empty; give at least one"),
        (["study=rule110_n", "study.slots=0"], "study.slots=0 must be at least 1"),
        (["study=rule110_n", "study.where=cloud"], "unknown value of study.where: 'cloud'"),
        (["study=rule110_n", "study.grid={sleep.num_passes: x}"], "study.grid.sleep.num_passes='x'"),
        (["study=rule110_n", "quick"], "'quick' is no setting"),
        (["study=rule110_n", "study.seeds=[1"], "an argument cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ask(arguments)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["optim.num_stesp=3"], "unknown setting 'optim.num_stesp'"),
        (["task.width=9"], "sleep.window_tokens=10 does not fit task rule110"),
        (["study.difficulties=[-1]"], "eval.difficulties holds -1"),
    ],
)
def test_a_run_that_would_be_refused_is_refused_by_the_plan(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(ask(["study=rule110_n", *settings]), lambda config: 1.0)
    assert sentence in str(refused.value)
