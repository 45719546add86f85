"""Rows from shards: every sample of an epoch once, resumable at each row; documents packed without a loss."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import documents_set, examples_set, write_set

from sleeptrain.config import (
    Config,
    DataConfig,
    ModelConfig,
    Rule110Config,
    RunConfig,
    SleepConfig,
    TextConfig,
)
from sleeptrain.data.batch import make_batch
from sleeptrain.data.index import ShardError
from sleeptrain.data.mixture import Mixture, open_mixture
from sleeptrain.data.rows import Rows, StreamedRows, join, spread
from sleeptrain.model.sleep import SleepModel
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import Task, make_task

RULE110 = Rule110Config(width=6, num_strings=2, steps=1)


@pytest.fixture
def task() -> Task:
    return make_task(RULE110)


def mixture_of(
    task: Task, *folders: Path, num_streams: int = 2, window_tokens: int = 6, **settings
) -> Mixture:
    data = DataConfig(
        shards=tuple(map(str, folders)), batch_sequences=24, num_streams=num_streams, **settings
    )
    sleep = SleepConfig(window_tokens=window_tokens)
    mixture = open_mixture(Config(RunConfig(seed=5), sleep=sleep, task=task.config, data=data), task)
    assert mixture
    return mixture


def rows_of(
    mixture: Mixture, streams: range | None = None, states=None, rows_per_stream: int = 1
) -> StreamedRows:
    streams = streams or range(mixture.num_streams)
    start = [[0] * (1 + 3 * len(mixture.urls)) for _ in streams]
    return StreamedRows(mixture, streams, rows_per_stream, states or start)


def names(rows: Rows) -> list[tuple[int, ...]]:
    return [tuple(name) for name in rows.names.tolist()]


def same(a: Rows, b: Rows) -> bool:
    return names(a) == names(b) and all(np.array_equal(x, y) for x, y in zip(a.examples, b.examples))


@pytest.mark.parametrize(("num_shards", "num_streams", "epochs"), [(6, 3, 1), (5, 2, 2), (1, 4, 4)])
def test_epochs_hold_every_example_once(
    task: Task, tmp_path: Path, num_shards: int, num_streams: int, epochs: int
) -> None:
    examples_set(tmp_path / "set", task, num_shards, 4)
    maker = rows_of(mixture_of(task, tmp_path / "set", num_streams=num_streams))
    found = [name for _ in range(epochs * num_shards * 4 // num_streams) for name in names(maker.take())]
    expected = [(0, shard, sample, 0) for shard in range(num_shards) for sample in range(4)] * epochs
    assert sorted(found) == sorted(expected)
    assert found != sorted(found)


def test_a_row_is_the_example_that_the_task_makes(task: Task, tmp_path: Path) -> None:
    examples_set(tmp_path / "set", task, 3, 4, seed=9)
    rows = rows_of(mixture_of(task, tmp_path / "set"), rows_per_stream=3).take()
    indices = np.array([4 * shard + sample for _, shard, sample, _ in names(rows)])
    assert all(np.array_equal(a, b) for a, b in zip(rows.examples, task.examples(9, indices, "train")))


@pytest.mark.parametrize("packed", [False, True])
def test_it_goes_on_from_the_state_after_any_row(task: Task, tmp_path: Path, packed: bool) -> None:
    if packed:
        mixture, _ = documents(tmp_path)
    else:
        examples_set(tmp_path / "a", task, 3, 4)
        examples_set(tmp_path / "b", task, 2, 5, seed=1)
        mixture = mixture_of(task, tmp_path / "a", tmp_path / "b", weights=(2.0, 1.0))
    whole = rows_of(mixture)
    for _ in range(25):
        state, row = whole.state(), whole.take()
        assert same(rows_of(mixture, states=state).take(), row)
    assert {name[0] for name in names(row)} <= set(range(len(mixture.urls)))


def test_streams_may_be_made_apart(task: Task, tmp_path: Path) -> None:
    examples_set(tmp_path / "set", task, 3, 4)
    mixture = mixture_of(task, tmp_path / "set", num_streams=6)
    whole, parts = rows_of(mixture), [rows_of(mixture, streams) for streams in spread(range(6), 4)]
    assert [len(part.streams) for part in parts] == [2, 2, 1, 1]
    for _ in range(9):
        assert same(whole.take(), join([part.take() for part in parts]))


def test_a_mixture_keeps_its_shares(task: Task, tmp_path: Path) -> None:
    examples_set(tmp_path / "a", task, 2, 4)
    examples_set(tmp_path / "b", task, 2, 4, seed=1)
    for settings, share in (({"weights": (9.0, 1.0)}, 0.9), ({}, 0.5)):
        maker = rows_of(mixture_of(task, tmp_path / "a", tmp_path / "b", **settings), rows_per_stream=100)
        assert np.mean(maker.take().names[:, 0] == 0) == pytest.approx(share, abs=0.03)


LENGTHS = [0, 1, 3, 4, 7, 8, 9, 30, 2, 65, 5]


def documents(tmp_path: Path) -> tuple[Mixture, list[bytes]]:
    """Rows of four windows of 4 tokens; the longest document has more than four rows."""
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_bytes(bytes([65 + i]) * 60)
    task = make_task(TextConfig(folder=str(tmp_path / "texts"), sequence_tokens=16))
    texts = [bytes(range(10 * i, 10 * i + length)) for i, length in enumerate(LENGTHS)]
    documents_set(tmp_path / "set", task, texts, 3)
    return mixture_of(task, tmp_path / "set", num_streams=1, window_tokens=4), texts


def test_packed_documents_are_whole_and_start_at_borders(tmp_path: Path) -> None:
    mixture, texts = documents(tmp_path)
    maker, end = rows_of(mixture), 256
    rows = [maker.take() for _ in range(200)]
    windows = [
        (ids[v], targets[v], reset, v)
        for row in rows
        for ids, targets, v, reset in zip(
            row.examples.ids.reshape(4, 4),
            row.examples.targets.reshape(4, 4),
            row.examples.valid.reshape(4, 4),
            row.reset_state[0],
        )
    ]
    found: list[list[int]] = []
    for ids, targets, reset, valid in windows:
        assert valid.any()
        assert np.array_equal(np.sort(valid), valid)  # pads come first
        assert valid.all() or reset  # and in the first window of a document alone
        if reset:
            assert ids[0] == end
            found.append([])
        found[-1] += targets.tolist()
        assert ids[1:].tolist() == targets[:-1].tolist()
    assert all(np.array_equal(row.examples.loss_mask, row.examples.valid) for row in rows)
    whole = [bytes(text[:-1]) for text in found[:-1]]
    assert all(text[-1] == end for text in found[:-1])
    assert sorted(whole[: len(texts)]) == sorted(texts)  # an epoch
    assert sorted(whole[len(texts) : 2 * len(texts)]) == sorted(texts)  # and another
    assert whole[: len(texts)] != whole[len(texts) : 2 * len(texts)]


def test_a_packed_document_costs_what_it_costs_alone(tmp_path: Path) -> None:
    """The memory is reset where a document starts: its loss does not depend on what was packed before it."""
    mixture, _ = documents(tmp_path)
    maker = rows_of(mixture)
    config = ModelConfig(d_model=16, num_heads=2)
    sleep = SleepConfig(num_passes=2, window_tokens=4, schedule="predict_then_consolidate")
    model = SleepModel(config, sleep, 257).double()
    for row in [row for row in (maker.take() for _ in range(12)) if row.reset_state.sum() > 1][:3]:
        start = int(np.flatnonzero(row.reset_state[0])[-1])
        together = model(make_batch(row.examples, 4, None, row.reset_state), 2).nll[:, 4 * start :]
        cut = row.examples._replace(
            **{name: getattr(row.examples, name)[:, 4 * start :] for name in row.examples._fields[:4]}
        )
        alone = model(make_batch(cut, 4), 2).nll
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
        if start:
            kept = model(make_batch(row.examples, 4), 2).nll[:, 4 * start :]
            assert (kept - alone).abs().max() > 1e-6  # without the reset it would


@pytest.mark.parametrize("wrong", ["ids", "shape", "difficulty"])
def test_samples_that_are_no_examples_are_refused(task: Task, tmp_path: Path, wrong: str) -> None:
    tokens = np.zeros((2, task.sequence_tokens), dtype=np.int16)
    meta = {"difficulty": "hard" if wrong == "difficulty" else 1}
    if wrong == "ids":
        tokens[0, 3] = task.vocab_size
    elif wrong == "shape":
        tokens = tokens[:, 1:]
    write_set(tmp_path / "set", [[(meta, tokens)]], task)
    with pytest.raises(ShardError, match=r"set-000000.tar: .*sample 0|set-000000.tar: .*000000000"):
        rows_of(mixture_of(task, tmp_path / "set")).take()


def test_carried_rows_are_streams_of_documents(task: Task, tmp_path: Path) -> None:
    carry = SleepConfig(window_tokens=4, carry_between_batches=True)
    mixture, _ = documents(tmp_path)
    text = TextConfig(folder=str(tmp_path / "texts"), sequence_tokens=16)
    data = DataConfig(shards=mixture.urls, batch_sequences=24)
    opened = open_mixture(Config(sleep=carry, task=text, data=data), make_task(text))
    assert opened is not None
    assert opened.num_streams == 24
    wrong = replace(data, num_streams=4)
    with pytest.raises(ConfigError, match="num_streams=4 does not go with"):
        open_mixture(Config(sleep=carry, task=text, data=wrong), make_task(text))
    examples_set(tmp_path / "examples", task, 1, 4)
    data = DataConfig(shards=(str(tmp_path / "examples"),), batch_sequences=24)
    run = Config(sleep=replace(carry, window_tokens=6), task=task.config, data=data)
    with pytest.raises(ConfigError, match=r"data.shards holds examples"):
        open_mixture(run, task)


def test_sets_of_another_task_are_refused(task: Task, tmp_path: Path) -> None:
    wide = make_task(Rule110Config(width=8, num_strings=2, steps=1))
    examples_set(tmp_path / "wide", wide, 1, 4)
    with pytest.raises(ConfigError, match="sequence_tokens is 18 and not 14"):
        mixture_of(task, tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"index.json cannot be read"):
        mixture_of(task, tmp_path / "nothing")
    documents(tmp_path)
    text = make_task(TextConfig(folder=str(tmp_path / "texts"), sequence_tokens=16))
    with pytest.raises(ConfigError, match=r"window_tokens=5 does not divide task.sequence_tokens=16"):
        mixture_of(text, tmp_path / "set", window_tokens=5)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 4
    path.write_bytes(data)


def test_a_damaged_shard_stops_before_its_first_sample_or_is_left_out(
    task: Task, tmp_path: Path, capsys
) -> None:
    """R12: none of its samples is seen, and the order of the others stays."""
    examples_set(tmp_path / "set", task, 6, 4)
    before = rows_of(mixture_of(task, tmp_path / "set"))
    in_order = [names(before.take()) for _ in range(12)]
    damage(tmp_path / "set" / "set-000002.tar")
    (tmp_path / "set" / "set-000004.tar").unlink()
    stopping = rows_of(mixture_of(task, tmp_path / "set"))
    seen = []
    with pytest.raises(ShardError, match=r"set-000002.tar is damaged|set-000004.tar is missing"):
        seen.extend(iter(lambda: names(stopping.take()), None))
    assert seen == in_order[: len(seen)]
    assert not {shard for row in seen for _, shard, _, _ in row} & {2, 4}
    skipping = rows_of(mixture_of(task, tmp_path / "set", on_bad_shard="skip"))
    found = [names(skipping.take()) for _ in range(8)]
    for stream in range(2):
        rest = [row[stream] for row in in_order if row[stream][1] not in (2, 4)]
        assert [row[stream] for row in found][: len(rest)] == rest[:8]
    assert "warning: a shard is skipped" in capsys.readouterr().out


def test_a_set_without_a_whole_shard_ends_the_run(task: Task, tmp_path: Path) -> None:
    examples_set(tmp_path / "set", task, 2, 4)
    for path in (tmp_path / "set").glob("*.tar"):
        damage(path)
    with pytest.raises(ShardError, match="no shard left"):
        rows_of(mixture_of(task, tmp_path / "set", on_bad_shard="skip")).take()
