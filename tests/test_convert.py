"""The command line: a folder in, read from, and out again."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from layouts import TINY_JET, shapes_of, write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sleeptrain import Session, convert, evaluate, generate
from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.config import ModelConfig
from sleeptrain.engine.restored import find
from sleeptrain.schema import from_dict


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Jet-Nemotron with a tokenizer of bytes, whose last id ends a document, and a licence."""
    write_tiny(tmp_path / "model", TINY_JET | {"vocab_size": 257}, torch.bfloat16)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    (tmp_path / "model" / "LICENSE.txt").write_text("Apache License")
    return tmp_path / "model"


def test_in_read_evaluated_and_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = [f"source={source}", f"output={run}", "sleep.window_tokens=600", "sleep.num_passes=2"]
    assert convert.main(["import", *arguments, "model.coda_blocks=1"]) == 0
    count = sum(math.prod(shape) for shape in shapes_of(Folder(source).config).values())
    assert f"jet_nemotron, {count:,} weights, licence: apache-2.0" in capsys.readouterr().out
    found = find(run)
    assert found.documents["origin"]["licence"] == "apache-2.0"
    assert found.documents["config"]["sleep"]["window_tokens"] == 600
    assert found.documents["config"]["task"]["sequence_tokens"] == 600
    assert found.documents["config"]["task"]["end_token"] == "<end>"
    model = from_dict(ModelConfig, yaml.safe_load((run / "model.yaml").read_text()))
    assert (model.vocab_multiple, model.coda_blocks) == (257, 1)

    slept = []
    session = Session(run, device="cpu", on_sleep=slept.append)
    assert session.feed("a text as long as two windows" * 40).shape == (1, 1160, 257)
    assert [(sleep.num_tokens, sleep.num_passes) for sleep in slept] == [(600, 2)]
    capsys.readouterr()
    assert generate.main([f"checkpoint={run}", "prompt=some", "max_tokens=3", "device=cpu"]) == 0
    given = [
        f"checkpoint={run}",
        "num_examples=2",
        "num_passes=[1,2]",
        "device=cpu",
        "batch_sequences=2",
    ]
    assert evaluate.main(given) == 0

    assert convert.main(["export", f"checkpoint={run}", f"output={out}", "shard_gib=0.00002"]) == 0
    before, after = Folder(source), Folder(out)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "LICENSE.txt").read_text() == "Apache License"
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: apache-2.0\nbase_model: "model"\n')
    assert "The weights of model, as they were imported." in card


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}=" in said for name in ("source", "output", "checkpoint", "shard_gib", "files_from"))
