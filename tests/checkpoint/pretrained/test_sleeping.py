"""A model that sleeps goes out as a folder of its own kind, and comes back bit for bit; its card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from importing import import_to
from layouts import TINY_JET, TINY_OURO, write_tiny
from sleepers import CASES, VOCAB, WINDOW_TOKENS, sleeper

from sleeptrain import Session, convert
from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
from sleeptrain.checkpoint.huggingface.sleeping import MODELLING_FILE
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.engine.restored import find
from sleeptrain.schema import ConfigError


def export(checkpoint: Checkpoint, output: Path, **options: Any) -> dict[str, Any]:
    """The config.json of the folder."""
    assert export_checkpoint(checkpoint, output, lambda name: None, **options)
    return json.loads((output / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_and_goes_out_again_the_same(name: str, tmp_path: Path) -> None:
    before = sleeper(name, tmp_path / "run")
    said = export(before, tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    config = import_to(tmp_path / "out", tmp_path / "again")
    after = find(tmp_path / "again")
    assert sorted(after.names("model")) == sorted(before.names("model"))
    for weight in before.names("model"):
        assert torch.equal(before.read("model", weight), after.read("model", weight))
    assert config.sleep.window_tokens == CASES[name][1].get("window_tokens", WINDOW_TOKENS)
    ids = torch.arange(20)[None] * 7 % VOCAB
    of_both = [Session(tmp_path / run, device="cpu").feed(ids) for run in ("run", "again")]
    assert torch.equal(*of_both)
    assert export(after, tmp_path / "twice") == said


def test_types_are_kept(tmp_path: Path) -> None:
    said = export(sleeper("plain", tmp_path / "run", torch.bfloat16), tmp_path / "out")
    assert said["dtype"] == "bfloat16"
    assert {found.dtype for found in Folder(tmp_path / "out").tensors.values()} == {"bfloat16"}


def test_the_command_writes_a_folder_that_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    sleeper("sandwich", run)
    rows = [{"step": 12, "eval/accuracy": 0.25}, {"step": 99, "eval/accuracy": 0.75}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "LICENSE").write_text("Mine")
    assert convert.main(["export", f"checkpoint={run}", f"output={out}"]) == 0
    assert f"wrote {out}: it sleeps, by its own modelling file" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", MODELLING_FILE.name, "README.md", "LICENSE"}
    assert (out / MODELLING_FILE.name).read_bytes() == MODELLING_FILE.read_bytes()
    assert "import sleeptrain" not in MODELLING_FILE.read_text()
    said = json.loads((out / "config.json").read_text())
    assert said["auto_map"]["AutoModelForCausalLM"] == "modeling_sleeptrain.SleeptrainForCausalLM"
    assert (said["vocab_size"], said["eos_token_id"], said["tie_word_embeddings"]) == (VOCAB, 256, False)
    assert said["sleep"]["num_passes"] == 3
    assert said["sleep"]["convolution"] == "reset"
    assert (said["model"]["num_kv_heads"], said["model"]["mlp_dim"]) == (4, 64)
    card = (out / "README.md").read_text()
    assert "base_model" not in card
    assert "license:" not in card
    assert "Trained from scratch by sleeptrain for 12 steps on the task text: it stems from no other" in card
    assert "Licence: none was chosen for these weights" in card
    assert "It sleeps: over each 7 tokens it makes 3 passes, reading included; then it clears its KV" in card
    assert "| blocks | gdn attn jet attn gdn |" in card
    weights = sum(torch.Size(found.shape).numel() for found in Folder(out).tensors.values())
    assert f"| weights | {weights:,} |" in card
    assert "Ids are the bytes of a text in UTF-8; 256 ends it." in card
    assert "| eval/accuracy | 0.25 |" in card


def test_an_imported_model_sleeps_on_request(tmp_path: Path) -> None:
    """With its origin and licence; what only its own architecture knows is left out, and the card says so."""
    write_tiny(tmp_path / "model", TINY_OURO | {"eos_token_id": 5}, torch.bfloat16)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    import_to(tmp_path / "model", tmp_path / "run", sleep={"eviction": "sliding", "window_tokens": 6})
    said = export(find(tmp_path / "run"), tmp_path / "out", sleeping=True)
    assert said["eos_token_id"] == 5
    assert said["sleep"]["norm_between_passes"]
    assert said["sleep"]["convolution"] == "carried"
    assert not any("early_exit_gate" in name for name in Folder(tmp_path / "out").tensors)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlicense: mit\nbase_model: "model"\nlibrary_name: transformers\n')
    assert "Left out: 2 tensors, of which model.early_exit_gate" in card
    assert "keeps the keys and values of the newest 5 tokens" in card


def test_settings_may_change_on_the_way_in(tmp_path: Path) -> None:
    export(sleeper("plain", tmp_path / "run"), tmp_path / "out")
    config = import_to(tmp_path / "out", tmp_path / "again", sleep={"num_passes": 1, "window_tokens": 5})
    assert (config.sleep.num_passes, config.sleep.window_tokens) == (1, 5)
    assert config.sleep.schedule == "consolidate_or_predict"


def test_learned_halting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sleep.halting=learned is not known to the modelling file of an"):
        export(sleeper("plain", tmp_path / "run", halting="learned"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_its_settings_is_refused(tmp_path: Path) -> None:
    said = export(sleeper("mixed", tmp_path / "run"), tmp_path / "out")
    for changes, reason in (
        ({"model": said["model"] | {"pattern": "gdn attn jet attn"}}, r"unexpected \(stack.blocks.4.mixer"),
        ({"model": said["model"] | {"width": 3}}, "unknown setting 'model.width'"),
        ({"model": None}, "config.json lacks model; give a folder with a complete one"),
        ({"sleep": said["sleep"] | {"num_passes": "many"}}, "sleep.num_passes='many'"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(said | changes))
        with pytest.raises(ConfigError, match=reason):
            import_to(tmp_path / "out", tmp_path / "again")


def test_a_jet_nemotron_is_still_written_as_it_came(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", TINY_JET)
    import_to(tmp_path / "model", tmp_path / "run", sleep={"num_passes": 2, "window_tokens": 6})
    assert not export_checkpoint(find(tmp_path / "run"), tmp_path / "out", lambda name: None)
    assert not (tmp_path / "out" / MODELLING_FILE.name).exists()
