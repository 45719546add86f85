"""What all tasks have in common."""

import doctest

import numpy as np
import pytest

from sleeptrain.config import DepoConfig, GSMInfiniteConfig, RecallConfig, Rule110Config, TextConfig
from sleeptrain.tasks import (
    Depo,
    GSMInfinite,
    Recall,
    Rule110,
    Text,
    depo,
    gsm_infinite,
    make_task,
    recall,
    rule110,
    text,
)


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (Rule110Config(), Rule110),
        (DepoConfig(), Depo),
        (RecallConfig(), Recall),
        (TextConfig(), Text),
        (GSMInfiniteConfig(), GSMInfinite),
    ],
)
def test_make_task_keeps_the_contract(config, cls) -> None:
    task = make_task(config)
    assert type(task) is cls
    assert task.difficulties
    for split in ("train", "validation", "test"):
        assert task.num_examples(split) is None or (cls is Text and split != "train")
        examples = task.examples(0, np.arange(3), split)
        ids, targets, loss_mask, valid, _ = examples
        shape = (3, task.sequence_tokens)
        assert task.sequence_tokens == config.sequence_tokens
        assert [a.shape for a in examples] == [shape] * 4 + [(3,)]
        assert [a.dtype for a in examples] == [np.int64, np.int64, bool, bool, np.int64]
        assert 0 <= ids.min() <= max(ids.max(), targets.max()) < task.vocab_size
        assert loss_mask.any(axis=1).all()
        assert not (loss_mask & ~valid).any()
        score = task.score(targets, np.zeros(shape), examples)
        assert {(v.shape, v.dtype) for v in score.values()} == {((3,), np.dtype(np.float64))}
        assert score.get("exact_accuracy", np.ones(3)).all()
    train, test = task.examples(0, np.arange(3)), task.examples(0, np.arange(3), "test")
    assert not np.array_equal(train.ids, test.ids)
    assert all(isinstance(v, str | int) for v in task.fingerprint().values())


@pytest.mark.parametrize("module", [rule110, depo, recall, text, gsm_infinite.task])
def test_the_worked_example_of_the_docstring_holds(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
