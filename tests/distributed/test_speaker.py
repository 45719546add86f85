"""A sentence that several processes have to say is said once on the terminal, by the lowest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.more

# Stands for ``python -m sleeptrain.pretrain`` on ranks of which some have other arguments.
PRETRAIN = """
import os, sys
from sleeptrain.pretrain import main
wrong = sys.argv[1].split(",")
extra = [sys.argv[2]] if os.environ["RANK"] in wrong else []
sys.exit(main([*sys.argv[3:], *extra]))
"""
DP = ["parallel.data_size=3", "data.batch_sequences=9", "optim.num_steps=2", "eval.num_examples=4"]


def torchrun(tmp_path: Path, wrong: str, setting: str) -> str:
    """What three processes of torchrun print to the terminal, those of ``wrong`` started with ``setting``."""
    script = tmp_path / "pretrain_of_ranks.py"
    script.write_text(PRETRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    run = ["experiment=quickstart", "run.device=cpu", f"run.dir={tmp_path / 'run'}", *DP]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), wrong, setting, *run], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("task.widht=6", "unknown setting 'task.widht'"),  # before any process has met another
        ("parallel.tensor_size=2", "needs 6 processes and there are 3"),
        ("data.batch_sequences=8", "data.batch_sequences=8 does not divide among 3"),
    ],
)
def test_a_wrong_setting_of_all_is_said_once(tmp_path: Path, setting: str, sentence: str) -> None:
    said = re.findall(r"error: .*", torchrun(tmp_path, "0,1,2", setting))
    assert len(said) == 1
    assert sentence in said[0]


def test_of_two_that_see_it_the_lower_says_it(tmp_path: Path) -> None:
    """Rank 0 goes on, and waits for the others in vain."""
    said = torchrun(tmp_path, "1,2", "task.widht=6").count("error: unknown setting 'task.widht'")
    assert said == 1
