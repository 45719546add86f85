"""A run that keeps copies of its checkpoints in a bucket outlives its disk."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from fault_runs import Process, at_step, newest, train

from sleeptrain.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.more


def test_a_run_whose_disk_is_gone_goes_on_and_ends_bit_equal(tmp_path: Path, reference: Path) -> None:
    folder, settings = tmp_path / "run", [f"checkpoint.bucket=file://{tmp_path}/bucket"]
    first = Process(folder, settings, at_step(20))
    first.await_moment()
    first.end(signal.SIGKILL)
    shutil.rmtree(folder)
    second = Process(folder, settings)
    assert second.wait() == 0, second.output()
    assert f"was fetched from file://{tmp_path}/bucket/quickstart" in second.output()
    ends = [Checkpoint(newest(run)) for run in (folder, reference)]
    for group in ends[0].groups:
        a, b = (end.read_all(group) for end in ends)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    copies = {path.name for path in (tmp_path / "bucket" / "quickstart").iterdir()}
    assert copies == {path.name for path in (folder / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s3://name:secret@bucket/x", "holds a URL with a name, password or query in it"),
        ("nowhere://x", "checkpoint.bucket=nowhere://x/quickstart cannot be used"),
    ],
)
def test_a_place_that_is_none_is_refused(tmp_path: Path, url: str, sentence: str) -> None:
    assert train(tmp_path / "run", f"checkpoint.bucket={url}") == 2
    assert sentence in (tmp_path / "run.out").read_text()
    assert not (tmp_path / "run").exists()
