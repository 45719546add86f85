"""A set of shards that is made while it is read."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_sets import examples_set

from sleeptrain.config import ClusterConfig, Config, DataConfig, OptimConfig, Rule110Config, SleepConfig
from sleeptrain.data import fetch
from sleeptrain.data.fetch import ShardReader
from sleeptrain.data.index import FILE, MAKING, ShardError
from sleeptrain.data.mixture import open_mixture
from sleeptrain.data.shard_maker import Folder, claim, complete, finish
from sleeptrain.data.shard_plan import plan_of_run, planned_index
from sleeptrain.data.shards import Shard
from sleeptrain.data.stream import TrainStream
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ASK_SECONDS", 0.01)


def run_with(folder: Path, **data: object) -> Config:
    """Six steps of 4 examples by two streams: three shards of 4 for each of them."""
    sizes = {"batch_sequences": 4, "num_streams": 2, "shard_samples": 4}
    produced = DataConfig(shards=(str(folder),), producer="ray", **(sizes | data))  # type: ignore[arg-type]
    return Config(
        task=Rule110Config(width=6, num_strings=2, steps=1),
        sleep=SleepConfig(window_tokens=6),
        optim=OptimConfig(num_steps=6, warmup_steps=0),
        cluster=ClusterConfig(kind="ray"),
        data=produced,
    )


def make_all(config: Config) -> None:
    folder = Folder(config.data.shards[0])
    plan, known = claim(plan_of_run(config), folder)
    entries = [finish(plan, i, known.get(plan.name(i)))[0] for i in range(plan.num_shards)]
    complete(plan, folder, entries)


def batches(config: Config) -> list[np.ndarray]:
    task = make_task(config.task)
    stream = TrainStream(task, 0, config.data.batch_sequences, 6, mixture=open_mixture(config, task))
    return [stream.batch(step).ids.numpy() for step in range(config.optim.num_steps)]


def test_unless_told_a_run_reads_every_example_once(tmp_path: Path) -> None:
    config = run_with(tmp_path / "set")
    assert [len(plan_of_run(config).places(i)) for i in range(6)] == [4] * 6
    make_all(config)
    rows = np.concatenate(batches(config))
    assert len(rows) == len(np.unique(rows, axis=0)) == 24


@pytest.mark.parametrize(("asked", "expected"), [(None, 24), (8, 8), (40, 40)])
def test_the_number_of_examples(tmp_path: Path, asked: int | None, expected: int) -> None:
    config = run_with(tmp_path / "set", num_examples=asked)
    assert planned_index(plan_of_run(config)).num_samples == expected


def test_the_order_is_that_of_the_whole_set(tmp_path: Path) -> None:
    """Read while another thread makes it, shard by shard, the last ones first."""
    config = run_with(tmp_path / "set")
    found: list[list[np.ndarray]] = []
    reading = threading.Thread(target=lambda: found.append(batches(config)), daemon=True)
    reading.start()
    plan, _ = claim(plan_of_run(config), Folder(str(tmp_path / "set")))
    for shard in reversed(range(plan.num_shards)):
        assert not found
        time.sleep(0.05)
        finish(plan, shard, None)
    reading.join(30)
    make_all(config)
    afterwards = replace(config, data=replace(config.data, producer="none"))
    assert len(found[0]) == 6
    assert all(map(np.array_equal, found[0], batches(afterwards)))


def test_what_it_is_does_not_depend_on_how_much_is_there(tmp_path: Path) -> None:
    """The fingerprint in checkpoints; also not on the code that made it."""
    config = run_with(tmp_path / "set")
    task = make_task(config.task)
    before = open_mixture(config, task)
    make_all(config)
    path = tmp_path / "set" / FILE
    path.write_bytes(path.read_bytes().replace(b'"code_version": "', b'"code_version": "older '))
    after = open_mixture(config, task)
    assert before is not None
    assert after is not None
    assert before.fingerprint() == after.fingerprint()
    other = open_mixture(run_with(tmp_path / "set", num_examples=8), task)
    assert other is not None
    assert other.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("is_whole", [True, False])
def test_another_shard_than_planned_is_refused(tmp_path: Path, is_whole: bool) -> None:
    config = run_with(tmp_path / "set")
    planned = planned_index(plan_of_run(config))
    there = examples_set(tmp_path / "set", make_task(config.task), 6, 5)
    if not is_whole:
        (tmp_path / "set" / FILE).unlink()
        news = tmp_path / "set" / MAKING / f"{planned.shards[0].name}.json"
        news.parent.mkdir()
        news.write_text(json.dumps(there.shards[0]._asdict()))
    with pytest.raises(ShardError, match=r"tells of another shard than rule110-000000\.tar with 4 samples"):
        ShardReader(str(tmp_path / "set"), planned, None).fetch(0).result()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"name": 1}', '{"name": "x-000000.tar", "samples": -1}', "[" * 9**5]
)
def test_damaged_news_of_a_shard_is_no_shard(tmp_path: Path, text: str) -> None:
    planned = planned_index(plan_of_run(run_with(tmp_path / "set")))
    news = tmp_path / "set" / MAKING / f"{planned.shards[0].name}.json"
    news.parent.mkdir(parents=True)
    news.write_text(text)
    with pytest.raises(ShardError, match="make the shards again"):
        ShardReader(str(tmp_path / "set"), planned, None).fetch(0).result()


def test_who_waits_keeps_nobody_from_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "NUM_THREADS", 1)
    config = run_with(tmp_path / "set")
    plan, _ = claim(plan_of_run(config), Folder(str(tmp_path / "set")))
    reader = ShardReader(str(tmp_path / "set"), planned_index(plan), None)
    waiting = [reader.fetch(number) for number in range(4)]
    finish(plan, 5, None)
    assert isinstance(reader.fetch(5).result(timeout=30), Shard)
    assert not any(future.done() for future in waiting)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shards": ()}, "data.producer=ray makes one set of shards"),
        ({"shards": ("a", "b")}, "names another number of folders"),
        ({"num_examples": 6}, "data.num_examples=6 must be a positive multiple of data.shard_samples=4"),
        ({"num_producers": 0}, "data.num_producers=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_set_are_refused(settings: dict[str, object], sentence: str) -> None:
    fitting: dict[str, object] = {"shards": ("a",), "producer": "ray", "shard_samples": 4}
    with pytest.raises(ConfigError, match=sentence):
        DataConfig(**(fitting | settings))  # type: ignore[arg-type]


def test_producers_belong_to_a_cluster(tmp_path: Path) -> None:
    config = run_with(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"cluster\.kind=local has none; set cluster=ray"):
        replace(config, cluster=replace(config.cluster, kind="local"))
