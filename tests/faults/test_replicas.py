"""R11: a bit that flips silently on one replica is found at the next check, and before anything is saved; the
rank and the tensor are named, and the steps since the last checkpoint are made again: the run ends bit-equal
to one without the fault."""

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_runs import compare_runs
from injections import NUM_STEPS, Report, flipped_bit, log_of, run

from sleeptrain.checkpoint.store import find_latest

pytestmark = pytest.mark.more
NAME = "stack.blocks.1.mixer.v_proj.weight"
WEIGHT = f"weight/{NAME}"
SMALLER = ("sleep.num_passes=1", "model.pattern=attn gdn")
CHECKED = ("run.check_replicas_every_steps=3", *SMALLER)
Clean = Callable[[str], Path]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """The folder of an undisturbed run, by its topology."""
    parent = tmp_path_factory.mktemp("clean")

    def of(topology: str) -> Path:
        folder = parent / topology.replace(" ", "_")
        if not folder.exists():
            assert {report.code for report in run(folder, topology, *CHECKED)} == {0}
            assert "warning" not in log_of(folder)
        return folder

    return of


def warnings_of(folder: Path) -> list[str]:
    return [line for line in log_of(folder).splitlines() if line.startswith(("warning", "error"))]


@pytest.mark.parametrize(
    ("topology", "tensor", "bit"),
    [
        ("dp2 zero0", WEIGHT, 30),  # of the exponent: enormous
        ("dp2 zero0", "exp_avg_sq/embed.weight", 31),
        ("dp2 zero1", WEIGHT, 12),
        ("dp2 zero1", f"master/{NAME}", 20),
        ("tp2 dp2", WEIGHT, 22),
        ("dp3 zero1", WEIGHT, 31),
    ],
)
def test_a_flipped_bit_is_found_and_named_and_undone(
    topology: str, tensor: str, bit: int, clean: Clean, tmp_path: Path
) -> None:
    """R11: in step 8, after a checkpoint of step 5."""
    folder = tmp_path / "run"
    reports = run(folder, topology, *CHECKED, faults=(flipped_bit("step", 7, tensor, bit, rank=1),))
    assert {report.code for report in reports} == {0}
    kind, name = tensor.split("/")
    shown = name if kind in ("weight", "master") else f"{name}/{kind}"
    found = f"rank 1 holds other bits of {shown} than its last update left"
    assert f"warning: after step 9 {found}; the steps since 5 are made again" in warnings_of(folder)
    assert compare_runs(folder, clean(topology)) == ""


@pytest.mark.parametrize(
    ("topology", "found"),
    [("dp2 zero0", "ranks 0 and 1 hold different bits"), ("dp3 zero0", "rank 2 holds other bits")],
)
def test_an_update_that_went_wrong_shows_in_the_copies(
    topology: str, found: str, clean: Clean, tmp_path: Path
) -> None:
    """R11: of two nobody knows which one, of three the one that differs from the others."""
    folder, rank = tmp_path / "run", 1 if topology.startswith("dp2") else 2
    run(folder, topology, *CHECKED, faults=(flipped_bit("update", 6, WEIGHT, 3, rank),))
    assert len(warnings_of(folder)) == 1
    assert f"after step 9 {found} of {NAME}" in warnings_of(folder)[0]
    assert compare_runs(folder, clean(topology)) == ""


def test_a_bit_that_flips_before_a_save_is_not_saved(clean: Clean, tmp_path: Path) -> None:
    """R11: in the evaluation of the last step; what is saved then is that of the second time."""
    folder = tmp_path / "run"
    fault = flipped_bit("evaluation", NUM_STEPS - 1, WEIGHT, 0, rank=0)
    run(folder, "dp2 zero1", *CHECKED, faults=(fault,))
    assert len(warnings_of(folder)) == 1
    assert f"after step {NUM_STEPS} rank 0 holds other bits of {NAME}" in warnings_of(folder)[0]
    assert "the steps since 10 are made again" in warnings_of(folder)[0]
    assert compare_runs(folder, clean("dp2 zero1")) == ""


def test_what_happens_again_and_again_ends_the_run(clean: Clean, tmp_path: Path) -> None:
    """R11: a bad memory cell; the last checkpoint is whole, and a sound machine goes on from there."""
    folder = tmp_path / "run"
    fault = flipped_bit("step", 7, WEIGHT, 5, rank=1, times=NUM_STEPS)
    assert {report.code for report in run(folder, "dp2 zero1", *CHECKED, faults=(fault,))} == {1}
    *warnings, error = warnings_of(folder)
    assert len(warnings) == 3
    assert "rank 1 holds other bits" in error
    assert "although the steps since 5 were made again 3 times" in error
    assert find_latest(folder / "checkpoints", print).step == 5
    assert {report.code for report in run(folder, "dp2 zero1", *CHECKED)} == {0}
    assert compare_runs(folder, clean("dp2 zero1")) == ""


def test_without_a_checkpoint_the_run_ends(tmp_path: Path) -> None:
    """R11: in the first steps."""
    folder = tmp_path / "run"
    fault = flipped_bit("step", 2, WEIGHT, 5, rank=1)
    assert {report.code for report in run(folder, "dp2 zero1", *CHECKED, faults=(fault,))} == {1}
    assert "no checkpoint is there to go back to" in warnings_of(folder)[-1]
    assert find_latest(folder / "checkpoints", print) is None


@pytest.mark.parametrize("topology", ["dp2 zero0", "dp2 zero1"])
def test_without_the_check_the_run_ends_with_other_weights(
    topology: str, clean: Clean, tmp_path: Path
) -> None:
    """Negative control: nothing is said of it."""
    folder, fault = tmp_path / "run", flipped_bit("step", 7, WEIGHT, 12, rank=1)
    reports = run(folder, topology, *SMALLER, "run.check_replicas_every_steps=0", faults=(fault,))
    assert reports == [Report(0, [], [])] * 2
    assert warnings_of(folder) == []
    assert "DIFFERENT" in compare_runs(folder, clean(topology))
