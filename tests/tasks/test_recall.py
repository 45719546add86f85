from dataclasses import replace

import numpy as np
import pytest

from sleeptrain.config import RecallConfig
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.recall import Recall

SPLITS = ("train", "validation", "test")
SMALL = RecallConfig(num_windows=6, pairs_per_window=3, num_keys=20, num_values=5, num_queries=5)
FAR = RecallConfig(num_windows=64, pairs_per_window=1, num_keys=64, num_values=16, num_queries=3)


def pairs_of(config, ids):
    """The pairs of an example, in order, read off its tokens."""
    context = ids[: config.context_tokens]
    return list(zip(context[::2], context[1::2]))


def asked_of(config, examples):
    """For each example its answers in the loss, [(query, target)], and how many windows back they lie."""
    for ids, targets, mask in zip(
        examples.ids.tolist(), examples.targets.tolist(), examples.loss_mask.tolist()
    ):
        window_of = {k: i // config.pairs_per_window for i, (k, _) in enumerate(pairs_of(config, ids))}
        answers = [(query, target) for query, target, in_loss in zip(ids, targets, mask) if in_loss]
        yield answers, [config.num_windows - window_of[query] for query, _ in answers]


@pytest.mark.parametrize("config", [SMALL, FAR])
@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_tokens(config, split) -> None:
    examples = Recall(config).examples(2, np.arange(25), split)
    for ids, (answers, _) in zip(examples.ids.tolist(), asked_of(config, examples)):
        pairs = pairs_of(config, ids)
        keys, values = zip(*pairs)
        assert len(set(keys)) == config.num_pairs == len(pairs)
        assert 0 <= min(keys) <= max(keys) < config.num_keys <= min(values)
        assert max(values) < config.num_keys + config.num_values
        assert [query for query, _ in answers] == ids[config.context_tokens :]
        assert len({query for query, _ in answers}) == config.num_queries
        assert all(dict(pairs)[query] == target for query, target in answers)


def test_layout_and_masks() -> None:
    examples = Recall(SMALL).examples(0, np.arange(50))
    assert examples.ids.shape == (50, 41)
    assert (examples.loss_mask == (np.arange(41) >= 36)).all()
    assert (examples.targets[:, :36] == 0).all()
    assert examples.valid.all()
    assert (examples.difficulty == 0).all()


def test_keys_values_and_distances_are_drawn_evenly() -> None:
    examples = Recall(SMALL).examples(0, np.arange(3000))
    for tokens, count in ((examples.ids[:, 0:36:2], 20), (examples.ids[:, 1:36:2] - 20, 5)):
        shares = np.bincount(tokens.ravel(), minlength=count) / tokens.size
        assert np.abs(shares * count - 1).max() < 0.05
    distances = [d for _, found in asked_of(SMALL, examples) for d in found]
    assert np.abs(np.bincount(distances)[1:] / len(distances) * 6 - 1).max() < 0.05


@pytest.mark.parametrize(("config", "num_asked"), [(SMALL, 3), (replace(SMALL, num_queries=2), 2), (FAR, 1)])
def test_a_distance_is_that_of_every_answer_that_counts(config, num_asked) -> None:
    task = Recall(config)
    default = task.examples(0, np.arange(60))
    for distance in task.difficulties:
        examples = task.examples(0, np.arange(60), difficulty=distance)
        for ids, (answers, distances) in zip(examples.ids.tolist(), asked_of(config, examples)):
            assert distances == [distance] * num_asked
            assert all(dict(pairs_of(config, ids))[query] == target for query, target in answers)
            assert len(set(ids[config.context_tokens :])) == config.num_queries
        assert np.array_equal(
            examples.ids[:, : config.context_tokens], default.ids[:, : config.context_tokens]
        )
        assert examples.valid.all()
        assert (examples.targets[~examples.loss_mask] == 0).all()
        assert (examples.difficulty == distance).all()


@pytest.mark.parametrize("distance", [0, 7])
def test_an_impossible_distance_is_refused(distance) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.difficulties holds {distance}.*distance.*1\.\.6"):
        Recall(SMALL).examples(0, np.arange(2), difficulty=distance)


def test_distances_evaluated_by_default() -> None:
    assert Recall(SMALL).difficulties == (1, 2, 4, 6)
    assert Recall(FAR).difficulties == (1, 2, 4, 8, 16, 32, 64)


def test_no_set_of_pairs_is_in_two_splits() -> None:
    config = RecallConfig(num_windows=1, pairs_per_window=2, num_keys=10, num_values=5, num_queries=1)
    task = Recall(config)  # 45 sets of keys, 1125 sets of pairs
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for ids in task.examples(0, np.arange(8000), split).ids.tolist():
            seen[split].add(frozenset(pairs_of(config, ids)))
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    assert len(set.union(*seen.values())) == 1125
    other_seed = task.examples(9, np.arange(500)).ids.tolist()
    assert {frozenset(pairs_of(config, ids)) for ids in other_seed} <= seen["train"]


def test_examples_are_pure_and_do_not_depend_on_the_batch() -> None:
    task, again = Recall(SMALL), Recall(SMALL)
    for split in SPLITS:
        batch = task.examples(4, np.arange(100, 130), split)
        for i in (100, 117, 129):
            for part, single in zip(batch, again.example(4, i, split)):
                assert np.array_equal(part[i - 100 : i - 99], single)
    assert not np.array_equal(task.example(0, 0).ids, task.example(1, 0).ids)
    assert task.fingerprint() == again.fingerprint() != Recall(FAR).fingerprint()


def test_score_counts_the_answers_in_the_loss() -> None:
    task = Recall(SMALL)
    examples = task.examples(0, np.arange(3), difficulty=2)
    predictions = examples.targets.copy()
    predictions[~examples.loss_mask] = -1  # elsewhere: does not count
    predictions[1, 36] += 1
    predictions[2, 36:39] += 1
    score = task.score(predictions, np.zeros(predictions.shape), examples)
    assert score["exact_accuracy"].tolist() == [1, 2 / 3, 0]
