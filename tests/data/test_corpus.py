"""A text in shards is scored as the text in its folder, which is no longer needed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_sets import write_set

from sleeptrain.config import TextConfig
from sleeptrain.data.corpus import ShardedText, open_task
from sleeptrain.evaluate import main as evaluate
from sleeptrain.pretrain import main as pretrain
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.text import Text


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_bytes(bytes(40 + (i * j) % 80 for j in range(90 + i)))
    return folder


@pytest.fixture
def corpus(tmp_path: Path, texts: Path) -> Path:
    task = Text(TextConfig(folder=str(texts), sequence_tokens=16))
    for split in ("train", "validation", "test"):
        samples = [({"name": d.name}, task.read(d)) for d in task.documents(split)]
        shards = [samples[:2], samples[2:]]
        write_set(tmp_path / "corpus" / split, shards, task, "documents", split)
    return tmp_path / "corpus"


def test_the_held_out_text_is_the_same(texts: Path, corpus: Path) -> None:
    in_folder = open_task(TextConfig(folder=str(texts), sequence_tokens=16))
    in_shards = open_task(TextConfig(folder=str(corpus), sequence_tokens=16))
    assert isinstance(in_shards, ShardedText)
    for split in ("validation", "test"):
        assert in_shards.num_examples(split) == in_folder.num_examples(split)
        for a, b in zip(
            in_shards.examples(0, np.arange(7), split), in_folder.examples(0, np.arange(7), split)
        ):
            assert np.array_equal(a, b)
    assert in_shards.fingerprint() != in_folder.fingerprint()


def test_a_run_needs_the_shards_alone(texts: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(texts)
    small = ["experiment=text_small", f"run.dir={tmp_path}/run", f"task.folder={corpus}", "run.device=cpu"]
    small += ["model.d_model=16", "model.num_heads=2", "model.memory_heads=2", "model.memory_key_dim=8"]
    small += ["model.memory_value_dim=8", "task.sequence_tokens=16", "sleep.window_tokens=4"]
    small += ["optim.num_steps=3", "eval.num_examples=4", "eval.every_steps=0", "log.every_steps=1"]
    assert pretrain(small) == 2
    assert f"set data.shards=[{corpus}/train]" in capsys.readouterr().err
    assert pretrain([*small, f"data.shards=[{corpus}/train]"]) == 0
    assert evaluate([f"checkpoint={tmp_path}/run", "num_examples=4"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert pretrain([*small, f"data.shards=[{corpus}/train]", "dry_run=true"]) == 0
    assert "documents, packed from window borders on" in capsys.readouterr().out


def test_a_corpus_that_does_not_fit_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too few for task.sequence_tokens=100000"):
        open_task(TextConfig(folder=str(corpus), sequence_tokens=100000))
    shutil.rmtree(corpus / "test")
    shutil.copytree(corpus / "train", corpus / "test")
    with pytest.raises(ConfigError, match=r"the set test is of \('documents', 'train', 257, 'bytes'\)"):
        open_task(TextConfig(folder=str(corpus), sequence_tokens=16))
    with pytest.raises(ConfigError, match=r"index.json cannot be read"):
        open_task(TextConfig(folder="memory://nothing", sequence_tokens=16))
