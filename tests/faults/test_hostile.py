"""R14: whatever a checkpoint folder holds, no code of it runs and no memory is taken for sizes it claims."""

import contextlib
import json
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import compare_runs
from fault_runs import NUM_STEPS, Process, found_beside, newest

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.manifest import PIECE_BYTES
from sleeptrain.evaluate import main as evaluate

MEMORY_BYTES = 100 * 2**20  # what a hostile checkpoint may cost above a good one
FILES = ("manifest.json", "trainer.json", "model_00000.safetensors", "optimizer_00000.safetensors")


class Touch:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """What someone who knows the format can do: the manifest is changed and its own hash is right again."""
    path = checkpoint / manifest.FILE
    body = json.loads(path.read_bytes())
    for key in ("format", "version", "sha256"):
        del body[key]
    change(body)
    path.write_bytes(manifest.seal(body))


def put(checkpoint: Path, name: str, data: bytes) -> None:
    """A file, listed as if it had always been there."""
    (checkpoint / name).write_bytes(data)
    entry = manifest.document_entry(data)._asdict()
    reseal(checkpoint, lambda body: body["files"].update({name: entry}))


def put_document(checkpoint: Path, name: str, change: dict[str, Any]) -> None:
    document = json.loads((checkpoint / f"{name}.json").read_bytes()) | change
    put(checkpoint, f"{name}.json", json.dumps(document).encode())


def enlarge(path: Path, num_bytes: int) -> None:
    """Sparse: it takes no room on the disk."""
    path.touch()
    os.truncate(path, num_bytes)


def claim_huge_document(checkpoint: Path) -> None:
    enlarge(checkpoint / "trainer.json", 2**40)
    entry = {"size_bytes": 2**40, "head_bytes": 2**40, "crc32": "00000000"}
    reseal(checkpoint, lambda body: body["files"].update({"trainer.json": entry}))


def claim_huge_header(checkpoint: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body["files"]["model_00000.safetensors"]["head_bytes"] = 2**50

    reseal(checkpoint, change)


def claim_huge_tensor(checkpoint: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        entry = next(iter(body["groups"]["model"].values()))
        entry["shape"], entry["slices"][0]["box"], entry["slices"][0]["length"] = [2**40], [[0, 2**40]], 2**40

    reseal(checkpoint, change)


def claim_endless_tensor_of_nothing(checkpoint: Path) -> None:
    entry = {"dtype": "float32", "shape": [0, 2**70], "slices": []}
    reseal(checkpoint, lambda body: body["groups"]["optimizer"].update({"num_updates": entry}))


def put_huge_moment(checkpoint: Path) -> None:
    """Zeros that are really there, with the right checksums, in the place of a moment of a few elements."""
    num_bytes = 2**29
    enlarge(checkpoint / "optimizer_00001.safetensors", num_bytes)
    pieces = [manifest.checksum(bytes(PIECE_BYTES))] * (num_bytes // PIECE_BYTES)

    def change(body: dict[str, Any]) -> None:
        name = next(name for name in body["groups"]["optimizer"] if "/" in name)
        length = num_bytes // 4
        place = {"file": "optimizer_00001.safetensors", "offset": 0, "box": [[0, length]], "start": 0}
        slices = [place | {"length": length, "crc32": pieces}]
        body["groups"]["optimizer"][name] = {"dtype": "float32", "shape": [length], "slices": slices}
        body["files"][place["file"]] = {"size_bytes": num_bytes, "head_bytes": 0, "crc32": "0"}

    reseal(checkpoint, change)


def replace_by(make: Callable[[Path], object], name: str) -> Callable[[Path, bytes], None]:
    def attack(checkpoint: Path, pickled: bytes) -> None:
        (checkpoint / name).unlink()
        make(checkpoint / name)

    return attack


Attack = Callable[[Path, bytes], object]
DEEP = b'{"a":' * 200_000
SKIPPED: dict[str, Attack] = {
    **{
        f"pickle as {name}": lambda folder, pickled, name=name: (folder / name).write_bytes(pickled)
        for name in FILES
    },
    **{
        f"extra {name}": lambda folder, pickled, name=name: (folder / name).write_bytes(pickled)
        for name in (".metadata", "optimizer.pt", "extra_state.pkl", "model_00001.safetensors")
    },
    "listed pickle": lambda folder, pickled: put(folder, "optimizer.pt", pickled),
    "listed path outside": lambda folder, pickled: put(folder, "../outside.json", b"{}"),
    "pickle as listed document": lambda folder, pickled: put(folder, "trainer.json", pickled),
    "list as document": lambda folder, pickled: put(folder, "trainer.json", b"[]"),
    "deep manifest": lambda folder, pickled: (folder / "manifest.json").write_bytes(DEEP),
    "deep document": lambda folder, pickled: put(folder, "trainer.json", DEEP),
    "huge manifest": lambda folder, pickled: enlarge(folder / "manifest.json", 2**40),
    "huge document": lambda folder, pickled: claim_huge_document(folder),
    "huge header": lambda folder, pickled: claim_huge_header(folder),
    "huge tensor": lambda folder, pickled: claim_huge_tensor(folder),
    "endless tensor of nothing": lambda folder, pickled: claim_endless_tensor_of_nothing(folder),
    "pipe": replace_by(os.mkfifo, "trainer.json"),
    "pipe as manifest": replace_by(os.mkfifo, "manifest.json"),
    "link": replace_by(lambda path: path.symlink_to("/dev/zero"), "model_00000.safetensors"),
}
REFUSED: dict[str, tuple[Attack, str]] = {
    "_target_ in the config": (
        lambda folder, pickled: put_document(folder, "config", {"_target_": "os.system", "_args_": ["id"]}),
        '_target_: saved "os.system", now absent',
    ),
    "no config": (lambda folder, pickled: put(folder, "config.json", b"{}"), "saved absent"),
    "other kinds of values": (
        lambda folder, pickled: put_document(folder, "trainer", {"guard": [], "interval": 7}),
        "does not fit this run",
    ),
    "huge moment": (lambda folder, pickled: put_huge_moment(folder), "belongs to no weight"),
}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory of a forked process that does it; raises AssertionError where it fails."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return used.ru_maxrss * 2**10


def looks_for_the_earlier(run: Path) -> None:
    """What a trainer does first: no code of the hostile checkpoint may run in it."""
    step, [sentence] = found_beside(run / "checkpoints")
    assert step < NUM_STEPS
    assert sentence.startswith(f"checkpoint skipped: {newest(run).name}")


@pytest.mark.more
@pytest.mark.parametrize("attack", SKIPPED)
def test_a_hostile_checkpoint_is_stepped_over(run: Path, attack: str) -> None:
    """R14: refused before anything of it is unpickled or believed."""
    normal = peak_bytes(lambda: found_beside(run / "checkpoints"))
    canary = run.parent / "canary"
    SKIPPED[attack](newest(run), pickle.dumps(Touch(canary)))
    assert peak_bytes(lambda: looks_for_the_earlier(run)) < normal + MEMORY_BYTES
    assert not canary.exists()


@pytest.mark.more
def test_without_a_limit_a_huge_manifest_takes_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of R14."""
    normal = peak_bytes(lambda: found_beside(run / "checkpoints"))
    enlarge(newest(run) / "manifest.json", 2**28)
    monkeypatch.setattr(manifest, "LARGEST_TEXT_BYTES", 2**60)
    assert peak_bytes(lambda: looks_for_the_earlier(run)) > normal + MEMORY_BYTES


def attacked(run: Path, attack: Attack) -> Process:
    """A trainer that found a hostile checkpoint and ended."""
    canary = run.parent / "canary"
    attack(newest(run), pickle.dumps(Touch(canary)))
    process = Process(run, ())
    process.wait()
    assert not canary.exists()
    assert "Traceback" not in process.output()
    return process


@pytest.mark.more
def test_a_run_goes_on_from_the_checkpoint_before_a_hostile_one(run: Path, reference: Path) -> None:
    """R14: with a pickle where the manifest says that a document is."""
    process = attacked(run, SKIPPED["pickle as listed document"])
    assert process.exit_code == 0
    assert process.output().count(f"checkpoint skipped: {newest(run).name}") == 1
    assert compare_runs(run, reference) == ""


@pytest.mark.more
@pytest.mark.parametrize("attack", REFUSED)
def test_a_hostile_checkpoint_that_looks_whole_is_refused(run: Path, attack: str) -> None:
    """R14: everything is in its place, and it is not this run's."""
    attack_folder, sentence = REFUSED[attack]
    process = attacked(run, attack_folder)
    assert process.exit_code == 2
    assert sentence in process.output()
    assert process.peak_bytes < ordinary_peak_bytes(run) + MEMORY_BYTES


def ordinary_peak_bytes(run: Path) -> int:
    """Of a trainer with the same settings that finds nothing in its folder."""
    process = Process(run.parent / "ordinary", ("optim.num_steps=1", "eval.num_examples=1"))
    assert process.wait() == 0
    return process.peak_bytes


@pytest.mark.more
def test_evaluating_a_hostile_config_builds_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """R14: ``_target_`` is a setting that does not exist."""
    canary = run.parent / "canary"
    target = {"_target_": "os.system", "_args_": [f"touch {canary}"]}
    put_document(newest(run), "config", {"model": target})
    assert evaluate([f"checkpoint={newest(run)}", "num_examples=4"]) == 2
    assert "unknown setting" in capsys.readouterr().err
    assert not canary.exists()


def test_the_pickle_would_run_where_pickles_are_read(tmp_path: Path) -> None:
    """Negative control of R14: the canary is set by whoever unpickles."""
    for read in (pickle.load, lambda file: torch.load(file, weights_only=False)):
        (tmp_path / "pickle").write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
        with (tmp_path / "pickle").open("rb") as file, contextlib.suppress(RuntimeError):
            read(file)  # torch raises after it has run: the pickle is not one of torch.save
        (tmp_path / "canary").unlink()
