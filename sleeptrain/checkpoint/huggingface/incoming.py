"""Import: a Hugging Face folder becomes a checkpoint of ours, one tensor in memory at a time.

The checkpoint has step 0, weights alone, in the types that they had there, and ``origin.json``: the
config.json, licence and names, with which ``outgoing.py`` writes the folder back.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import torch
from torch import Tensor

from sleeptrain.checkpoint import manifest, store
from sleeptrain.checkpoint.durable import sync_folder, write_new
from sleeptrain.checkpoint.huggingface.folder import Folder, side_files
from sleeptrain.checkpoint.huggingface.mapping import Mapped
from sleeptrain.checkpoint.manifest import Contents
from sleeptrain.checkpoint.reader import DOCUMENT
from sleeptrain.checkpoint.slices import Slice, whole
from sleeptrain.checkpoint.writer import HostMemory, write_groups
from sleeptrain.config import Config
from sleeptrain.schema import ConfigError, RunError, reason_of, to_dict

FILE_BYTES = 256 * 2**20  # of weights in each file, which is how much is in memory before it is written
MOST_KEPT_BYTES = 2**20


def import_folder(
    folder: Folder, mapped: Mapped, config: Config, run_folder: Path, tell: Callable[[str], None]
) -> Path:
    """Writes ``run_folder/checkpoints/step_00000000``; ``tell`` hears of every tensor. Raises ConfigError
    where there is a checkpoint already, RunError where the disk cannot take it."""
    checkpoints = run_folder / "checkpoints"
    if store.peek(checkpoints):
        raise ConfigError(f"output={run_folder} holds a checkpoint already; choose another folder")
    documents = {"config": to_dict(config), "origin": origin_of(folder, mapped)}
    target = checkpoints / manifest.step_name(0)
    try:
        temporary = store.begin(checkpoints, 0)
        try:
            _write(temporary, documents, weights(folder, mapped, tell))
        except BaseException:
            rmtree(temporary, ignore_errors=True)
            raise
        store.commit(temporary, target)
        sync_folder(checkpoints)
        for path in side_files(folder.path):
            copyfile(path, run_folder / path.name)
    except OSError as error:
        raise RunError(f"{run_folder} cannot be written: {reason_of(error)}") from error
    return target


def weights(folder: Folder, mapped: Mapped, tell: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
    """Ours by name, read one tensor of theirs after the other."""
    for pair in mapped.pairs:
        names = [mapped.names[name] for name in pair.theirs]
        tell(names[0])
        yield from pair.split([folder.read(name) for name in names], mapped.shapes).items()


def origin_of(folder: Folder, mapped: Mapped) -> dict[str, Any]:
    """What the export needs to know, and the licence. Raises ConfigError where too much would be kept."""
    dtypes = {name: found.dtype for name, found in folder.tensors.items()}
    usual_dtype = Counter(dtypes[name] for name in mapped.names.values()).most_common(1)[0][0]
    return {
        "name": folder.name,
        "licence": folder.licence(),
        "config": folder.config,
        "dtype": usual_dtype,
        "dtypes": {n: dtypes[n] for n in mapped.names.values() if dtypes[n] != usual_dtype},
        "names": {usual: name for usual, name in mapped.names.items() if usual != name},
        "rows": {
            name: folder.tensors[mapped.names[name]].shape[0]
            for pair in mapped.pairs
            if len(pair.theirs) > 1
            for name in pair.theirs
        },
        "kept": {name: as_text(folder.read(name)) for name in mapped.kept},
        "left_out": mapped.left_out,
    }


def as_text(tensor: Tensor) -> dict[str, Any]:
    """A small tensor inside of a document; its bits are kept."""
    if tensor.nbytes > MOST_KEPT_BYTES:
        raise ConfigError(f"a tensor of {tensor.nbytes} bytes is too large to be kept beside the weights")
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "base64": base64.b64encode(data).decode()}


def from_text(said: dict[str, Any]) -> Tensor:
    """The way back."""
    data = torch.frombuffer(bytearray(base64.b64decode(said["base64"])), dtype=torch.uint8)
    return data.view(getattr(torch, said["dtype"])).view(said["shape"])


def _write(temporary: Path, documents: dict[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """All files of a checkpoint, the manifest last."""
    texts = {f"{name}{DOCUMENT}": json.dumps(text, indent=2).encode() for name, text in documents.items()}
    for name, text in texts.items():
        write_new(temporary / name, text)
    parts = [Contents({name: manifest.document_entry(text) for name, text in texts.items()}, {})]
    memory = HostMemory()
    for number, slices in enumerate(_batches(tensors)):
        parts.append(write_groups(temporary, number, memory.copy({"model": slices})))
    parts.append(
        write_groups(temporary, 0, memory.copy({"optimizer": [whole("num_updates", torch.tensor(0))]}))
    )
    manifest.write(temporary, 0, manifest.merged(parts))
    sync_folder(temporary)


def _batches(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[list[Slice]]:
    """As many as one file takes."""
    batch: list[Slice] = []
    for name, tensor in tensors:
        if batch and sum(s.values.nbytes for s in batch) + tensor.nbytes > FILE_BYTES:
            yield batch
            batch = []
        batch.append(whole(name, tensor))
    yield batch
