"""One shard: a tar file of samples, written by webdataset and read in memory by a parser of our own.

A sample ``000000123`` is two members, which every reader of tar files understands:

    000000123.json         {"difficulty": 4, "index": 57}, or {"name": ...} of a document
    000000123.tokens.npy   an example: int [2, T], ids (-1 on pads) and targets (-1 where there is no loss);
                           a document: its token ids, [n]

The parser accepts regular files with these names alone, never extracts, and evaluates nothing. Headers of the
whole file are decoded at once: a sample costs well below a microsecond.
"""

import ast
import io
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from sleeptrain.data.index import ShardError

META, TOKENS = b"json", b"tokens.npy"
MAX_META_BYTES = 2**16
_BLOCK = 512
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_NAME_BYTES = np.zeros(256, dtype=bool)
_NAME_BYTES[[0, *b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-."]] = True
_NPY_HEADER = re.compile(
    rb"\{'descr': '[<|][iu][124]', 'fortran_order': False, 'shape': \([0-9, ]+\), \} *\n"
)

Tokens = npt.NDArray[np.integer]


class Member(NamedTuple):
    """Bytes ``start..stop`` of the tar file."""

    start: int
    stop: int


class Shard:
    """The samples of one tar file, whose bytes stay in ``data``."""

    def __init__(self, data: npt.NDArray[np.uint8], name: str) -> None:
        """Raises ShardError where the file is not such a tar file."""
        self.name, self._data = name, data
        names, starts, sizes = _headers(data, name)
        self.keys, self._members = _samples(names, starts, sizes, name)

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, sample: int, suffix: bytes) -> memoryview:
        """The bytes of a member, not copied; raises ShardError if the sample has none of this suffix."""
        found = self._members[suffix][sample]
        if found is None:
            raise ShardError(f"{self.name}: sample {self.keys[sample]} has no .{suffix.decode()}")
        return self._data[found.start : found.stop].data

    def meta(self, sample: int) -> dict[str, Any]:
        """What the ``.json`` says."""
        data = self.member(sample, META)
        if len(data) > MAX_META_BYTES:
            raise ShardError(f"{self.name}: the .json of {self.keys[sample]} has {len(data)} bytes")
        try:
            meta = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{self.name}: the .json of {self.keys[sample]} is no JSON") from error
        if not isinstance(meta, dict):
            raise ShardError(f"{self.name}: the .json of {self.keys[sample]} is no object")
        return meta

    def tokens(self, sample: int) -> Tokens:
        """The integers of the ``.npy``, not copied."""
        data = self.member(sample, TOKENS)
        header_bytes = int.from_bytes(data[8:10], "little")
        try:
            dtype, shape = _npy_layout(bytes(data[: 10 + header_bytes]))
            return np.frombuffer(data, dtype, offset=10 + header_bytes).reshape(shape)
        except ValueError as error:
            where = f"{self.name}: the .npy of {self.keys[sample]}"
            raise ShardError(f"{where} is no plain array of integers") from error


def write_shard(file: BinaryIO, samples: Iterable[tuple[dict[str, Any], Tokens]], first: int) -> None:
    """Writes (json, tokens) pairs with the keys ``first``, ``first + 1``, ...; equal samples, equal bytes."""
    from webdataset import TarWriter

    with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for key, (meta, tokens) in enumerate(samples, first):
            array = io.BytesIO()
            np.save(array, tokens, allow_pickle=False)
            members = {META.decode(): json.dumps(meta).encode(), TOKENS.decode(): array.getvalue()}
            tar.write({"__key__": f"{key:09d}", **members})


def _headers(data: npt.NDArray[np.uint8], name: str) -> tuple[list[bytes], list[int], list[int]]:
    """Names, first bytes and sizes of all members. Raises ShardError for all but regular files."""
    if not len(data) or len(data) % _BLOCK:
        raise ShardError(f"{name} is no tar file: its {len(data)} bytes are no multiple of {_BLOCK}")
    blocks = data.reshape(-1, _BLOCK)
    # Whatever looks like a header, then those that are reached from the first one, header by header.
    found = np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1))
    digits = blocks[found, 124:135] - np.uint8(ord("0"))  # wraps round for what is no digit
    sizes = (digits * _OCTAL).sum(axis=1)
    is_number = (digits < 8).all(axis=1) & np.isin(blocks[found, 135], (0, ord(" ")))
    room = len(data) - (found + 1) * _BLOCK
    is_regular = np.isin(blocks[found, 156], (0, ord("0"))) & (blocks[found, 345] == 0)
    is_plain = _NAME_BYTES[blocks[found, :100]].all(axis=1)
    behind = found + 1 + (sizes + _BLOCK - 1) // _BLOCK
    places: list[int] = []
    place_of = dict(zip(found.tolist(), range(len(found))))
    following = behind.tolist()
    fits = (is_number & (sizes <= room)).tolist()
    block = 0
    while (place := place_of.get(block)) is not None:
        if not fits[place]:
            raise ShardError(f"{name} is no plain tar file: a member is larger than the file")
        places.append(place)
        block = following[place]
    chain = np.array(places, dtype=np.int64)
    if blocks[block:].any():
        raise ShardError(f"{name} is no plain tar file: block {block} is no header of a member")
    if not len(chain) or not is_regular[chain].all():
        raise ShardError(f"{name} holds something that is no regular file; links and folders are refused")
    names = np.ascontiguousarray(blocks[found[chain], :100]).view("S100")[:, 0].tolist()
    if not is_plain[chain].all() or any(b"\0" in n for n in names):
        raise ShardError(f"{name} holds a name that is not plain; letters, digits, '_', '-' and '.' are")
    return names, ((found[chain] + 1) * _BLOCK).tolist(), sizes[chain].tolist()


def _samples(
    names: list[bytes], starts: list[int], sizes: list[int], name: str
) -> tuple[list[str], dict[bytes, list[Member | None]]]:
    """The keys, and for each suffix the member of every sample; members of a sample are neighbours."""
    keys: list[bytes] = []
    members: dict[bytes, list[Member | None]] = {META: [], TOKENS: []}
    last = b""
    for full_name, start, size in zip(names, starts, sizes):
        key, _, suffix = full_name.partition(b".")
        if suffix not in members or not key:
            raise ShardError(f"{name} holds {full_name.decode()!r}; the members are KEY.json, KEY.tokens.npy")
        if key != last:
            last = key
            keys.append(key)
            for column in members.values():
                column.append(None)
        if members[suffix][-1] is not None:
            raise ShardError(f"{name} holds {full_name.decode()!r} twice")
        members[suffix][-1] = Member(start, start + size)
    return [key.decode() for key in keys], members


@lru_cache(maxsize=4096)
def _npy_layout(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Of an array of integers in C order; ValueError for all else, objects in particular."""
    if header[:8] != b"\x93NUMPY\x01\x00" or not _NPY_HEADER.fullmatch(header[10:]):
        raise ValueError("no plain header")
    layout = ast.literal_eval(header[10:].decode())
    if not 1 <= len(layout["shape"]) <= 2:
        raise ValueError("neither one nor two dimensions")
    return np.dtype(layout["descr"]), layout["shape"]
