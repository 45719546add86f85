"""A whole study: made once, whatever is asked again; stopped, killed and gone on with; and its report."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_study import TWO_RUNS, arguments, tiny

from sleeptrain.study import trial
from sleeptrain.study.__main__ import main
from sleeptrain.study.collect import collect
from sleeptrain.study.plan import Plan, plan, shape_id, shapes
from sleeptrain.study.run import is_done, run, trials_folder
from sleeptrain.study.spec import Asked
from sleeptrain.study.timing import measure

pytestmark = pytest.mark.more


def planned(asked: Asked) -> Plan:
    timings = measure(asked.folder, shapes(asked.study))
    return plan(asked, lambda config: timings[shape_id(config)].step_seconds)


def results(asked: Asked) -> dict[str, dict]:
    found = {}
    for path in trials_folder(asked).glob(f"*/{trial.RESULT}"):
        result = json.loads(path.read_text())
        found[path.parent.name] = result["evaluations"]
    return found


def changed(asked: Asked) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in trials_folder(asked).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """The study, by the command without a verb."""
    folder = tmp_path_factory.mktemp("studies") / "made"
    assert main(arguments(folder)) == 0
    return tiny(folder)


def test_all_is_made_and_nothing_twice(made: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    of_study = planned(made)
    assert all(is_done(made, name, config) for name, config in of_study.trials.items())
    before = changed(made)
    for verb in ("plan", "run", "status", "collect", "report"):
        assert main([verb, *arguments(made.folder)]) == 0
    assert changed(made) == before
    said = capsys.readouterr().out
    assert f"{len(of_study.trials)} of {len(of_study.trials)} runs are done" in said
    assert "0 are left" in said


def test_more_examples_are_scored_without_training(made: Asked, tmp_path: Path) -> None:
    more = tiny(made.folder, "study.num_examples=48")
    of_study = planned(more)
    name = next(iter(of_study.trials))
    metrics = (trials_folder(made) / name / "metrics.jsonl").stat().st_mtime_ns
    assert not is_done(more, name, of_study.trials[name])
    outcome = run(more, {name: of_study.trials[name]})
    assert outcome.failed == {}
    assert (trials_folder(made) / name / "metrics.jsonl").stat().st_mtime_ns == metrics
    assert {one["num_examples"] for one in results(made)[name]} == {48}
    run(made, of_study.trials)  # as the other tests want it


def test_the_report_says_and_shows_what_there_is(made: Asked) -> None:
    folder = made.report_folder
    page, markdown = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    for figure in folder.glob("*.svg"):
        assert f'<img src="{figure.name}"' in page
        assert f"]({figure.name})" in markdown
    shown = {f.name for f in folder.glob("*.svg")}
    assert {"exact_accuracy_over_passes.svg", "loss_over_passes.svg", "matrix_0.svg"} <= shown
    assert {"controls_0.svg", "learning_curves.svg", "ratio.svg"} <= shown
    for text in (page, markdown):
        assert "At equal training FLOPs, N &gt; 1" in text or "At equal training FLOPs, N > 1" in text
        assert "python -m sleeptrain.study report study=rule110_n" in text
        assert "equal wall-clock" in text
    rows = list(csv.DictReader((folder / "data.csv").open()))
    data = collect(made, planned(made), measure(made.folder, []))
    assert len(rows) == len(data.rows)
    assert {row["metric"] for row in rows} >= {"exact_accuracy", "loss", "flops_ratio", "tokens_per_second"}


def test_a_study_that_trains_nothing_reports_what_a_step_costs(tmp_path: Path) -> None:
    assert main(arguments(tmp_path, *TWO_RUNS, "study.trains=false")) == 0
    assert not trials_folder(tiny(tmp_path)).exists()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "nothing was trained" in text
    assert "Not finished" not in text
    assert "| N = 2 |" in text


def test_a_mean_is_that_of_the_scores(made: Asked) -> None:
    data = collect(made, planned(made), {})
    chosen = data.select({"metric": "exact_accuracy", "role": "grid"})
    assert chosen
    for row in chosen:
        assert data.scores(row).mean() == pytest.approx(row["value"])


def test_processes_of_this_machine_make_what_this_process_makes(made: Asked, tmp_path: Path) -> None:
    here = tiny(
        tmp_path, "study.where=process", "study.seeds=[0]", "study.budgets=[tokens]", "study.controls=[]"
    )
    of_study = planned(here)
    assert not run(here, of_study.trials).failed
    found, expected = results(here), results(made)
    assert len(found) == len(of_study.trials) == 2
    assert {name: expected[name] for name in found} == found


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A study that is running, its first rows written."""
    command = [sys.executable, "-m", "sleeptrain.study", "run", *arguments(tmp_path, "study.slots=2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob(f"trials/*/{trial.RESULT}"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on_and_repeats_nothing(
    started: subprocess.Popen[str], made: Asked, tmp_path: Path, number: int
) -> None:
    started.send_signal(number)
    output, _ = started.communicate(timeout=120)
    asked = tiny(tmp_path)
    if number == signal.SIGTERM:
        assert started.returncode == 75, output
        assert "stopped; the same command goes on" in output
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"trials/*/{trial.RESULT}")}
    assert finished
    deadline = time.monotonic() + 60
    while any(trial.is_taken(path) for path in tmp_path.glob("trials/*")):  # it has saved, or is saving
        assert time.monotonic() < deadline
        time.sleep(0.1)
    of_study = planned(asked)
    assert not run(asked, of_study.trials).failed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    common = results(asked).keys() & results(made).keys()  # wall-clock budgets depend on the timing
    assert len(common) >= 6
    assert {name: results(asked)[name] for name in common} == {name: results(made)[name] for name in common}


def test_what_another_process_makes_is_left_to_it(made: Asked, tmp_path: Path) -> None:
    asked = tiny(
        tmp_path, "study.where=process", "study.seeds=[0]", "study.budgets=[tokens]", "study.controls=[]"
    )
    of_study = planned(asked)
    taken, *others = of_study.trials
    holder = "import sys, time; from pathlib import Path; from sleeptrain.engine.resilience import RunLock\n"
    holder += "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", holder, str(trials_folder(asked) / taken / trial.CLAIM)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        outcome = run(asked, of_study.trials)
    finally:
        process.kill()
        process.wait()
    assert outcome.elsewhere == [taken]
    assert outcome.failed == {}
    assert sorted(results(asked)) == sorted(others)


def test_a_run_that_fails_is_named_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "study.grid={sleep.num_passes: [1, 2], optim.spike_factor: [50, 1e-9]}"
    settings = [*arguments(tmp_path, *TWO_RUNS, "optim.max_skipped_steps=2"), bad]
    assert main(["run", *settings]) == 1
    told = capsys.readouterr().err
    assert told.count("error: run ") == 2
    assert "skipped" in told
    assert len(list(tmp_path.glob(f"trials/*/{trial.RESULT}"))) == 2
    main(["status", *settings])
    assert "failed: n1_seed0_" in capsys.readouterr().out


def test_a_wrong_study_has_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "study=nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown study 'nothing'")
    assert main(["--help"]) == 0
    assert "study.seeds=[0,1,2]" in capsys.readouterr().out
