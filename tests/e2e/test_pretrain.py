"""The command line as a user meets it: a whole run, its folder, resuming, refusals."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from e2e_runs import TINY, command, compare_runs, environment

from sleeptrain.config import Config
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.evaluate import main as evaluate
from sleeptrain.pretrain import help_text, main
from sleeptrain.schema import describe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run; tests that write work on a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = subprocess.run(command(folder), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 24/24" in done.stdout
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pretrain(folder: Path, *settings: str) -> int:
    return main([f"run.dir={folder}", *TINY, *settings])


def test_a_run_leaves_what_the_readme_promises(copy: Path) -> None:
    assert (copy / "config.yaml").read_text().startswith("run:")
    steps = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert steps == ["step_00000020", "step_00000024"]
    assert {p.name for p in (copy / "figures").iterdir()} == {"learning_curve.svg", "learning_curve.png"}
    rows = read_metrics(copy)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(3, 25, 3))
    held_out = [row for row in rows if "eval/exact_accuracy" in row]
    assert [row["step"] for row in held_out] == [8, 16, 24]
    for n in (1, 2, 3):
        assert 0 <= held_out[-1][f"eval/exact_accuracy/steps_1/passes_{n}"] <= 1
    assert held_out[-1]["eval/loss"] == held_out[-1]["eval/loss/steps_1/passes_2"]
    for name in ("train/grad_norm", "train/muon_lr", "train/num_passes", "train/tokens_per_second"):
        assert all(name in row for row in training)
    assert all(row["memory/norm/pass_2"] > 0 and row["memory/update/pass_2"] > 0 for row in training)
    assert pretrain(copy) == 0  # nothing left to do, nothing lost
    assert read_metrics(copy) == rows


def test_evaluate_scores_every_difficulty_and_n(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate([f"checkpoint={copy}", "num_passes=[1,2]", "difficulties=[1,2]", "num_examples=32"]) == 0
    printed = capsys.readouterr().out
    assert "steps 2" in printed
    assert "N=2" in printed
    document = json.loads((copy / "eval" / "step_00000024_test.json").read_text())
    assert [(r["num_passes"], r["difficulty"]) for r in document["results"]] == [
        (1, 1),
        (2, 1),
        (1, 2),
        (2, 2),
    ]
    assert evaluate([f"checkpoint={copy}", "task.num_strings=3"]) == 2
    assert "vocabulary of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["num_passes=[1,2"], "KEY=[1,2]"),
        (["num_passes=[0]"], "num_passes=[0]"),
        (["difficulties=[-3]"], "-3"),
        (["task=depo"], "task.name=depo"),
        (["spilt=test"], "split"),
        (["checkpoint=nowhere"], "checkpoint=nowhere"),
    ],
)
def test_evaluate_refuses_in_one_sentence(
    finished: Path, settings: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    assert evaluate([f"checkpoint={finished}", *settings]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert named in printed
    assert len(printed.strip().splitlines()) == 1


def test_evaluate_refuses_passes_where_nothing_is_written(tmp_path: Path, capsys) -> None:
    cleared = ["model.pattern=attn", "sleep.num_passes=1", "eval.num_passes=[]", "optim.num_steps=1"]
    tiny = [t for t in TINY if t.split("=")[0] not in {s.split("=")[0] for s in cleared}]
    assert main([f"run.dir={tmp_path / 'run'}", *tiny, *cleared]) == 0
    assert evaluate([f"checkpoint={tmp_path / 'run'}", "num_passes=[1,3]"]) == 2
    assert "num_passes=3 needs a gdn or jet block" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["sampled", "growing"])
def test_a_changing_n_goes_on_where_it_was(schedule: str, tmp_path: Path) -> None:
    changing = [f"sleep.passes_schedule={schedule}", "sleep.num_passes=3", "sleep.min_passes=1"]
    assert pretrain(tmp_path / "whole", *changing) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000024")
    assert pretrain(tmp_path / "cut", *changing) == 0  # steps 21 to 24 again
    assert compare_runs(tmp_path / "whole", tmp_path / "cut") == ""
    seen = {row["train/num_passes"] for row in read_metrics(tmp_path / "cut") if "train/loss" in row}
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["task=rule11"], "rule110"),
        (["model.pattern=attn gnd"], "'gnd'"),
        (["model.rule=gated_dleta"], "gated_delta"),
        (["sleep.window=6"], "sleep.window_tokens"),
        (["sleep.window_tokens=99"], "sleep.window_tokens=99"),
        (["sleep.num_passes=0"], "sleep.num_passes=0"),
        (["model.num_heads=3"], "model.num_heads=3"),
        (["model.pattern=attn"], "gdn or jet"),
        (["just_a_word"], "KEY=VALUE"),
        (["task.width=8"], "sleep.window_tokens=6 does not fit"),
        (["task.widht=6"], "did you mean 'task.width'"),
        (["task=depo"], "experiment=depo_small"),
        (["eval.difficulties=[2,-1]"], "-1"),
        (["eval.difficulties=[-1]", "dry_run=true"], "-1"),
        (["run.device=cuda"], "run.device=cuda"),
        (["log.wandb=online"], "WANDB_API_KEY"),
    ],
)
def test_bad_settings_get_one_sentence(
    tmp_path: Path, settings: list[str], named: str, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tiny = [t for t in TINY if t.split("=")[0] not in {s.split("=")[0] for s in settings}]
    assert main([*tiny, *settings]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert named in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_an_empty_text_folder_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "texts").mkdir()
    settings = ["experiment=text_small", f"task.folder={tmp_path / 'texts'}", f"run.dir={tmp_path / 'run'}"]
    assert main(settings) == 2
    assert "task.folder" in capsys.readouterr().err


def test_text_is_scored_beside_gzip(tmp_path: Path, capsys) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"{i} is a number, and {i + 1} comes after it. " * 4)
    small = [*("model.d_model=16", "model.num_heads=2", "model.memory_heads=2"), "data.batch_sequences=2"]
    text = [f"task.folder={texts}", "task.sequence_tokens=32", "sleep.window_tokens=8", "optim.num_steps=1"]
    assert main(["experiment=text_small", f"run.dir={tmp_path / 'run'}", *small, *text]) == 0
    assert evaluate([f"checkpoint={tmp_path / 'run'}", "num_examples=1"]) == 0
    assert "to beat" not in capsys.readouterr().out  # gzip's figure is of the whole split
    assert evaluate([f"checkpoint={tmp_path / 'run'}"]) == 0
    assert "to beat: bits_per_byte of gzip -9 " in capsys.readouterr().out
    document = json.loads((tmp_path / "run" / "eval" / "step_00000001_test.json").read_text())
    assert 0 < document["marks"]["bits_per_byte of gzip -9"] < 8


def test_wandb_offline_keeps_the_same_rows(finished: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", "log.wandb=offline") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert compare_runs(tmp_path / "run", finished) == ""


def test_non_finite_updates_are_skipped_counted_and_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wild = ["optim.muon_lr=1e30", "optim.adamw_lr=1e30", "optim.max_skipped_steps=3"]
    assert pretrain(tmp_path / "run", *wild, "checkpoint.every_steps=1") == 1
    assert "3 updates in a row were skipped" in capsys.readouterr().err
    # The skipped steps were not saved: their checkpoints would have pushed out those before them.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_help_names_every_setting() -> None:
    text = help_text()
    for name, default, _ in describe(Config):
        assert f"  {name}={default}" in text


@pytest.mark.parametrize(("experiment", "windows"), [("rule110_paper", "24x4/4"), ("depo_paper", "75x4/60")])
def test_dry_run_shows_the_plan_of_the_paper(experiment: str, windows: str, capsys) -> None:
    assert main([f"experiment={experiment}", "dry_run=true"]) == 0
    assert windows in capsys.readouterr().out
