"""Whole runs over packed documents whose rows go on from batch to batch: taken up from a checkpoint in the
middle, by one process bit for bit, by others with the losses of one."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from e2e_runs import compare_runs
from ranks import run_ranks
from shard_sets import documents_set

from sleeptrain.checkpoint.manifest import step_name
from sleeptrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SleepConfig,
    TextConfig,
)
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.engine.trainer import train
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

ROWS, WINDOW, TOKENS, NUM_STEPS, MIDDLE = 4, 8, 24, 6, 3
TOPOLOGIES = {
    "single": (1, ParallelConfig(), ROWS),
    "single, one row at a time": (1, ParallelConfig(), 1),
    "dp2": (2, ParallelConfig(data_size=2, zero_stage=2), 1),
    "tp2 pp2": (4, ParallelConfig(tensor_size=2, pipeline_size=2), 2),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 8 rows of tokens each, which words make a little predictable."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = np.random.default_rng(0)
    words = [b"one ", b"two ", b"three ", b"four "]
    texts = [b"".join(words[i] for i in chance.integers(4, size=n)) for n in chance.integers(5, 40, size=40)]
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i}.txt").write_bytes(text)
    task = make_task(TextConfig(folder=str(folder / "texts"), sequence_tokens=TOKENS))
    documents_set(folder / "set", task, texts, 8)
    return folder


def config_of(folder: Path, corpus: Path, topology: str = "single") -> Config:
    _, parallel, micro = TOPOLOGIES[topology]
    return Config(
        run=RunConfig(id="carry", dir=str(folder), device="cpu", num_threads=1),
        model=ModelConfig(
            d_model=16,
            pattern="attn gdn swa:11 jet",
            vocab_multiple=2,
            memory_key_dim=4,
            memory_value_dim=4,
            init_std=0.1,
            embedding_init_std=1.0,
        ),
        sleep=SleepConfig(
            window_tokens=WINDOW,
            num_passes=2,
            schedule="predict_then_consolidate",
            eviction="sliding",
            carry_between_batches=True,
        ),
        task=TextConfig(folder=str(corpus / "texts"), sequence_tokens=TOKENS),
        data=DataConfig(batch_sequences=ROWS, micro_batch_sequences=micro, shards=(str(corpus / "set"),)),
        optim=OptimConfig(num_steps=NUM_STEPS, warmup_steps=50),
        eval=EvalConfig(every_steps=0, num_examples=4),
        checkpoint=CheckpointConfig(every_steps=MIDDLE),
        log=LogConfig(every_steps=1),
        parallel=parallel,
    )


def run(config: Config, num_ranks: int) -> None:
    assert run_ranks(num_ranks, _train, config) == [0] * num_ranks


def _train(config: Config) -> int:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    return train(config, "carry: true\n")


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    folder = corpus / "whole"
    run(config_of(folder, corpus), 1)
    return folder


def back_to_the_middle(whole: Path, folder: Path) -> Path:
    """The run as if it had been killed before its last checkpoint."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / step_name(NUM_STEPS))
    return folder


@pytest.mark.parametrize(
    "topology", [pytest.param(t, marks=pytest.mark.more if t != "single" else ()) for t in TOPOLOGIES]
)
def test_a_run_goes_on_in_the_middle_of_documents(
    topology: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """R1, R15."""
    folder = back_to_the_middle(whole, tmp_path / "run")
    run(config_of(folder, corpus, topology), TOPOLOGIES[topology][0])
    assert losses(folder) == pytest.approx(losses(whole), rel=0, abs=1e-5)
    if topology == "single":
        assert compare_runs(folder, whole) == ""


@pytest.mark.more
def test_it_notices_a_run_that_starts_its_rows_anew(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = back_to_the_middle(whole, tmp_path / "run")
    monkeypatch.setattr("sleeptrain.parallel.carried.Carried.load", lambda self, checkpoint: None)
    run(config_of(folder, corpus), 1)
    assert losses(folder)[:MIDDLE] == losses(whole)[:MIDDLE]
    assert abs(losses(folder)[MIDDLE] - losses(whole)[MIDDLE]) > 1e-4


def test_a_run_that_no_longer_carries_is_refused(corpus: Path, whole: Path) -> None:
    """R16."""
    config = config_of(whole, corpus)
    fresh = replace(config, sleep=replace(config.sleep, carry_between_batches=False))
    with pytest.raises(ConfigError, match=r"sleep\.carry_between_batches: saved true, now false"):
        train(fresh, "carry: false\n")
