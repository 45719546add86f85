import numpy as np
import pytest

from sleeptrain.config import Rule110Config
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.rule110 import Rule110, evolve

SPLITS = ("train", "validation", "test")


def slow_steps(bits: list[int], rule_number: int, steps: int) -> list[int]:
    table = [int(c) for c in reversed(f"{rule_number:08b}")]
    for _ in range(steps):
        n = len(bits)
        bits = [table[int(f"{bits[j - 1]}{bits[j]}{bits[(j + 1) % n]}", 2)] for j in range(n)]
    return bits


def strings_of(task: Rule110, examples) -> np.ndarray:
    context = examples.ids[:, : -task.config.num_strings]
    return context.reshape(len(context), task.config.num_strings, task.config.width)


@pytest.mark.parametrize("rule_number", [0, 30, 110, 124, 255])
@pytest.mark.parametrize("width", [3, 24, 64])
def test_answers_equal_a_slow_loop(rule_number, width) -> None:
    config = Rule110Config(width=width, num_strings=3, steps=7, rule_number=rule_number)
    task = Rule110(config)
    examples = task.examples(1, np.arange(20))
    for row, answers in zip(strings_of(task, examples), examples.targets[:, -3:]):
        assert [slow_steps(s.tolist(), rule_number, 7)[0] for s in row] == answers.tolist()


def test_the_ring_is_periodic() -> None:
    packed = np.array([0b10000000], dtype=np.uint64)  # the last cell alone is 1
    # rule 16 copies the left neighbour of 0 0: the 1 moves right, round the corner
    assert evolve(packed, 8, 16, 1).tolist() == [1]
    assert evolve(packed, 8, 16, 8).tolist() == packed.tolist()


def test_layout_labels_and_masks() -> None:
    task = Rule110(Rule110Config(width=8, num_strings=3, steps=2))
    examples = task.examples(0, np.arange(50))
    assert examples.ids.shape == (50, 27)
    assert task.vocab_size == 5
    assert set(np.unique(examples.ids[:, :24])) == {0, 1}
    assert (examples.ids[:, 24:] == [2, 3, 4]).all()
    assert examples.valid.all()
    assert (examples.loss_mask == (np.arange(27) >= 24)).all()
    assert (examples.targets[:, :24] == 0).all()
    assert set(np.unique(examples.targets[:, 24:])) == {0, 1}
    assert (examples.difficulty == 2).all()


def test_no_string_is_in_two_splits_and_all_are_used() -> None:
    task = Rule110(Rule110Config(width=8, num_strings=2))
    seen = {}
    for split in SPLITS:
        examples = task.examples(0, np.arange(3000), split)
        seen[split] = set((strings_of(task, examples) @ (1 << np.arange(8))).ravel().tolist())
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    assert len(set.union(*seen.values())) == 256
    other_seed = strings_of(task, task.examples(9, np.arange(500))) @ (1 << np.arange(8))
    assert set(other_seed.ravel().tolist()) <= seen["train"]


def test_examples_are_pure_and_do_not_depend_on_the_batch() -> None:
    task, again = Rule110(Rule110Config()), Rule110(Rule110Config())
    for split in SPLITS:
        batch = task.examples(4, np.arange(100, 130), split)
        for i in (100, 117, 129):
            for part, single in zip(batch, again.example(4, i, split)):
                assert np.array_equal(part[i - 100 : i - 99], single)
    assert not np.array_equal(task.example(0, 0).ids, task.example(1, 0).ids)
    assert task.fingerprint() == again.fingerprint()
    assert task.fingerprint() != Rule110(Rule110Config(width=13)).fingerprint()


def test_difficulty_changes_the_steps_and_nothing_else() -> None:
    task = Rule110(Rule110Config(width=8, num_strings=2, steps=4))
    zero, default = task.examples(0, np.arange(40), difficulty=0), task.examples(0, np.arange(40))
    assert np.array_equal(zero.ids, default.ids)
    assert np.array_equal(zero.targets[:, -2:], strings_of(task, zero)[:, :, 0])
    assert (zero.difficulty == 0).all()
    with pytest.raises(ConfigError, match=r"eval\.difficulties holds -1.*steps"):
        task.examples(0, np.arange(2), difficulty=-1)


def test_all_ones_reach_the_published_floor_at_32_steps() -> None:
    task = Rule110(Rule110Config(width=24, num_strings=4, steps=32))
    examples = task.examples(0, np.arange(4000))
    score = task.score(np.ones_like(examples.ids), np.zeros(examples.ids.shape), examples)
    assert abs(score["exact_accuracy"].mean() - 0.10) < 0.02


def test_score_counts_answers_of_each_example() -> None:
    task = Rule110(Rule110Config(width=8, num_strings=2))
    examples = task.examples(0, np.arange(3))
    predictions = examples.targets.copy()
    predictions[:, 0] = 1  # outside the answers: does not count
    predictions[1, -1] ^= 1
    predictions[2, -2:] ^= 1
    score = task.score(predictions, np.zeros(predictions.shape), examples)
    assert score["exact_accuracy"].tolist() == [1, 0, 0]
    assert score["answer_accuracy"].tolist() == [1, 0.5, 0]


def test_a_width_without_a_string_for_a_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.width=4 leaves no string for the test split; use 8"):
        Rule110(Rule110Config(width=4))
