"""One shard: a tar file of samples, as webdataset reads it, with a writer and an in-memory parser of our own.

A sample is two members, which every reader of tar files understands; its key is a number:

    000000123.json         {"difficulty": 4, "index": 57}, or {"name": ...} of a document
    000000123.tokens.npy   an example: int [2, T], ids (-1 on pads) and targets (-1 where there is no loss);
                           a document: its token ids, [n]

The parser accepts regular files with these names alone, in this order, never extracts, and evaluates nothing.
It decodes the headers of the whole file at once, so that a sample costs well below a microsecond.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from sleeptrain.data.index import ShardError

KEY_DIGITS = 9
MAX_META_BYTES = 2**16
_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar files are padded to whole records
_SUFFIXES = (b".json", b".tokens.npy")  # of the members of a sample, in their order
_META, _TOKENS = 0, 1

# A header as POSIX lays it out: name, mode, user, group, size, time, checksum, type, link, magic, the rest.
_NAME, _SIZE, _TYPE, _MAGIC, _PREFIX = slice(0, 100), slice(124, 136), 156, slice(257, 265), 345
_USTAR = b"ustar\x0000"
_HEADER = (
    b"%b0000444\x000000000\x000000000\x00%b\x0000000000000\x00%b\x00 0" + bytes(100) + _USTAR + bytes(247)
)
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_DECIMAL = 10 ** np.arange(KEY_DIGITS - 1, -1, -1, dtype=np.int64)

_NPY_BYTES = 128  # of the header that numpy writes before the integers
_NPY_START = b"\x93NUMPY\x01\x00" + (_NPY_BYTES - 10).to_bytes(2, "little")
_NPY_LAYOUT = re.compile(
    rb"\{'descr': '(<[iu][24])', 'fortran_order': False, "
    rb"'shape': \((?:([0-9]{1,10}),|([0-9]{1,10}), ([0-9]{1,10}))\), \} *\n"
)

Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.integer]


class Shard:
    """The samples of one tar file, whose bytes stay in memory; ``keys`` are what names them."""

    def __init__(self, data: Bytes, name: str) -> None:
        """Raises ShardError where the file is not such a tar file."""
        self.name, self._data = name, data.view()
        self._data.flags.writeable = False
        self._bytes = self._data.data
        names, starts, sizes = _members(self._data, name)
        self.keys = _keys(names, name)
        self._starts, self._stops = starts.tolist(), (starts + sizes).tolist()

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> tuple[memoryview, memoryview]:
        """The bytes of the ``.json`` and of the ``.npy``, not copied."""
        return self._member(sample, _META), self._member(sample, _TOKENS)

    def meta(self, sample: int) -> dict[str, int | str]:
        """What the ``.json`` says; raises ShardError unless it is an object of numbers and texts."""
        data = self._member(sample, _META)
        try:
            meta = json.loads(str(data, "utf-8")) if len(data) <= MAX_META_BYTES else None
        except (ValueError, RecursionError):
            meta = None
        if type(meta) is not dict or not all(map(_is_plain, meta.values())):
            raise ShardError(
                f"{self.name}: the .json of {self.keys[sample]} is no object of numbers and texts"
            )
        return meta

    def tokens(self, sample: int) -> Tokens:
        """The integers of the ``.npy``, not copied; raises ShardError where it holds anything else."""
        data = self._member(sample, _TOKENS)
        layout = _npy_layout(bytes(data[:_NPY_BYTES]))
        if layout is None or len(data) != layout.num_bytes:
            raise ShardError(f"{self.name}: the .npy of {self.keys[sample]} is no plain array of integers")
        return np.ndarray(layout.shape, layout.dtype, data, _NPY_BYTES)

    def _member(self, sample: int, which: int) -> memoryview:
        place = 2 * sample + which
        return self._bytes[self._starts[place] : self._stops[place]]


def write_shard(file: BinaryIO, samples: Iterable[tuple[dict[str, Any], Tokens]], first: int) -> None:
    """Writes (json, tokens) pairs with the keys ``first``, ``first + 1``, ...; equal samples, equal bytes."""
    num_bytes = 0
    for key, (meta, tokens) in enumerate(samples, first):
        for suffix, data in zip(_SUFFIXES, (json.dumps(meta).encode(), _npy(tokens))):
            num_bytes += file.write(_header(b"%0*d%b" % (KEY_DIGITS, key, suffix), len(data)))
            num_bytes += file.write(data + bytes(-len(data) % _BLOCK))
    num_bytes += file.write(bytes(2 * _BLOCK))
    file.write(bytes(-num_bytes % _RECORD))


def _header(name: bytes, size: int) -> bytes:
    octal = b"%011o" % size
    checksum = _BLANK_SUM + sum(name) + sum(octal)
    return _HEADER % (name.ljust(100, b"\0"), octal, b"%06o" % checksum)


_BLANK_SUM = sum(_HEADER % (bytes(100), b"", b" " * 6)) + ord(
    " "
)  # the checksum counts its own field as blanks


def _npy(tokens: Tokens) -> bytes:
    return _npy_header(tokens.dtype.str, tokens.shape) + tokens.tobytes()


@lru_cache(maxsize=4096)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """As numpy writes it; ValueError for what the parser would refuse."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header = _NPY_START + text.ljust(_NPY_BYTES - len(_NPY_START) - 1).encode() + b"\n"
    if _npy_layout(header) is None:
        raise ValueError(f"tokens of type {descr} and shape {shape} are no integers [n] or [2, n]")
    return header


class _Layout(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    num_bytes: int  # with the header


@lru_cache(maxsize=4096)
def _npy_layout(header: bytes) -> _Layout | None:
    """Of an array of integers in C order; None for all else, objects in particular."""
    found = _NPY_LAYOUT.fullmatch(header[len(_NPY_START) :])
    if found is None or not header.startswith(_NPY_START):
        return None
    dtype = np.dtype(found[1].decode())
    shape = tuple(int(n) for n in found.groups()[1:] if n is not None)
    size = shape[0] * (shape[1] if len(shape) == 2 else 1)
    return _Layout(dtype, shape, _NPY_BYTES + size * dtype.itemsize)


def _is_plain(value: object) -> bool:
    return type(value) is str or (type(value) is int and abs(value) < 2**63)


def _members(data: Bytes, name: str) -> tuple[Bytes, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Names ``[M, 100]``, first bytes and sizes ``[M]`` of all members; ShardError for all but regular
    files."""
    if not len(data) or len(data) % _BLOCK:
        raise ShardError(f"{name} is no tar file: its {len(data)} bytes are no multiple of {_BLOCK}")
    blocks = data.reshape(-1, _BLOCK)
    magic = np.ndarray(len(blocks), "<u8", data, _MAGIC.start, (_BLOCK,))
    found = np.flatnonzero(magic == int.from_bytes(_USTAR, "little"))
    octal = blocks[found, _SIZE] - np.uint8(ord("0"))  # wraps round for what is no digit
    sizes = octal[:, :-1] @ _OCTAL
    is_number = (octal[:, :-1] < 8).all(axis=1) & (octal[:, -1] == 256 - ord("0"))
    behind = found + 1 + (sizes + _BLOCK - 1) // _BLOCK

    chain = _chain(found, behind)
    end = int(behind[chain[-1]]) if len(chain) else 0
    if not is_number[chain].all() or end > len(blocks):
        raise ShardError(f"{name} is no plain tar file: a member has no size, or is larger than the file")
    if not end or blocks[end:].any():
        raise ShardError(f"{name} is no plain tar file: block {end} is no header of a member")
    headers = found[chain]
    if (blocks[headers, _TYPE] != ord("0")).any() or blocks[headers, _PREFIX].any():
        raise ShardError(
            f"{name} holds something that is no plain file; links, folders and devices are refused"
        )
    return blocks[headers, _NAME], (headers + 1) * _BLOCK, sizes[chain]


def _chain(found: npt.NDArray[np.int64], behind: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which of the blocks that look like headers are reached from block 0, member by member; the others lie
    inside of members."""
    if np.array_equal(found[:1], [0]) and np.array_equal(found[1:], behind[:-1]):
        return np.arange(len(found))
    chain, block = [], 0
    for place, (here, following) in enumerate(zip(found.tolist(), behind.tolist())):
        if here == block:
            chain.append(place)
            block = following
    return np.array(chain, dtype=np.int64)


def _keys(names: Bytes, name: str) -> list[str]:
    """Of the samples, whose numbers ascend, from the names of their members ``[M, 100]``, two of each."""
    if len(names) % 2:
        raise ShardError(f"{name} holds {len(names)} members; a sample has two, a .json and a .tokens.npy")
    pairs = names.reshape(-1, 2, names.shape[1])
    digits = pairs[:, :, :KEY_DIGITS] - np.uint8(ord("0"))
    numbers = digits[:, _META] @ _DECIMAL
    is_right = (digits[:, _META] < 10).all(axis=1) & (digits[:, _META] == digits[:, _TOKENS]).all(axis=1)
    for which, suffix in enumerate(_SUFFIXES):
        tail = np.frombuffer(suffix.ljust(names.shape[1] - KEY_DIGITS, b"\0"), np.uint8)
        is_right &= (pairs[:, which, KEY_DIGITS:] == tail).all(axis=1)
    is_right[1:] &= numbers[1:] > numbers[:-1]
    if not is_right.all():
        wrong = " and ".join(repr(n.tobytes().rstrip(b"\0").decode("latin-1")) for n in pairs[~is_right][0])
        raise ShardError(
            f"{name} holds {wrong}, where a sample of the next number is expected, as 000000123.json and "
            "000000123.tokens.npy"
        )
    return (
        np.ascontiguousarray(pairs[:, _META, :KEY_DIGITS]).view(f"S{KEY_DIGITS}")[:, 0].astype(str).tolist()
    )
