"""R7, R8: damaged and mixed-up checkpoints are noticed, file and tensor are named, and the run goes on from
the one before."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuts import random_cut, save_groups, wholes
from e2e_runs import compare_runs
from fault_runs import NUM_STEPS, Process, earlier, found_beside, newest

from sleeptrain.checkpoint import manifest, reader
from sleeptrain.checkpoint.manifest import ITEM_BYTES

FILES_OF_A_STEP = (
    *("manifest.json", "trainer.json"),
    *("model_00000.safetensors", "optimizer_00000.safetensors"),
)  # settings and data are the same in all steps
TENSORS = {"scalar": (), "vector": (37,), "matrix": (12, 10), "cube": (5, 4, 6)}


@pytest.fixture(params=["a run", "slices"])
def two_checkpoints(request: pytest.FixtureRequest, run: Path) -> Path:
    """The folder of two: those of a run, or of tensors that several processes hold in odd pieces."""
    if request.param == "a run":
        return run / "checkpoints"
    chance, folder = random.Random(0), run.parent / "slices"
    for step in (1, NUM_STEPS):
        tensors = {name: torch.full(shape, float(step)) for name, shape in TENSORS.items()}
        cut = [piece for name, tensor in tensors.items() for piece in random_cut(name, tensor, chance)]
        optimizer = wholes({"optimizer": {"m": torch.full((50,), float(step))}})
        save_groups(folder, step, {"model": cut} | optimizer, {"trainer": {"step": step}})
    return folder


def tensor_at(checkpoint: Path, file: str, offset: int) -> str | None:
    """Whose bytes they are."""
    for tensors in manifest.read(checkpoint).groups.values():
        for name, entry in tensors.items():
            for part in entry.slices:
                end = part.offset + part.length * ITEM_BYTES[entry.dtype]
                if part.file == file and part.offset <= offset < end:
                    return name
    return None


def places(checkpoint: Path, count: int) -> list[tuple[Path, int]]:
    """(file, offset) at random over all bytes, and one in each file."""
    chance = random.Random(1)
    sizes = {file: file.stat().st_size for file in sorted(checkpoint.iterdir())}
    chosen = chance.sample([(file, i) for file, size in sizes.items() for i in range(size)], count)
    return chosen + [(file, chance.randrange(size)) for file, size in sizes.items()]


@pytest.mark.more
def test_one_flipped_bit_is_noticed_and_named_and_the_one_before_used(two_checkpoints: Path) -> None:
    """R7: at 50 random offsets over all files, and in each file."""
    damaged_step = two_checkpoints / manifest.step_name(NUM_STEPS)
    kinds = set()
    for file, offset in places(damaged_step, 50):
        tensor = tensor_at(damaged_step, file.name, offset)
        with flipped(file, offset):
            step, [sentence] = found_beside(two_checkpoints)
        assert step < NUM_STEPS
        assert f"{damaged_step.name}/{file.name} " in sentence
        assert tensor is None or f" in tensor {tensor}: " in sentence
        kinds.add((file.suffix, tensor is None))
    assert len(kinds) == 3
    assert found_beside(two_checkpoints) == (NUM_STEPS, [])


@pytest.mark.more
def test_without_checksums_flipped_bits_would_be_loaded(
    two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of R7."""
    damaged_step, unnoticed = two_checkpoints / manifest.step_name(NUM_STEPS), 0
    monkeypatch.setattr(reader, "checksum", lambda data, before="0": EqualToAll("0"))
    for file, offset in places(damaged_step, 50):
        with flipped(file, offset):
            unnoticed += found_beside(two_checkpoints)[0] == NUM_STEPS
    assert unnoticed > 10


class EqualToAll(str):
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class flipped:
    """In its block one bit of a file is another."""

    def __init__(self, file: Path, offset: int) -> None:
        self.file, self.offset = file, offset

    def __enter__(self) -> None:
        self._content = self.file.read_bytes()
        damaged = bytearray(self._content)
        damaged[self.offset] ^= 1 << self.offset % 8
        self.file.write_bytes(damaged)

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self._content)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda file, other: os.truncate(file, file.stat().st_size - 1),
    "cut in half": lambda file, other: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file, other: os.truncate(file, 0),
    "missing": lambda file, other: file.unlink(),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"\0"),
    "of another step": lambda file, other: shutil.copy(other, file),
}


@pytest.mark.more
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_noticed_and_the_checkpoint_before_used(run: Path, damage: str) -> None:
    """R8: each file of a checkpoint in turn."""
    whole, noticed = run.parent / "whole", set()
    shutil.copytree(newest(run), whole)
    for file in sorted(newest(run).iterdir()):
        other = earlier(run) / file.name
        if damage == "of another step" and other.read_bytes() == file.read_bytes():
            continue
        DAMAGES[damage](file, other)
        step, [sentence] = found_beside(run / "checkpoints")
        assert step < NUM_STEPS
        assert f"{newest(run).name}/{file.name} " in sentence
        noticed.add(file.name)
        shutil.rmtree(newest(run))
        shutil.copytree(whole, newest(run))
    assert noticed >= {*FILES_OF_A_STEP}


@pytest.mark.more
@pytest.mark.parametrize("kept", FILES_OF_A_STEP[1:])
def test_a_folder_of_two_steps_is_never_loaded(run: Path, kept: str) -> None:
    """R8: all of another step but one file, under either name."""
    for target, source in ((newest(run), earlier(run)), (earlier(run), newest(run))):
        mixed = run.parent / "mixed" / target.name
        shutil.copytree(source, mixed)
        shutil.copy(target / kept, mixed / kept)
        with pytest.raises(manifest.CheckpointError, match=f"{mixed.name}/(manifest.json|{kept}) "):
            reader.Checkpoint(mixed).verify()


@pytest.mark.more
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run: Path, reference: Path) -> None:
    """R7: the steps since the one before are made again; what was damaged is kept for whoever asks why."""
    file, before = newest(run) / "model_00000.safetensors", earlier(run).name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    process = Process(run, ())
    assert process.wait() == 0
    assert f"{newest(run).name}/{file.name} is damaged in tensor " in process.output()
    assert f"trying {before}" in process.output()
    assert (run / "checkpoints" / f"damaged_{newest(run).name}" / file.name).read_bytes() == content
    assert compare_runs(run, reference) == ""
