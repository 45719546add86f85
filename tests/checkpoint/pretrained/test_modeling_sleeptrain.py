"""What an exported model that sleeps predicts, in a process without sleeptrain, is what a session predicts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra bench brings it; make test-more installs that")

import torch
from exported import NEW_TOKENS, PASSES
from safetensors.torch import load_file, save_file
from sleepers import CASES, VOCAB, WINDOW_TOKENS, sleeper
from torch import Tensor

from sleeptrain import Session
from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
from sleeptrain.engine.restored import find

pytestmark = pytest.mark.more
Said = dict[str, dict[str, Tensor]]


def some_ids() -> Tensor:
    return torch.randint(VOCAB, (2, 31), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each case."""
    folder = tmp_path_factory.mktemp("runs")
    for name in CASES:
        sleeper(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def said(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What the exported folders predict: by case, then by name."""
    out = tmp_path_factory.mktemp("exported")
    for name in CASES:
        assert export_checkpoint(find(runs / name), out / name, lambda name: None)
    return run_alone(out, [out / name for name in CASES])


def run_alone(out: Path, folders: list[Path]) -> Said:
    save_file({"ids": some_ids()}, out / "ids.safetensors")
    script = Path(__file__).with_name("exported.py")
    command = [sys.executable, "-I", str(script), str(out / "ids.safetensors"), *map(str, folders)]
    environment = os.environ | {"HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {folder.name: load_file(f"{folder}.safetensors") for folder in folders}


@pytest.mark.parametrize("num_passes", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_it_predicts_and_writes_what_a_session_does(
    name: str, num_passes: int, runs: Path, said: Said
) -> None:
    ids, found = some_ids(), said[name]
    session = Session(runs / name, num_passes=num_passes, num_sequences=len(ids), device="cpu")
    expected = session.feed(ids)
    assert expected.std() > 0.2
    for way in ("at_once", "in_pieces", "by_token"):
        torch.testing.assert_close(found[f"{way}.{num_passes}"], expected, rtol=0, atol=1e-5)
    session.tokenizer = None  # as there: no token ends what it writes
    written = torch.stack(list(session.generate(NEW_TOKENS)), dim=1)
    assert torch.equal(found[f"written.{num_passes}"], written)


@pytest.mark.parametrize("name", CASES)
def test_passes_matter_and_what_it_holds_is_bounded(name: str, said: Said) -> None:
    found, sleeps = said[name], CASES[name][1].get("window_tokens") != 0
    assert torch.equal(found["at_once.1"], found["at_once.3"]) != sleeps
    assert found["held.3"] == (WINDOW_TOKENS - 1 if sleeps else some_ids().shape[1])


@pytest.mark.parametrize("name", CASES)
def test_beams_take_their_memory_along(name: str, said: Said) -> None:
    for num_passes in PASSES:
        assert torch.equal(said[name][f"beams.{num_passes}"], said[name][f"beams_anew.{num_passes}"])
