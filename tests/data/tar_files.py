"""Tar files made byte by byte, so that tests can write what no writer of tar files would."""

import json
from collections.abc import Iterable

import numpy as np

BLOCK = 512


def header(
    name: bytes,
    size: int | bytes,
    type: bytes = b"0",
    link: bytes = b"",
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
) -> bytes:
    """``size`` as bytes stands in the field as it is; the checksum is right."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    start = name.ljust(100, b"\0") + b"0000644\x000000000\x000000000\x00" + field + b"00000000000\0"
    end = type + link.ljust(100, b"\0") + magic + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    return start + b"%06o\0 " % sum(start + b" " * 8 + end) + end


def base_256(size: int) -> bytes:
    """A size as GNU tar writes those of 8 GiB and more."""
    return b"\x80" + size.to_bytes(11, "big")


def member(name: bytes, data: bytes, **fields: object) -> bytes:
    return header(name, fields.pop("size", len(data)), **fields) + data + bytes(-len(data) % BLOCK)  # type: ignore[arg-type]


def tar(members: Iterable[bytes]) -> bytes:
    data = b"".join(members)
    return data + bytes(2 * BLOCK) + bytes(-(len(data) + 2 * BLOCK) % (20 * BLOCK))


def npy(shape: str = "(2, 6)", descr: str = "'<i2'", order: str = "False", data: bytes = bytes(24)) -> bytes:
    """A .npy whose header says this, and these bytes."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n" + data


def sample(key: int = 0, meta: object = None, tokens: bytes | None = None) -> list[bytes]:
    """The two members of a good sample; ``meta`` as bytes stands as it is."""
    text = meta if isinstance(meta, bytes) else json.dumps(meta or {"difficulty": 1, "index": key}).encode()
    array = npy(data=np.arange(12, dtype=np.int16).tobytes()) if tokens is None else tokens
    return [member(b"%09d.json" % key, text), member(b"%09d.tokens.npy" % key, array)]
