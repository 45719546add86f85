import math
import os
import random

import pytest
import torch
from cuts import boxes, fragments, random_cut, save_filled, save_groups, selected, wholes
from safetensors.torch import load_file

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.slices import num_elements, whole_box

SHAPES = {"scalar": (), "one": (1,), "vector": (37,), "matrix": (12, 10), "cube": (5, 4, 6), "none": (0, 3)}


def numbered(dtype=torch.float32):
    return {name: torch.arange(math.prod(s)).reshape(s).to(dtype) for name, s in SHAPES.items()}


def test_every_bit_of_every_dtype_comes_back(tmp_path):
    chance = torch.Generator().manual_seed(0)
    tensors = {}
    for name, item_bytes in manifest.ITEM_BYTES.items():
        bits = torch.randint(0, 2 if name == "bool" else 256, (6 * item_bytes,), generator=chance)
        tensors[name] = bits.to(torch.uint8).view(getattr(torch, name)).view(2, 3)
    path = save_groups(tmp_path, 1, wholes({"model": tensors}))
    for back in (Checkpoint(path).read_all("model"), load_file(path / "model_00000.safetensors")):
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("seed", range(12))
def test_any_cut_can_be_read_as_any_other(tmp_path, seed):
    chance, tensors = random.Random(seed), numbered()
    cut = [piece for name, tensor in tensors.items() for piece in random_cut(name, tensor, chance)]
    checkpoint = Checkpoint(save_groups(tmp_path, 1, {"model": cut}))
    checkpoint.verify()
    back = checkpoint.read_all("model")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.shape("model", name) == tensor.shape
        assert torch.equal(back[name], tensor)
        assert torch.equal(checkpoint.read("model", name), tensor)
        for wanted in random_cut(name, tensor, chance):
            stop = wanted.start + len(wanted.values)
            read = checkpoint.read("model", name, wanted.box, wanted.start, stop)
            assert torch.equal(read, wanted.values)
        box = tuple(tuple(sorted(chance.choices(range(size + 1), k=2))) for size in tensor.shape)
        assert torch.equal(checkpoint.read("model", name, box).reshape(-1), selected(tensor, box, 0, None))


def test_four_tensor_parallel_ranks_with_zero_fragments_read_by_two_and_by_one(tmp_path):
    tensor = torch.randn(8, 20)
    written = []
    for box in boxes((8, 20), 1, 4):  # each over three data-parallel ranks, in odd sizes
        written += fragments("w", tensor, box, [13, 14])
    checkpoint = Checkpoint(save_groups(tmp_path, 3, {"model": written}))
    for box in boxes((8, 20), 1, 2):
        assert torch.equal(checkpoint.read("model", "w", box), tensor[:, slice(*box[1])])
        parts = [checkpoint.read("model", "w", box, a, b) for a, b in ((0, 33), (33, 33), (33, 80))]
        assert torch.equal(torch.cat(parts), tensor[:, slice(*box[1])].reshape(-1))
    assert torch.equal(checkpoint.read("model", "w"), tensor)


def test_slices_longer_than_what_one_checksum_covers(tmp_path):
    length = manifest.PIECE_BYTES // 8 * 2 + 1000
    tensor = torch.arange(length * 3, dtype=torch.int64).view(3, length)
    checkpoint = Checkpoint(save_groups(tmp_path, 3, wholes({"model": {"w": tensor}})))
    assert torch.equal(checkpoint.read("model", "w"), tensor)
    assert torch.equal(checkpoint.read("model", "w", start=5, stop=length), tensor.view(-1)[5:length])
    box = ((0, 3), (length - 7, length))
    assert torch.equal(checkpoint.read("model", "w", box), tensor[:, -7:])
    edges = list(range(1, length, 100_001))
    cut = fragments("w", tensor, whole_box((3, length)), edges)
    checkpoint = Checkpoint(save_groups(tmp_path, 4, {"model": cut}))
    assert torch.equal(checkpoint.read("model", "w", box), tensor[:, -7:])
    assert torch.equal(checkpoint.read("model", "w"), tensor)


def test_what_is_not_there_is_refused(tmp_path):
    checkpoint = Checkpoint(save_groups(tmp_path, 1, wholes({"model": {"w": torch.zeros(2, 3)}})))
    assert (checkpoint.groups, checkpoint.names("model"), checkpoint.names("gone")) == (["model"], ["w"], [])
    assert checkpoint.read_all("gone") == {}
    for read in (checkpoint.shape, checkpoint.read):
        for place in (("model", "v"), ("gone", "w")):
            with pytest.raises(KeyError, match=f"no tensor {place[1]} in {place[0]}"):
                read(*place)
    for wanted in [(((0, 2), (0, 4)),), (((0, 2),),), (None, -1), (None, 0, 7), (None, 5, 4)]:
        with pytest.raises(ValueError, match="not inside of tensor w of shape"):
            checkpoint.read("model", "w", *wanted)


@pytest.mark.parametrize("cut", ["whole", "slices"])
def test_a_damaged_tensor_cannot_be_read_and_every_other_can(tmp_path, cut):
    chance, tensors = random.Random(0), numbered()
    groups = wholes({"model": tensors})
    if cut == "slices":
        groups["model"] = [part for item in tensors.items() for part in random_cut(*item, chance)]
    path = save_groups(tmp_path, 3, groups)
    for name, entry in manifest.read(path).groups["model"].items():
        for part in entry.slices:
            content = (path / part.file).read_bytes()
            damaged = bytearray(content)
            damaged[part.offset] ^= 1
            (path / part.file).write_bytes(damaged)
            sentence = rf"step_00000003/{part.file} is damaged in tensor {name}: its checksum differs"
            for read in (lambda name=name: Checkpoint(path).read("model", name), Checkpoint(path).verify):
                with pytest.raises(CheckpointError, match=sentence):
                    read()
            for other in tensors.keys() - {name}:
                assert torch.equal(Checkpoint(path).read("model", other), tensors[other])
            (path / part.file).write_bytes(content)


def test_every_byte_of_every_file_has_a_checksum(tmp_path):
    path = save_groups(
        tmp_path, 1, wholes({"model": numbered(), "data": {"b": torch.ones(3).bool()}}), {"a": {}}
    )
    _, files, groups = manifest.read(path)
    for file, entry in files.items():
        parts = [
            (part.offset, part.offset + part.length * manifest.ITEM_BYTES[tensor.dtype])
            for tensors in groups.values()
            for tensor in tensors.values()
            for part in tensor.slices
            if part.file == file
        ]
        reached = entry.head_bytes
        for start, stop in sorted(parts):
            assert start == reached
            reached = stop
        assert reached == entry.size_bytes == (path / file).stat().st_size


def test_truncated_and_missing_files_are_noticed_when_they_are_read(tmp_path):
    checkpoint = Checkpoint(save_filled(tmp_path, 2))
    file = checkpoint.path / "model_00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=r"step_00000002/model_00000\.safetensors is truncated: expected "
    ):
        checkpoint.read_all("model")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model_00000\.safetensors cannot be read: No such file"):
        checkpoint.read_all("model")
    assert len(checkpoint.read_all("optimizer")) == 1


def test_documents_come_back_as_they_were(tmp_path):
    trainer = {
        **{"loss": 0.1 + 0.2, "tiny": 5e-324, "zero": -0.0, "inf": math.inf, "big": 2**70},
        "list": [None, "ß"],
    }
    path = save_groups(tmp_path, 7, {}, {"trainer": trainer, "config": {}})
    assert repr(Checkpoint(path).documents) == repr({"config": {}, "trainer": trainer})


def test_special_values_strides_and_shared_memory(tmp_path):
    payload = torch.tensor([0x7FC01234, 0x7F800001, -0x3FEDCC], dtype=torch.int32).view(torch.float32)
    shared = torch.randn(4, 6)
    tensors = {
        "nan": payload,
        "special": torch.tensor([-0.0, math.inf, -math.inf, 1e-45]),
        "shared": shared,
        "transposed": shared.T,
        "expanded": torch.ones(1).expand(5),
        "every_other": shared.view(-1)[::2],
        "trained": torch.nn.Parameter(torch.randn(3)),
        "index": torch.tensor(2**62 + 1),
        "random": torch.get_rng_state(),
    }
    back = Checkpoint(save_groups(tmp_path, 1, wholes({"model": tensors}))).read_all("model")
    for name, tensor in tensors.items():
        assert back[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("document", [b"[]", b"{", b'{"a":' * 100_000, b"\x80\x04."])
def test_a_document_that_is_no_object_is_refused(tmp_path, document):
    path = save_groups(tmp_path, 1, {}, {"trainer": {}})
    (path / "trainer.json").write_bytes(document)
    (path / "manifest.json").unlink()
    manifest.write(path, 1, manifest.Contents({"trainer.json": manifest.document_entry(document)}, {}))
    with pytest.raises(
        CheckpointError, match=r"step_00000001/trainer\.json is malformed: it is no JSON object"
    ):
        Checkpoint(path)


def test_a_range_is_read_without_the_rest(tmp_path):
    """Damage elsewhere does not matter: what is not read is not verified."""
    tensor = torch.randn(64, 8)
    written = [piece for box in boxes((64, 8), 0, 8) for piece in fragments("w", tensor, box, [])]
    path = save_groups(tmp_path, 1, {"model": written})
    file = path / "model_00000.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    checkpoint, half = Checkpoint(path), ((0, 32), (0, 8))
    assert num_elements(half) == 256
    assert torch.equal(checkpoint.read("model", "w", half), tensor[:32])
    with pytest.raises(CheckpointError, match="in tensor w: its checksum differs"):
        checkpoint.read("model", "w", ((32, 64), (7, 8)))
