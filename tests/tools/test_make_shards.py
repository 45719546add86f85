"""Sets of shards hold what the task makes, whole and in equal bytes however they came about."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from shard_making import DEPO, SIZES, TOOLS, die_at, files, make, make_shards, plan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from webdataset import WebDataset

from sleeptrain.config import TextConfig
from sleeptrain.data.fetch import ShardReader, read_index
from sleeptrain.data.index import FILE, Index
from sleeptrain.data.mixture import open_mixture
from sleeptrain.data.shards import Shard
from sleeptrain.pretrain import compose_config
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task
from sleeptrain.tasks.text import Text


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is then the installed one, whatever is committed meanwhile."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 files of 40 to 109 bytes, in two folders."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir()
    for i in range(70):
        text = rng.choice(list(b"abc def\n"), 40 + i).astype(np.uint8).tobytes()
        (folder / ("sub" if i % 2 else ".") / f"{i:02d}.txt").write_bytes(text)
    return folder


def read(url: object) -> tuple[Index, list[Shard]]:
    index = read_index(str(url))
    reader = ShardReader(str(url), index, cache=None)
    return index, [reader.fetch(i).result() for i in range(len(index.shards))]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (DEPO, np.int16),
        (("experiment=quickstart",), np.int16),
        (("experiment=depo_small", "task.vocab_words=20000"), np.int32),
        (("experiment=gsm_tiny",), np.int16),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_set_holds_the_examples_of_the_task(
    tmp_path: Path, settings: tuple[str, ...], dtype: type, split: Any
) -> None:
    assert make(tmp_path / "set", *SIZES, "--split", split, *settings) == 0
    index, shards = read(tmp_path / "set")
    config = compose_config([*settings])
    task = make_task(config.task)
    e = task.examples(config.run.seed, np.arange(12), split)
    tokens = np.array([shard.tokens(i) for shard in shards for i in range(len(shard))])
    assert tokens.dtype == dtype
    assert np.array_equal(tokens[:, 0], np.where(e.valid, e.ids, -1))
    assert np.array_equal(tokens[:, 1], np.where(e.loss_mask, e.targets, -1))
    metas = [shard.meta(i) for shard in shards for i in range(len(shard))]
    assert metas == [{"difficulty": d, "index": i} for i, d in enumerate(e.difficulty.tolist())]
    assert [shard.samples for shard in index.shards] == [3, 3, 3, 3]
    assert index.num_tokens == e.valid.sum()
    assert (index.kind, index.split, index.tokenizer_sha256) == ("examples", split, "")
    assert (index.sequence_tokens, index.vocab_size) == (task.sequence_tokens, task.vocab_size)
    assert index.task == task.fingerprint() | {"seed": config.run.seed}
    assert sorted(files(tmp_path / "set")) == sorted([FILE, *(shard.name for shard in index.shards)])


def text_settings(corpus: Path, **more: object) -> tuple[str, ...]:
    values = {"folder": corpus, "sequence_tokens": 128, **more}
    task = [f"task.{name}={value}" for name, value in values.items()]
    return ("experiment=text_small", "sleep.window_tokens=0", *task)


def test_a_set_holds_the_documents_of_a_split_once(tmp_path: Path, corpus: Path) -> None:
    assert make(tmp_path / "set", "--shard-samples", "20", *text_settings(corpus)) == 0
    index, shards = read(tmp_path / "set")
    task = Text(TextConfig(folder=str(corpus), sequence_tokens=128))
    expected = {d.name: d.path.read_bytes() for d in task.documents("train")}
    found = [(shard.meta(i), shard.tokens(i)) for shard in shards for i in range(len(shard))]
    assert len(found) == len(expected) > 40
    assert {meta["name"]: ids.astype(np.uint8).tobytes() for meta, ids in found} == expected
    assert {ids.dtype for _, ids in found} == {np.dtype(np.uint16)}
    assert all(meta["num_bytes"] == len(ids) for meta, ids in found)
    assert {shard.samples for shard in index.shards} <= {len(found) // 3, len(found) // 3 + 1}
    assert (index.kind, index.sequence_tokens, index.vocab_size) == ("documents", 0, 257)
    assert index.num_tokens == sum(map(len, expected.values()))
    assert [meta["name"] for meta, _ in found] != [d.name for d in task.documents("train")]


def test_the_seed_shuffles_the_documents(tmp_path: Path, corpus: Path) -> None:
    names = []
    for i, seed in enumerate((0, 0, 1)):
        assert make(tmp_path / str(i), *text_settings(corpus), f"run.seed={seed}") == 0
        _, [shard] = read(tmp_path / str(i))
        names.append([shard.meta(i)["name"] for i in range(len(shard))])
    assert names[0] == names[1] != names[2]
    assert sorted(names[0]) == sorted(names[2])


def test_documents_are_tokenized(tmp_path: Path, corpus: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [p.read_text() for p in corpus.rglob("*.txt")],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = text_settings(corpus, tokenizer=tmp_path / "tokenizer.json", sequence_tokens=64)
    assert make(tmp_path / "set", *settings) == 0
    index, [shard] = read(tmp_path / "set")
    for i in range(len(shard)):
        text = (corpus / str(shard.meta(i)["name"])).read_text()
        assert shard.tokens(i).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert index.vocab_size == 301
    assert len(index.tokenizer_sha256) == 64


def test_how_texts_are_cut_makes_no_other_set(tmp_path: Path, corpus: Path, capsys) -> None:
    assert make(tmp_path / "set", *text_settings(corpus)) == 0
    assert make(tmp_path / "set", *text_settings(corpus, sequence_tokens=64)) == 0
    assert "1 kept and 0 made" in capsys.readouterr().out


def test_a_text_that_changes_meanwhile_is_refused(tmp_path: Path, corpus: Path) -> None:
    copy = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    options = make_shards.parse([str(tmp_path / "set"), "--num-procs", "1", *text_settings(copy)])
    begun = make_shards.plan_of(options)
    changed = begun.source.documents[7]
    changed.path.write_text("something else")
    with pytest.raises(ConfigError, match=f"{changed.name} changed while it was in use"):
        make_shards.make(begun, 1)
    assert not (tmp_path / "set" / FILE).exists()


def test_a_run_takes_the_sets(tmp_path: Path, corpus: Path) -> None:
    """Index and settings agree on what a task is."""
    for settings, sizes in ((DEPO, SIZES), (text_settings(corpus), ())):
        out = tmp_path / settings[0]
        assert make(out, *sizes, *settings) == 0
        config = compose_config([*settings, f"data.shards=['{out}']", "data.num_streams=1"])
        mixture = open_mixture(config, make_task(config.task))
        assert mixture is not None
        assert mixture.is_packed == (settings != DEPO)


def test_webdataset_reads_a_set(tmp_path: Path) -> None:
    assert make(tmp_path / "set", *SIZES, *DEPO) == 0
    index, shards = read(tmp_path / "set")
    urls = [str(tmp_path / "set" / shard.name) for shard in index.shards]
    found = list(WebDataset(urls, shardshuffle=False).decode())
    ours = [(s.keys[i], s.meta(i), s.tokens(i)) for s in shards for i in range(len(s))]
    assert len(found) == 12
    for theirs, (key, meta, tokens) in zip(found, ours):
        assert (theirs["__key__"], theirs["json"]) == (key, meta)
        assert np.array_equal(theirs["tokens.npy"], tokens)


def test_a_set_is_written_to_any_url(tmp_path: Path) -> None:
    assert make(tmp_path / "set", *SIZES, *DEPO) == 0
    assert make(f"file://{tmp_path}/other", *SIZES, *DEPO) == 0
    assert make("memory://made/set", *SIZES, *DEPO) == 0
    assert files(tmp_path / "set") == files(tmp_path / "other")
    memory = fsspec.filesystem("memory")
    assert {p.rsplit("/", 1)[-1]: memory.cat_file(p) for p in memory.find("/made")} == files(tmp_path / "set")
    memory.rm("/made", recursive=True)


def test_what_is_there_is_kept(tmp_path: Path, capsys) -> None:
    assert make(tmp_path, *SIZES, *DEPO) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make(tmp_path, *SIZES, *DEPO) == 0
    assert "4 kept and 0 made" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", ["flipped", "truncated", "missing"])
def test_what_is_damaged_is_made_again(tmp_path: Path, capsys, change: str) -> None:
    assert make(tmp_path, *SIZES, *DEPO) == 0
    before, path = files(tmp_path), tmp_path / "depo-000002.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data if change == "flipped" else data[:5000])
    if change == "missing":
        path.unlink()
    assert make(tmp_path, *SIZES, *DEPO) == 0
    assert "3 kept and 1 made" in capsys.readouterr().out
    assert files(tmp_path) == before


def test_what_can_no_longer_be_made_is_said(tmp_path: Path, capsys) -> None:
    """As if the code had changed since: the index knows another hash."""
    assert make(tmp_path, *SIZES, *DEPO) == 0
    sha256 = read_index(str(tmp_path)).shards[2].sha256
    path = tmp_path / FILE
    path.write_text(path.read_text().replace(sha256, sha256[::-1]))
    assert make(tmp_path, *SIZES, *DEPO) == 1
    error = capsys.readouterr().err
    assert "depo-000002.tar is missing or damaged, and what is made now differs" in error


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("arguments", "differing"),
    [
        ((*SIZES, *DEPO, "run.seed=6"), ["task.seed is 5 there and 6 here"]),
        ((*SIZES, *DEPO, "task.max_hops=7"), ["task.max_hops is 8 there and 7", "vocab_size is 30 there"]),
        ((*SIZES, *DEPO, "--split", "test"), ["split is train there and test here"]),
        ((*SIZES, "--num-examples", "15", *DEPO), ["num_samples is 12 there and 15", "num_shards"]),
        ((*SIZES, "--shard-samples", "4", *DEPO), ["num_shards is 4 there and 3 here"]),
        ((*SIZES, "experiment=quickstart"), ["task.name is depo there and rule110 here"]),
    ],
)
def test_another_set_is_refused_and_not_touched(
    tmp_path: Path, capsys, is_whole: bool, arguments: tuple[str, ...], differing: list[str]
) -> None:
    if is_whole:
        assert make(tmp_path, *SIZES, *DEPO) == 0
    else:
        assert die_at(plan(tmp_path), 9)
    before = files(tmp_path)
    assert make(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} holds another set of shards" in error
    assert all(difference in error for difference in differing)
    assert error.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((*SIZES, "--num-examples", "13", *DEPO), "use 12 or 15"),
        (("--num-examples", "13", *DEPO), "=13 is no multiple of --shard-samples=2000, .* use 2000$"),
        (DEPO, "--num-examples is missing; task=depo"),
        ((*SIZES, "experiment=text_small"), "--num-examples=12 is for tasks that make examples"),
        ((*SIZES, *DEPO, "task.max_hop=8"), "did you mean 'task.max_hops'"),
        ((*SIZES, "depo"), "'depo' is no setting; write KEY=VALUE"),
        ((*SIZES, "--num-examples", "90000", "--shard-samples", "1", *DEPO), "a set has at most"),
        (("--num-examples", "9" * 7, "--shard-samples", "9" * 7, *DEPO), "puts up to .* bytes in shard 0"),
    ],
)
def test_wrong_settings_get_a_sentence(
    tmp_path: Path, capsys, arguments: tuple[str, ...], reason: str
) -> None:
    assert make(tmp_path / "set", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(reason, error)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("out", "num_procs", "code", "reason"),
    [
        ("memory://x", 2, 2, "is memory of one process; use --num-procs 1"),
        ("pipe:cat", 1, 2, "could run commands"),
        ("https://me:secret@host/x", 1, 2, "would end up in config.yaml"),
        ("nowhere://x", 1, 1, "nowhere://x cannot be used"),
        ("http://127.0.0.1:9/x", 1, 1, "http://127.0.0.1:9/x cannot be read"),
        (f"{__file__}/x", 1, 1, "cannot be read|cannot be written"),
    ],
)
def test_where_nothing_can_be_written_gets_a_sentence(
    capsys, out: str, num_procs: int, code: int, reason: str
) -> None:
    assert make(out, *SIZES, *DEPO, num_procs=num_procs) == code
    error = capsys.readouterr().err
    assert any(part in error for part in reason.split("|"))
    assert error.count("\n") == 1
    assert "secret" not in error


def test_help_explains_it(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        make_shards.main(["--help"])
    text = capsys.readouterr().out
    for part in ("OUT", "--num-examples", "--num-procs", "KEY=VALUE", "data.shards=[OUT]", "exit code"):
        assert part in text


def test_the_version_is_the_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_DIR")
    assert make(tmp_path, *SIZES, *DEPO) == 0
    version = json.loads((tmp_path / FILE).read_text())["code_version"]
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=TOOLS, text=True)
    assert version.removesuffix("-dirty") == commit[:12]
