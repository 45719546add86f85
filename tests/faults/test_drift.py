"""R16: a run that was changed between two starts is refused, with the fields that differ: at once, and before
data is read where the settings or the versions tell."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from e2e_runs import compare_runs
from fault_runs import SETTINGS, Moment, Process, Sabotage, newest, nothing
from shard_sets import examples_set
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sleeptrain.config import Rule110Config
from sleeptrain.engine import trainer
from sleeptrain.tasks import make_task

pytestmark = pytest.mark.more
REFUSAL_SECONDS = 2  # of computing, after imports: the time that passes depends on what else runs
ALLOWED = "run.allow_config_change=true"


def refusal(
    folder: Path, *settings: str, sabotage: Sabotage = nothing, base: Sequence[str] = SETTINGS
) -> str:
    """The one sentence with which another start ends; the run folder stays as it was."""
    before = contents(folder)
    process = Process(folder, settings, sabotage, base)
    assert process.wait() == 2, process.output()
    assert process.cpu_seconds < REFUSAL_SECONDS
    assert contents(folder) == before
    sentence = process.output().splitlines()[-1]
    assert sentence.startswith(f"error: {newest_of(folder)} was trained with other settings: ")
    assert sentence.endswith("choose another run.id, or set run.allow_config_change=true")
    return sentence


def newest_of(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    """Of its files, but the log of what was said and the lock."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.suffix not in (".log", ".lock")}


CHANGES = {
    "model": (["model.d_model=32", "model.pattern=gdn attn"], "model.d_model: saved 16, now 32"),
    "seed": (["run.seed=7"], "run.seed: saved 0, now 7"),
    "task": (["task.steps=3"], "task.steps: saved 1, now 3"),
    "tokens": (["task.width=7", "sleep.window_tokens=7"], "task.width: saved 6, now 7"),
    "batch": (["data.batch_sequences=16"], "data.batch_sequences: saved 8, now 16"),
    "sleep": (["sleep.num_passes=2"], "sleep.num_passes: saved 3, now 2"),
    "optimizer": (["optim.muon_lr=0.5"], "optim.muon_lr: saved 0.005, now 0.5"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused_by_name(run: Path, change: str) -> None:
    """R16: model, seed, task, batch, N and optimizer."""
    settings, named = CHANGES[change]
    sentence = refusal(run, *settings)
    assert named in sentence
    assert all(setting.split("=")[0] in sentence for setting in settings)


def test_an_allowed_change_is_said_and_goes_on(run: Path) -> None:
    """R16: the override; each change is a warning."""
    shutil.rmtree(newest(run))
    process = Process(run, ["optim.muon_lr=0.5", "optim.weight_decay=0", ALLOWED])
    assert process.wait() == 0
    for change in ("optim.muon_lr: saved 0.005, now 0.5", "optim.weight_decay: saved 0.0001, now 0.0"):
        assert f"warning: going on with other settings, {change}\n" in process.output()
    assert "run.allow_config_change" not in process.output()


def installed(package: str, version: str, folder: Path) -> Sabotage:
    """As another version of a package that is found first would say of itself."""
    info = folder / f"{package}-{version}" / f"{package}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return lambda moment: sys.path.insert(0, str(info.parent))


def test_another_torch_is_refused(run: Path, tmp_path: Path) -> None:
    """R16: whatever else is the same, it may compute other bits."""
    other = installed("torch", "9.8.7+cu999", tmp_path)
    assert 'versions.torch: saved "2.' in (sentence := refusal(run, sabotage=other))
    assert ', now "9.8.7"; go back' in sentence
    shutil.rmtree(newest(run))
    process = Process(run, [ALLOWED], other)
    assert process.wait() == 0
    assert "warning: going on with other settings, versions.torch: saved" in process.output()


def test_another_triton_is_refused(tmp_path: Path) -> None:
    """R16: where there was one, which is where there are kernels of it."""
    short, folder = [*SETTINGS, "optim.num_steps=1"], tmp_path / "run"
    assert Process(folder, (), installed("triton", "3.0", tmp_path), short).wait() == 0
    sentence = refusal(folder, sabotage=installed("triton", "3.1", tmp_path), base=short)
    assert 'other settings: versions.triton: saved "3.0", now "3.1"; go back' in sentence


def test_another_sleeptrain_and_another_build_of_torch_go_on(
    run: Path, reference: Path, tmp_path: Path
) -> None:
    """R16: a mended program must be able to go on with a run, and says that it is another one."""

    def sabotage(moment: Moment) -> None:
        installed("sleeptrain", "9.9", tmp_path)(moment)
        installed("torch", trainer.versions()["torch"] + "+other", tmp_path)(moment)

    shutil.rmtree(newest(run))
    process = Process(run, (), sabotage)
    assert process.wait() == 0
    assert 'other settings, versions.sleeptrain: saved "0.' in process.output()
    assert process.output().count("other settings") == 1
    assert compare_runs(run, reference) == ""


TEXT = [
    *("experiment=text_small", "task.sequence_tokens=32", "sleep.window_tokens=8", "optim.num_steps=1"),
    *("model.d_model=16", "model.num_heads=2", "model.memory_heads=2", "model.pattern=attn gdn"),
    *("data.batch_sequences=2", "eval.num_examples=2", "eval.num_passes=[]"),
]


def write_tokenizer(path: Path, words: str) -> None:
    """Of bytes, and a few merges that the words suggest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([words], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet))
    tokenizer.save(str(path))


@pytest.fixture
def text_run(tmp_path: Path) -> tuple[Path, list[str]]:
    """A run on a folder of text with a tokenizer, and its settings."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} is a number, and {i + 1} comes after it. " * 4)
    write_tokenizer(tmp_path / "tokenizer.json", "one number comes after another number")
    settings = [*TEXT, f"task.folder={tmp_path}/texts", f"task.tokenizer={tmp_path}/tokenizer.json"]
    process = Process(tmp_path / "run", (), base=settings)
    assert process.wait() == 0, process.output()
    return tmp_path / "run", settings


def test_other_settings_are_noticed_before_data_is_read(text_run: tuple[Path, list[str]]) -> None:
    """R16: a start whose data is gone, and whose settings were changed, speaks of the settings."""
    folder, settings = text_run
    shutil.rmtree(folder.parent / "texts")
    (folder.parent / "tokenizer.json").unlink()
    sentence = refusal(folder, "task.tokenizer=bytes", "run.seed=3", base=settings)
    assert 'tokenizer.json", now "bytes"' in sentence
    assert "run.seed: saved 0, now 3" in sentence
    process = Process(folder, (), base=settings)
    assert process.wait() == 2
    assert process.output().splitlines()[-1].startswith("error: task.tokenizer=")  # with the old settings


def test_another_tokenizer_under_the_same_name_is_refused(text_run: tuple[Path, list[str]]) -> None:
    """R16: its hash is part of what the data is."""
    folder, settings = text_run
    write_tokenizer(folder.parent / "tokenizer.json", "all other words and merges")
    assert "other settings: tokenizer: saved " in refusal(folder, base=settings)


def test_another_text_under_the_same_name_is_refused(text_run: tuple[Path, list[str]]) -> None:
    """R16: one word of one file."""
    folder, settings = text_run
    (folder.parent / "texts" / "7.txt").write_text("7 is a number, and 8 comes before it. ")
    assert "files_sha256: saved " in refusal(folder, base=settings)


def test_other_shards_under_the_same_name_are_refused(tmp_path: Path) -> None:
    """R16: the index that tells the shards' hashes is another."""
    task = make_task(Rule110Config(width=6, num_strings=2, steps=1))
    examples_set(tmp_path / "set", task, num_shards=2, shard_samples=16)
    settings = [*SETTINGS, "optim.num_steps=2", f"data.shards=[{tmp_path}/set]"]
    process = Process(tmp_path / "run", (), base=settings)
    assert process.wait() == 0, process.output()
    shutil.rmtree(tmp_path / "set")
    examples_set(tmp_path / "set", task, num_shards=2, shard_samples=16, seed=1)
    assert "sha256" in refusal(tmp_path / "run", base=settings)


@pytest.mark.parametrize("guard", ["the early look", "both looks"])
def test_without_the_guard_a_change_is_found_late_or_never(
    guard: str, text_run: tuple[Path, list[str]]
) -> None:
    """Negative control of R16: data is read first, or the run goes on with another seed."""
    folder, settings = text_run

    def switch_off(moment: Moment) -> None:
        trainer.refuse_drift = lambda *arguments: None
        if guard == "both looks":
            trainer.require_same_run = lambda *arguments: None

    if guard == "the early look":
        shutil.rmtree(folder.parent / "texts")
    process = Process(folder, ["run.seed=3"], switch_off, settings)
    assert process.wait() == (0 if guard == "both looks" else 2)
    assert "run.seed" not in process.output()
