"""What one process does of a save: copy its slices to host memory, then write them with their checksums.

A group of slices becomes one safetensors file. Slices that hold a whole tensor have its name and shape there,
so that any program can read what one process wrote; others are 1-D, with their place in the name.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from mmap import PAGESIZE
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sleeptrain.checkpoint.durable import write_new
from sleeptrain.checkpoint.manifest import (
    ITEM_BYTES,
    PIECE_BYTES,
    Contents,
    FileEntry,
    SliceEntry,
    TensorEntry,
    checksum,
)
from sleeptrain.checkpoint.slices import Box, Slice, box_shape, num_elements
from sleeptrain.checkpoint.threads import NUM_CORES, run_all

NUM_COPY_THREADS = min(4, NUM_CORES)
COPY_ELEMENTS = 2**20
NUM_CHECKSUM_THREADS = 2  # with the thread that writes enough to keep up with a disk of 2 GB/s
_CODES = {
    **{"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "complex64": "C64",
}


class Part(NamedTuple):
    """A slice whose values are in host memory now, ``offset`` bytes after those of the first one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    start: int
    length: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.length * ITEM_BYTES[self.dtype]


class StagedGroup(NamedTuple):
    """The parts of a group in the order of their bytes, and these bytes."""

    parts: list[Part]
    data: memoryview


class HostMemory:
    """Where slices wait until they are written; taken once and used again by each save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._preparing: Thread | None = None

    def prepare(self, groups: dict[str, list[Slice]]) -> None:
        """Takes the memory for such slices ahead, in a thread: the system is slow to hand out its pages."""
        pinned = any(s.values.is_cuda for slices in groups.values() for s in slices)
        sizes = {group: sum(s.values.nbytes for s in slices) for group, slices in groups.items()}

        def touch() -> None:
            with suppress(RuntimeError, MemoryError):  # the save will say so
                for group, num_bytes in sizes.items():
                    self._buffer(group, num_bytes, pinned).numpy()[::PAGESIZE] = 0

        self._preparing = Thread(target=touch, daemon=True)
        self._preparing.start()

    def copy(self, groups: dict[str, list[Slice]]) -> dict[str, StagedGroup]:
        """Copies slices off their devices, bit for bit; raises ValueError for what cannot be a slice."""
        if self._preparing:
            self._preparing.join()
            self._preparing = None
        staged: dict[str, StagedGroup] = {}
        copies: list[Callable[[], object]] = []
        devices = {s.values.device for slices in groups.values() for s in slices if s.values.is_cuda}
        for group, slices in groups.items():
            ordered = sorted(slices, key=lambda s: (-s.values.element_size(), s.name, s.box, s.start))
            parts = list(_parts(ordered))
            buffer = self._buffer(group, parts[-1].end if parts else 0, pinned=bool(devices))
            for part, piece in zip(parts, ordered):
                target = buffer[part.offset : part.end].view(piece.values.dtype)
                pairs = zip(target.split(COPY_ELEMENTS), piece.values.detach().split(COPY_ELEMENTS))
                copies += [_copy(*pair) for pair in pairs]
            staged[group] = StagedGroup(parts, buffer.numpy().data[: parts[-1].end if parts else 0])
        # One thread cannot fill the memory bus; a GPU's copies belong in the stream of this one.
        run_all(copies, num_threads=1 if devices else NUM_COPY_THREADS)
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def _buffer(self, group: str, num_bytes: int, pinned: bool) -> Tensor:
        buffer = self._buffers.get(group)
        if buffer is None or len(buffer) < num_bytes or buffer.is_pinned() != pinned:
            self._buffers.pop(group, None)  # freed before the larger one is taken
            buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._buffers[group] = buffer
        return buffer


def _copy(target: Tensor, source: Tensor) -> Callable[[], object]:
    """What copies ``source``; within host memory by memcpy, a tenth faster than torch there."""
    if source.is_cpu and source.is_contiguous():
        return partial(np.copyto, target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    return partial(target.copy_, source, non_blocking=True)


def write_groups(folder: Path, writer: int, staged: dict[str, StagedGroup]) -> Contents:
    """Writes a file per group, with ``writer`` in its name, and forces it to the disk; raises OSError."""
    contents = Contents({}, {})
    with ThreadPoolExecutor(NUM_CHECKSUM_THREADS) as pool:
        checksums = {
            group: [pool.map(checksum, pieces) for pieces in _pieces(*staged[group])] for group in staged
        }
        for group, (parts, data) in staged.items():
            file, header = f"{group}_{writer:05d}.safetensors", _header(parts)
            if len(data):
                write_new(folder / file, header, data)
                contents.files[file] = FileEntry(len(header) + len(data), len(header), checksum(header))
            tensors = contents.groups.setdefault(group, {})
            for part, of_part in zip(parts, checksums[group]):
                entry = tensors.setdefault(part.name, TensorEntry(part.dtype, part.shape, []))
                if part.length:
                    place = (file, len(header) + part.offset, part.box, part.start, part.length)
                    entry.slices.append(SliceEntry(*place, tuple(of_part)))
    return contents


def _parts(slices: Iterable[Slice]) -> Iterable[Part]:
    offset = 0
    for name, shape, box, start, values in slices:
        dtype, shape = str(values.dtype).removeprefix("torch."), tuple(shape)
        if dtype not in _CODES:
            raise ValueError(f"tensor {name} has dtype {dtype}, which a checkpoint cannot hold")
        if values.dim() != 1 or start < 0 or start + len(values) > num_elements(box):
            raise ValueError(f"a slice of tensor {name} does not lie in its box {box}")
        part = Part(name, dtype, shape, box, start, len(values), offset)
        offset = part.end
        yield part


def _pieces(parts: list[Part], data: memoryview) -> Iterable[list[memoryview]]:
    for part in parts:
        starts = range(part.offset, part.end, PIECE_BYTES)
        yield [data[start : min(start + PIECE_BYTES, part.end)] for start in starts]


def _header(parts: list[Part]) -> bytes:
    """Of a safetensors file: its length, then JSON, padded so that the data is aligned."""
    entries = {}
    for part in (part for part in parts if part.length):
        is_whole = box_shape(part.box) == part.shape and part.length == num_elements(part.box)
        place = ",".join(f"{start}:{stop}" for start, stop in part.box)
        entries[part.name if is_whole else f"{part.name}[{place}]@{part.start}"] = {
            "dtype": _CODES[part.dtype],
            "shape": part.shape if is_whole else (part.length,),
            "data_offsets": (part.offset, part.end),
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
