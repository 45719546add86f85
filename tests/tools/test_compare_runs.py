import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.slices import whole

SCRIPT = Path(__file__).parents[2] / "tools" / "compare_runs.py"
spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
compare_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_runs)

ROWS = [
    {
        "step": 10,
        "train/loss": 1.5,
        "train/mfu": 0.1,
        "train/step_seconds": 1.0,
        "tokens_per_second": 1,
        "peak_gib": 1,
    },
    {"step": 20, "train/loss": float("nan"), "eval/accuracy": 0.25},
]


def save(folder, step, model):
    saver = Saver(folder / "checkpoints", keep_last=2, keep_every_steps=0)
    saver.save(step, {"model": [whole(name, tensor) for name, tensor in model.items()]}, {"trainer": {}})
    assert saver.wait() is None


def make_run(folder, rows=ROWS, step=20, **tensors):
    model = {"w": torch.tensor([1.0, -0.0, float("nan")]), "n": torch.tensor(3)} | tensors
    save(folder, step, model)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(capsys, a, b):
    code = compare_runs.main([str(a), str(b)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_equal_runs_although_what_was_measured_differs(tmp_path, capsys):
    measured = [
        ROWS[0] | {"train/mfu": 0.3, "train/step_seconds": 2.0, "tokens_per_second": 9, "peak_gib": 7},
        ROWS[1] | {"eval/evaluation_seconds": 3.0},
    ]
    code, text = compare(capsys, make_run(tmp_path / "a"), make_run(tmp_path / "b", measured))
    assert code == 0
    assert text == "EQUAL: 2 tensors of step 20, 2 rows and 5 values of metrics with 3 keys\n"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"w": torch.tensor([1.5, -0.0, float("nan")])}, "model/w: max abs difference 0.5"),
        ({"w": torch.tensor([1.0, 0.0, float("nan")])}, "model/w: max abs difference 0\n"),
        ({"w": torch.tensor([1.0, -0.0, 2.0])}, "model/w: max abs difference nan"),
        ({"n": torch.tensor(7)}, "model/n: max abs difference 4"),
        ({"n": torch.tensor([3])}, "model/n: torch.int64 [] and torch.int64 [1]"),
        ({"more": torch.tensor(3)}, "model/more: only in the second run"),
        ({"step": 30}, "final checkpoints: step 20 and step 30"),
        ({"rows": ROWS[:1]}, "metrics.jsonl: 2 rows and 1 rows"),
        (
            {"rows": [ROWS[0], {"step": 20, "train/loss": 0.5, "eval/accuracy": 0.25}]},
            "train/loss is NaN and 0.5",
        ),
        (
            {"rows": [ROWS[0], {"step": 20, "train/loss": float("nan")}]},
            "step 20: eval/accuracy is 0.25 and absent",
        ),
        (
            {"rows": [ROWS[0] | {"train/loss": 1.5000000000000002}, ROWS[1]]},
            "row 1, step 10: train/loss is 1.5 and",
        ),
    ],
)
def test_each_difference_is_named(tmp_path, capsys, changed, sentence):
    code, text = compare(capsys, make_run(tmp_path / "a"), make_run(tmp_path / "b", **changed))
    assert code == 1
    assert sentence in text
    assert "DIFFERENT in 1 places, 1 of" in text


def test_only_the_first_differences_are_printed(tmp_path, capsys):
    tensors = {f"t{i}": torch.tensor(i) for i in range(9)}
    other = {name: t + 1 for name, t in tensors.items()}
    a, b = make_run(tmp_path / "a", **tensors), make_run(tmp_path / "b", **other)
    assert compare_runs.main([str(a), str(b), "--show", "3"]) == 1
    assert capsys.readouterr().out.splitlines()[3:] == ["DIFFERENT in 9 places, 3 of them shown"]


@pytest.mark.parametrize(
    "lack", ["folder", "checkpoint", "whole", "tensors", "metrics", "rows", "values", "torn"]
)
def test_a_run_without_something_to_compare_is_unusable(tmp_path, capsys, lack):
    a, b = (make_run(tmp_path / name) for name in "ab")
    for run in (a, b):  # both lack it: two empty things must not be equal
        if lack == "folder":
            run = run.rename(run.with_name(run.name + "_moved"))
        elif lack == "checkpoint":
            (run / "checkpoints").rename(run / "elsewhere")
        elif lack == "whole":
            (run / "checkpoints" / "step_00000020" / "manifest.json").unlink()
        elif lack == "tensors":
            save(run, 20, {})
        else:
            text = {"rows": "", "values": '{"step": 1, "a_seconds": 2}\n', "torn": '{"step": 1, "a'}.get(lack)
            (run / "metrics.jsonl").unlink()
            if text is not None:
                (run / "metrics.jsonl").write_text(text)
    code, text = compare(capsys, a, b)
    assert code == 2
    assert "nothing compared" in text


def test_the_command_line(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", n=torch.tensor(4))
    root = str(SCRIPT.parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, a, b], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "model/n: max abs difference 1" in done.stdout
    usage = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=environment, capture_output=True, text=True
    )
    assert usage.returncode == 0
    assert "Exit code: 0 equal, 1 different" in usage.stdout
