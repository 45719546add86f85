"""What an exported model that sleeps predicts, in a process without sleeptrain, a session predicts, too."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra bench brings it; make test-more installs that")

import torch
from exported import NEW_TOKENS, OF_BEAMS, PASSES
from safetensors.torch import load_file, save_file
from sleepers import CASES, VOCAB, WINDOW_TOKENS, sleeper
from torch import Tensor

from sleeptrain import Session
from sleeptrain.checkpoint.huggingface.modeling_sleeptrain import SleeptrainConfig, SleeptrainForCausalLM
from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
from sleeptrain.checkpoint.huggingface.sleeping import sleeping_config
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.engine.restored import find, restore
from sleeptrain.model import session as sessions

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
def test_in_float64_to_the_last_bits(name: str, runs: Path, said: Said) -> None:
    """So that no small error hides behind the rounding of many passes."""
    model, ids = restore(runs / name, "cpu").backend.model.double(), some_ids()
    expected, _ = sessions.feed(model, sessions.begin(model, len(ids)), ids, model.sleep.num_passes)
    torch.testing.assert_close(said[name]["exactly"], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_gates_and_logits_are_float32(name: str, said: Said) -> None:
    found, expected = said[name]["in_bfloat16"], said[name]["at_once.1"]
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.03


@pytest.mark.parametrize("name", CASES)
def test_passes_matter_and_what_it_holds_is_bounded(name: str, said: Said) -> None:
    found, sleeps = said[name], CASES[name][1].get("window_tokens") != 0
    change = (found["at_once.1"] - found["at_once.3"]).abs().max()
    assert (change > 0.05) if sleeps else (change == 0)
    assert found["held.3"] == (WINDOW_TOKENS - 1 if sleeps else some_ids().shape[1])


@pytest.mark.parametrize("name", OF_BEAMS)
def test_beams_take_their_memory_along(name: str, said: Said) -> None:
    assert torch.equal(said[name]["beams"], said[name]["beams_anew"])


def test_what_it_refuses(runs: Path, tmp_path: Path) -> None:
    model, ids = built(find(runs / "plain")), some_ids()
    with pytest.raises(ValueError, match="attention_mask has zeros, and pads are not known here"):
        model(ids, attention_mask=(ids > 20).long())
    with pytest.raises(ValueError, match="num_passes=0 must be at least 1"):
        model(ids, num_passes=0)
    memory = model(ids).cache
    with pytest.raises(ValueError, match="31 ids with a memory of 31 tokens leave nothing to read"):
        model.generate(ids, cache=memory, max_new_tokens=1)
    no_memory = Checkpoint(sleeper("plain", tmp_path / "run").path)
    no_memory.documents["config"]["model"]["pattern"] = "attn attn"
    with pytest.raises(ValueError, match="num_passes=3 must be 1: no block that loops has fast weights"):
        built(no_memory)(ids)


def built(checkpoint: Checkpoint) -> Any:
    """The model of an export with weights of its own."""
    said = sleeping_config(checkpoint, None)
    return SleeptrainForCausalLM(SleeptrainConfig(model=said["model"], sleep=said["sleep"]))


@torch.no_grad()
def test_a_conversation_goes_on_from_its_memory(runs: Path) -> None:
    """generate takes all of it again and reads what is new; it may sleep before a window is full."""
    run, ids = runs / "ends_again", some_ids()
    model = built(find(run))
    model.load_state_dict(restore(run, "cpu").backend.model.state_dict())
    memory = model(ids[:, :10]).cache
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, cache=memory, **options), model.generate(ids, **options))
    memory = model(ids[:, :10]).cache
    model.sleep(memory)
    session = Session(run, num_sequences=2, device="cpu")
    session.read(ids[:, :10])
    session.sleep()
    found = model(ids[:, 10:], cache=memory).logits
    torch.testing.assert_close(found, session.feed(ids[:, 10:]), rtol=0, atol=1e-5)


def test_a_loss_is_that_of_the_next_ids(runs: Path) -> None:
    model, ids = built(find(runs / "plain")), some_ids()
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
