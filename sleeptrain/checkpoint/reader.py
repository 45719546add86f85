"""Reading a checkpoint: any range of any box of its tensors, and nothing that is not as it was saved."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleeptrain.checkpoint import manifest
from sleeptrain.checkpoint.manifest import ITEM_BYTES, PIECE_BYTES, CheckpointError, TensorEntry, checksum
from sleeptrain.checkpoint.slices import Box, Range, box_shape, common, num_elements, view, whole_box
from sleeptrain.checkpoint.threads import NUM_CORES, run_all

NUM_THREADS = min(8, NUM_CORES)
DOCUMENT = ".json"
CHUNK_BYTES = 2**18  # small enough to be summed before it leaves the cache of its core
_of_thread = threading.local()


class Checkpoint:
    """An open checkpoint folder: manifest and documents are read at once, tensors when they are asked for.

    ``documents`` are by file name without its ending. Whatever is read is compared with its checksum; every
    method raises CheckpointError where the folder is not as it was saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step, self._files, self._groups = manifest.read(path)
        names = [name for name in self._files if name.endswith(DOCUMENT)]
        self.documents = {name.removesuffix(DOCUMENT): self._document(name) for name in names}

    @property
    def groups(self) -> list[str]:
        """``model`` and ``optimizer``, for example."""
        return list(self._groups)

    def names(self, group: str) -> list[str]:
        """The logical tensors of a group; none where there is no such group."""
        return list(self._groups.get(group, {}))

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Of the whole tensor. A tensor that is not there is a KeyError, here and below."""
        return self._entry(group, name).shape

    def dtype(self, group: str, name: str) -> str:
        """As torch calls it."""
        return self._entry(group, name).dtype

    def read(
        self, group: str, name: str, box: Box | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Elements ``start`` to ``stop`` of a box (the whole tensor unless given), on the CPU.

        1-D, or of the shape of the box where no range is given. Raises ValueError for what lies outside of
        the tensor.
        """
        entry = self._entry(group, name)
        box = whole_box(entry.shape) if box is None else box
        wanted = Range(box, start, num_elements(box) if stop is None else stop)
        if not _is_inside(wanted, entry.shape):
            raise ValueError(f"{wanted} is not inside of tensor {name} of shape {list(entry.shape)}")
        values = torch.empty(wanted.stop - wanted.start, dtype=getattr(torch, entry.dtype))
        run_all(self._loads(name, entry, wanted, values), NUM_THREADS)
        return values.view(box_shape(box)) if start == 0 and stop is None else values

    def read_all(self, group: str) -> dict[str, Tensor]:
        """Every tensor of a group, whole."""
        tensors: dict[str, Tensor] = {}
        jobs: list[Callable[[], None]] = []
        for name, entry in self._groups.get(group, {}).items():
            tensors[name] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            wanted = Range(whole_box(entry.shape), 0, tensors[name].numel())
            jobs += self._loads(name, entry, wanted, tensors[name].view(-1))
        run_all(jobs, NUM_THREADS)
        return tensors

    def verify(self) -> None:
        """Reads every byte of every file once."""
        for name, entry in self._files.items():
            self._require_size(name)
            self._fill(memoryview(bytearray(entry.head_bytes)), name, 0, entry.crc32)
        pieces = (
            partial(self._verify_piece, piece, name)
            for tensors in self._groups.values()
            for name, entry in tensors.items()
            for piece in _pieces(entry)
        )
        run_all(pieces, NUM_THREADS)

    def _entry(self, group: str, name: str) -> TensorEntry:
        found = self._groups.get(group, {}).get(name)
        if found is None:
            raise KeyError(f"{self.path} holds no tensor {name} in {group}")
        return found

    def _document(self, name: str) -> dict[str, Any]:
        size_bytes, head_bytes, crc32 = self._files[name]
        self._require_size(name)
        data = bytearray(head_bytes)
        self._fill(memoryview(data), name, 0, crc32)
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or head_bytes < size_bytes:
            raise CheckpointError(f"{self.path.name}/{name} is malformed: it is no JSON object")
        return document

    def _loads(
        self, name: str, entry: TensorEntry, wanted: Range, values: Tensor
    ) -> Iterator[Callable[[], None]]:
        """What there is to do, in any order, so that ``values`` become the wanted range."""
        for piece in _pieces(entry):
            if _meet(piece.held, wanted):
                yield partial(self._load, name, piece, wanted, values)

    def _load(self, name: str, piece: "Piece", wanted: Range, values: Tensor) -> None:
        (box, start, stop), place = piece.held, (piece.file, piece.offset, piece.crc32, name)
        if box == wanted.box and wanted.start <= start and stop <= wanted.stop:
            self._fill(_bytes(values[start - wanted.start : stop - wanted.start]), *place)
            return
        found = _scratch(piece.num_bytes)
        self._fill(_bytes(found), *place)
        for shared in common(piece.held, wanted):
            view(values, wanted, shared).copy_(view(found.view(values.dtype), piece.held, shared))

    def _verify_piece(self, piece: "Piece", name: str) -> None:
        self._fill(_bytes(_scratch(piece.num_bytes)), piece.file, piece.offset, piece.crc32, name)

    def _fill(self, target: memoryview, file: str, offset: int, crc32: str, tensor: str = "") -> None:
        """Reads part of a file and compares it with its checksum."""
        where = f"{self.path.name}/{file}"
        done, found = 0, "0"
        try:
            with (self.path / file).open("rb", buffering=0) as opened:
                opened.seek(offset)
                while size := opened.readinto(target[done : done + CHUNK_BYTES]):
                    found = checksum(target[done : done + size], found)
                    done += size
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error
        if done < len(target):
            self._require_size(file)
        if found != crc32:
            part = f" in tensor {tensor}" if tensor else ""
            raise CheckpointError(
                f"{where} is damaged{part}: its checksum differs from the one in {manifest.FILE}"
            )

    def _require_size(self, file: str) -> None:
        where, expected = f"{self.path.name}/{file}", self._files[file].size_bytes
        try:
            size = (self.path / file).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error
        if size != expected:
            kind = "empty" if not size else "truncated" if size < expected else "too long"
            raise CheckpointError(f"{where} is {kind}: expected {expected} bytes, found {size}")


class Piece(NamedTuple):
    """The bytes that one checksum covers, and the elements they are."""

    file: str
    offset: int
    num_bytes: int
    crc32: str
    held: Range


def _pieces(entry: TensorEntry) -> Iterator[Piece]:
    item_bytes = ITEM_BYTES[entry.dtype]
    length = PIECE_BYTES // item_bytes
    for part in entry.slices:
        for number, crc32 in enumerate(part.crc32):
            first = number * length
            last = min(first + length, part.length)
            place = (part.offset + first * item_bytes, (last - first) * item_bytes)
            yield Piece(part.file, *place, crc32, Range(part.box, part.start + first, part.start + last))


def _meet(a: Range, b: Range) -> bool:
    """Whether two ranges of a tensor share an element."""
    if a.box == b.box:
        return max(a.start, b.start) < min(a.stop, b.stop)
    return bool(common(a, b))


def _is_inside(wanted: Range, shape: tuple[int, ...]) -> bool:
    box, start, stop = wanted
    inside = len(box) == len(shape) and all(0 <= a <= b <= size for (a, b), size in zip(box, shape))
    return inside and 0 <= start <= stop <= num_elements(box)


def _scratch(num_bytes: int) -> Tensor:
    """Memory of this thread, until its next call."""
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = torch.empty(PIECE_BYTES, dtype=torch.uint8)
    return _of_thread.scratch[:num_bytes]


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data
