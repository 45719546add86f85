"""Models that transformers itself built: our logits are its own, and what we write it loads."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra bench brings it; make test-more installs that")

import torch
import transformers
from importing import fed, import_to, imported
from tiny_models import KINDS, build, random_ids

from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
from sleeptrain.engine.restored import find, restore

pytestmark = pytest.mark.more


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = build(kind)
    theirs.save_pretrained(tmp_path / "model")
    ours = imported(tmp_path / "model", tmp_path / "run")
    for num_tokens in (1, 9, 70):
        ids = random_ids(num_tokens)
        with torch.no_grad():
            expected = theirs(ids).logits
        assert expected.std() > 0.2
        torch.testing.assert_close(fed(ours, ids), expected, rtol=0, atol=1e-4)
    for piece_tokens in (1, 32):
        torch.testing.assert_close(fed(ours, ids, piece_tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs, prompt = build(kind), random_ids(9)
    theirs.save_pretrained(tmp_path / "model")
    ours = imported(tmp_path / "model", tmp_path / "run")
    written = theirs.generate(
        prompt, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=-1, pad_token_id=0
    )
    following = fed(ours, written[:, :-1], 1)[:, len(prompt[0]) - 1 :].argmax(-1)
    assert torch.equal(following, written[:, len(prompt[0]) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_written_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = build(kind, dtype)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    import_to(tmp_path / "model", tmp_path / "run")
    export_checkpoint(find(tmp_path / "run"), tmp_path / "out", lambda name: None, shard_bytes=30_000)
    before, after = Folder(tmp_path / "model"), Folder(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
    load = transformers.AutoModelForCausalLM.from_pretrained
    again, told = load(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype
    ids = random_ids(9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, load(tmp_path / "model", dtype=dtype)(ids).logits)


def test_a_model_with_eyes_comes_in_as_one_of_text(tmp_path: Path) -> None:
    """Qwen3.5 is published so: the text model under a prefix of its own, and heads that are not used here."""
    theirs = build("qwen3_5")
    theirs.save_pretrained(tmp_path / "model")
    rename_as_published(tmp_path / "model")
    ours = imported(tmp_path / "model", tmp_path / "run")
    ids = random_ids(9)
    with torch.no_grad():
        torch.testing.assert_close(fed(ours, ids), theirs(ids).logits, rtol=0, atol=1e-4)
    left_out = restore(tmp_path / "run", "cpu").checkpoint.documents["origin"]["left_out"]
    assert left_out == ["model.visual.patch.weight", "mtp.fc.weight"]


def rename_as_published(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {
        name.replace("model.", "model.language_model.", 1): t.clone() for name, t in load_file(path).items()
    }
    tensors |= {"mtp.fc.weight": torch.zeros(2, 2), "model.visual.patch.weight": torch.zeros(3)}
    save_file(tensors, path, {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(whole))
