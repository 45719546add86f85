from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from solver import Solver, parse, solve
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sleeptrain.config import GSMInfiniteConfig
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.gsm_infinite import GSMInfinite

SPLITS = ("train", "validation", "test")
SETTINGS = list(
    product(("symbolic", "medium", "hard"), ("forward", "reverse"), ("first", "last"), ("shared", "own"))
)
LONGEST_SENTENCE = 400  # bytes


def config_of(kind="medium", mode="forward", question="first", window="shared", **more):
    values = {"sequence_tokens": 1800, "answer_tokens": 160} | more
    return GSMInfiniteConfig(kind=kind, mode=mode, question=question, answer_window=window, **values)


def read(task, examples):
    """Of each row: prompt, and what is to be written."""
    for ids, targets, loss_mask, valid, _ in zip(*examples):
        answer = targets[loss_mask]
        assert answer[-1] == task.vocab_size - 1
        written = len(answer) - 1
        assert np.array_equal(ids[len(ids) - written :], answer[:-1])
        yield task.text(ids[: len(ids) - written][valid[: len(ids) - written]]), task.text(answer[:-1])


def check(settings, num_problems, longest=LONGEST_SENTENCE):
    """Solves problems of every difficulty and split; returns how many."""
    config = config_of(*settings)
    task, count = GSMInfinite(config), 0
    for ops in range(1, 11):
        for split in SPLITS:
            examples = task.examples(ops, np.arange(num_problems), split, ops)
            assert set(examples.difficulty) == {ops}
            for (prompt, answer), valid in zip(read(task, examples), examples.valid):
                solved = solve(prompt)
                assert (solved.answer, solved.ops) == (int(answer), ops), prompt
                assert 1 <= solved.answer <= 1000
                only = [s for s in solved.sentences if s in solved.needed]
                bare = Solver(only, parse(prompt)[1]).solve()
                assert (bare.answer, bare.ops) == (int(answer), ops)
                used = valid.sum()
                room = (
                    config.answer_tokens - valid[config.context_tokens :].sum() if settings[3] == "own" else 0
                )
                assert config.sequence_tokens - longest < used + room <= config.sequence_tokens
                count += 1
    return count


@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
def test_the_solver_finds_the_stated_answer_with_the_stated_operations(settings) -> None:
    check(settings, 1)


@pytest.mark.more
def test_ten_thousand_problems_are_solved() -> None:
    assert sum(check(settings, 14) for settings in SETTINGS) > 10_000


@pytest.mark.parametrize("kind", ["symbolic", "medium", "hard"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_distractors_hang_on_what_is_there_and_nothing_needed_hangs_on_them(kind, mode) -> None:
    stretched = GSMInfinite(config_of(kind, mode))
    bare = GSMInfinite(replace(stretched.config, target_tokens=0))
    examples = [task.examples(0, np.arange(30)) for task in (stretched, bare)]
    for (long, answer), (short, same) in zip(*(read(t, e) for t, e in zip((stretched, bare), examples))):
        assert answer == same
        sentences, needed = (parse(text)[0] for text in (long, short))
        assert set(needed) == solve(long).needed
        assert [s for s in sentences if s in set(needed)] == needed  # in one order
        assert len(sentences) > len(needed)
        distractors = [s for s in sentences if s not in set(needed)]
        assert not [s for s in distractors if s.split()[-2] in ("is", "=")]  # no constants
        if mode == "forward":
            everything = Solver(sentences, parse(long)[1])
            assert {1 <= everything.form(name).constant <= 1000 for name in everything.relations} == {True}


def test_neither_the_order_of_the_facts_nor_where_they_stand_tells_what_is_needed() -> None:
    task = GSMInfinite(config_of("symbolic", target_tokens=0))
    places = []
    for prompt, _ in read(task, task.examples(0, np.arange(300), difficulty=5)):
        sentences, asked = parse(prompt)
        places.append([s.startswith(f"{asked} =") for s in sentences].index(True) / (len(sentences) - 1))
    assert abs(np.mean(places) - 0.5) < 0.05
    stretched = GSMInfinite(config_of("symbolic", sequence_tokens=900))
    places = []
    for prompt, _ in read(stretched, stretched.examples(0, np.arange(150))):
        solved = solve(prompt)
        places += [
            i / (len(solved.sentences) - 1) for i, s in enumerate(solved.sentences) if s in solved.needed
        ]
    assert abs(np.mean(places) - 0.5) < 0.04


@pytest.mark.more
def test_the_commonest_answer_is_as_common_as_in_the_original() -> None:
    """The figures are method.md's, for forward problems with constants of a range of 5."""
    task = GSMInfinite(config_of(sequence_tokens=3000, target_tokens=0))
    for ops, level in ((2, 0.33), (4, 0.24), (6, 0.15), (8, 0.09)):
        answers = Counter(answer for _, answer in read(task, task.examples(0, np.arange(3000), "train", ops)))
        assert abs(answers.most_common(1)[0][1] / 3000 - level) < 0.03


@pytest.mark.parametrize("kind", ["symbolic", "medium", "hard"])
def test_no_problem_is_in_two_splits_whatever_its_distractors(kind) -> None:
    task = GSMInfinite(config_of(kind, max_ops=2, target_tokens=0))
    seen = [
        {
            (*sorted(parse(prompt)[0]), parse(prompt)[1])
            for prompt, _ in read(task, task.examples(s, np.arange(120), p))
        }
        for p in SPLITS
        for s in (0, 1)
    ]
    train, validation, test = (seen[i] | seen[i + 1] for i in (0, 2, 4))
    assert not train & validation
    assert not (train | validation) & test
    assert min(map(len, (train, validation, test))) > 150


def test_training_draws_operations_evenly_from_its_range() -> None:
    task = GSMInfinite(config_of("symbolic", min_ops=3, max_ops=5))
    ops = np.bincount(task.examples(0, np.arange(400)).difficulty)
    assert ops[:3].sum() == 0
    assert np.allclose(ops[3:] / 400, 1 / 3, atol=0.08)
    assert task.difficulties == (4,)
    assert GSMInfinite(config_of()).difficulties == (1, 2, 4, 6, 8)


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_examples_are_pure_and_do_not_depend_on_the_batch(tokenizer) -> None:
    config = config_of("hard", tokenizer=tokenizer, sequence_tokens=1200)
    task, again = GSMInfinite(config), GSMInfinite(config)
    for split in SPLITS:
        batch = task.examples(7, np.arange(20), split)
        for i in (0, 19):
            for part, single in zip(batch, again.example(7, i, split)):
                assert np.array_equal(part[i : i + 1], single)
    assert not np.array_equal(task.example(0, 0).ids, task.example(1, 0).ids)
    assert task.fingerprint() == again.fingerprint() != GSMInfinite(replace(config, max_ops=7)).fingerprint()


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Needs three more tokens for two sentences together than for each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(". The", ". . . The")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    in_bytes = GSMInfinite(config_of())
    texts = [prompt for prompt, _ in read(in_bytes, in_bytes.examples(0, np.arange(20)))]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("window", ["shared", "own"])
def test_a_tokenizer_from_a_folder_stays_within_the_target(tokenizer_folder, window) -> None:
    config = config_of("medium", "forward", "first", window, sequence_tokens=500, max_ops=4)
    task = GSMInfinite(replace(config, tokenizer=str(tokenizer_folder), target_tokens=460))
    assert task.fingerprint()["tokenizer"] not in ("bytes", str(tokenizer_folder))
    examples = task.examples(0, np.arange(40))
    for (prompt, answer), valid in zip(read(task, examples), examples.valid):
        assert solve(prompt.replace(". . .", ".")).answer == int(answer)
        answer_window = config.answer_tokens if window == "own" else valid[config.context_tokens :].sum()
        assert 360 < valid[: config.context_tokens].sum() + answer_window <= 460


def test_a_token_of_the_tokenizer_may_end_an_answer(tokenizer_folder) -> None:
    config = config_of(tokenizer=str(tokenizer_folder), sequence_tokens=500, max_ops=4)
    plain, task = GSMInfinite(config), GSMInfinite(replace(config, end_token="<end>"))
    assert (plain.vocab_size, task.vocab_size) == (401, 400)
    for before, after in zip(plain.examples(0, np.arange(20)), task.examples(0, np.arange(20))):
        assert np.array_equal(np.where(before == 400, 0, before), after)  # <end> is the first token
    assert plain.fingerprint() != task.fingerprint()
    for tokenizer in ("bytes", "words"):
        with pytest.raises(ConfigError, match=rf"task.end_token='<end>' is none of the {tokenizer}; leave"):
            replace(config, tokenizer=tokenizer, end_token="<end>")


@pytest.mark.parametrize("question", ["first", "last"])
def test_the_answer_has_its_own_window(question) -> None:
    task = GSMInfinite(config_of("medium", "forward", question, "own"))
    begin = task.config.context_tokens
    for ids, _, loss_mask, valid, _ in zip(*task.examples(0, np.arange(10))):
        context, last = (
            task.text(part[keep])
            for part, keep in ((ids[:begin], valid[:begin]), (ids[begin:], valid[begin:]))
        )
        assert not loss_mask[:begin].any()
        assert context.endswith(".")
        assert ("Question" in last) == (question == "last") != ("Question" in context)
        assert valid[begin - 1]
        assert last.strip().startswith("Question" if question == "last" else "Answer:")


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["symbolic", "medium", "hard"])
def test_every_step_of_the_worked_solution_is_right(kind, mode) -> None:
    task = GSMInfinite(
        config_of(kind, mode, answer_tokens=1800, sequence_tokens=3200, worked_solution=True, target_tokens=0)
    )
    for prompt, written in read(task, task.examples(0, np.arange(60))):
        solved = solve(prompt)
        steps, answer = written.split(". Answer: ")
        known, num_ops = {}, 0
        for step in steps.strip().split("; "):
            name, *sides = step.split(" = ")
            values = {eval(side) for side in sides}
            assert len(values) == 1
            known[name] = values.pop()
            num_ops += max(1, sum(sides[0].count(sign) for sign in "+-*/"))
        assert int(answer) == solved.answer == known[parse(prompt)[1]]
        assert num_ops == solved.ops


def test_score_wants_the_whole_answer() -> None:
    task = GSMInfinite(config_of("symbolic"))
    examples = task.examples(0, np.arange(3))
    predictions = np.where(examples.loss_mask, examples.targets, 99)
    predictions[1, -2] = 0  # the last digit
    predictions[2, -1] = 0  # the end marker
    assert task.score(predictions, np.zeros(predictions.shape), examples)["exact_accuracy"].tolist() == [
        1,
        0,
        0,
    ]


def test_settings_without_room_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.sequence_tokens=300 .* 8 operations"):
        GSMInfinite(config_of(sequence_tokens=300))
    with pytest.raises(ConfigError, match=r"task\.num_variables=20 "):
        GSMInfinite(config_of("symbolic", num_variables=20, min_ops=3))
    with pytest.raises(ConfigError, match=r"eval\.difficulties holds 25.*ops.*1\.\.24"):
        GSMInfinite(config_of()).example(0, 0, difficulty=25)
