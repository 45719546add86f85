"""``manifest.json``: what a checkpoint consists of, so that every damage is noticed and named.

It holds the format's name and version, the step, each file with its size, each logical tensor with its
dtype, shape and slices, a CRC-32 of every part of every file, and the SHA-256 of itself. It tells where the
elements are and not who wrote them. It is written last: a folder without it is no checkpoint.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sleeptrain.checkpoint.durable import write_new
from sleeptrain.checkpoint.slices import Box, Range, flaw, num_elements
from sleeptrain.schema import RunError, flatten

FILE = "manifest.json"
FILE_NAME = re.compile(r"\w+\.(json|safetensors)", re.ASCII)
FORMAT = "sleeptrain-checkpoint"
VERSION = 2
ASIDE = ".old_"  # prefix of a checkpoint that was moved aside while its successor takes its name
PIECE_BYTES = 4 * 2**20  # a slice has a checksum per so many bytes: a part of it can be verified alone
LARGEST_TEXT_BYTES = 64 * 2**20  # of a manifest, a document or a header: no file can make us take more memory
ITEM_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
}


class CheckpointError(RunError):
    """A checkpoint cannot be written or used; the message names the file and says what is wrong with it."""


class FileEntry(NamedTuple):
    """A file: its size and the checksum of its first ``head_bytes``; after them come slices, if any."""

    size_bytes: int
    head_bytes: int
    crc32: str


class SliceEntry(NamedTuple):
    """``length`` elements of a box, from ``start`` on, at byte ``offset`` of ``file``; a checksum for each
    ``PIECE_BYTES``."""

    file: str
    offset: int
    box: Box
    start: int
    length: int
    crc32: tuple[str, ...]


class TensorEntry(NamedTuple):
    """A logical tensor: ``dtype`` as in ``float32``, its shape, and the slices that make it up."""

    dtype: str
    shape: tuple[int, ...]
    slices: list[SliceEntry]


Groups = dict[str, dict[str, TensorEntry]]


class Contents(NamedTuple):
    """What one process wrote, or all of them: files, and tensors by group and name."""

    files: dict[str, FileEntry]
    groups: Groups


class Manifest(NamedTuple):
    """The parsed manifest: the optimizer step, files and tensors."""

    step: int
    files: dict[str, FileEntry]
    groups: Groups


def step_name(step: int) -> str:
    """Folder name of a checkpoint: 12 -> ``step_00000012``."""
    return f"step_{step:08d}"


def named_step(folder: Path) -> int | None:
    """The step that the folder's name tells, moved aside or not; None for any other name."""
    match = re.fullmatch(r"step_(\d+)", folder.name.removeprefix(ASIDE), re.ASCII)
    return int(match[1]) if match else None


def checksum(data: bytes | memoryview, before: str = "0") -> str:
    """CRC-32 in hexadecimal, of ``data`` or of what has the checksum ``before`` followed by ``data``.

    It misses no damage of up to 32 bits in a row, and others with a chance of 2**-32 per piece. SHA-256 made
    verified loading on two cores as slow as the limit that was set for it, twice ``torch.load``.
    """
    return f"{zlib.crc32(data, int(before, 16)):08x}"


def document_entry(data: bytes) -> FileEntry:
    """The entry of a file that holds no tensors."""
    return FileEntry(len(data), len(data), checksum(data))


def merged(parts: Iterable[Contents]) -> Contents:
    """The contents of several processes as one; raises CheckpointError unless every tensor is whole."""
    whole = Contents({}, {})
    for files, groups in parts:
        whole.files.update(files)
        for group, tensors in groups.items():
            known = whole.groups.setdefault(group, {})
            for name, (dtype, shape, slices) in tensors.items():
                entry = known.setdefault(name, TensorEntry(dtype, shape, []))
                if (entry.dtype, entry.shape) != (dtype, shape):
                    raise CheckpointError(
                        f"tensor {name} of {group} is {entry.dtype} {list(entry.shape)} in one process and "
                        f"{dtype} {list(shape)} in another"
                    )
                entry.slices.extend(slices)
    for group, tensors in whole.groups.items():
        for name, entry in tensors.items():
            _require_whole(f"tensor {name} of {group}", entry)
    return whole


def write(folder: Path, step: int, contents: Contents) -> None:
    """Writes the manifest of ``folder`` and forces it to the disk; raises OSError."""
    write_new(folder / FILE, seal({"step": step, **to_json(contents)}))


def read(folder: Path) -> Manifest:
    """Reads the manifest and compares it with the folder's name and file list; raises CheckpointError.

    Of the other files nothing is read yet.
    """
    where = f"{folder.name}/{FILE}"
    try:
        present = {path.name: path.is_file() and not path.is_symlink() for path in folder.iterdir()}
        if FILE not in present:
            raise CheckpointError(f"{where} is missing, so this is no complete checkpoint")
        for name in sorted(name for name, is_plain in present.items() if not is_plain):
            raise CheckpointError(f"{folder.name}/{name} is not part of the checkpoint: it is no plain file")
        if (folder / FILE).stat().st_size > LARGEST_TEXT_BYTES:
            raise CheckpointError(f"{where} is damaged: it is longer than any manifest")
        data = (folder / FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error.strerror}") from error
    body = unseal(data, where)
    try:
        manifest = Manifest(_integer(body["step"]), *from_json(body))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is malformed: {error!r}") from error
    if named_step(folder) not in (None, manifest.step):
        raise CheckpointError(
            f"{where} belongs to step {manifest.step}, not to the step in the folder's name"
        )
    for name in sorted(manifest.files.keys() - present.keys()):
        raise CheckpointError(f"{folder.name}/{name} is missing")
    for name in sorted(present.keys() - manifest.files.keys() - {FILE}):
        raise CheckpointError(f"{folder.name}/{name} is not part of the checkpoint (not listed in {FILE})")
    for group, tensors in manifest.groups.items():
        for name, entry in tensors.items():
            _require_whole(f"{where} is malformed: tensor {name} of {group}", entry)
    return manifest


def seal(body: dict[str, Any]) -> bytes:
    """JSON with format and version, a line for each tensor, and at its end the hash of all before it."""
    text = _lines({"format": FORMAT, "version": VERSION, **body}, depth=2).encode()
    return text[: -len(b"\n}")] + _tail(text)


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """What was sealed; raises CheckpointError on any changed byte, and on another format or version."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is not JSON ({len(data)} bytes)") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{where} is foreign: its format is not {FORMAT!r}")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has format version {body.get('version')!r}, and this program reads version {VERSION}"
        )
    text = data[: -len(_tail(b""))] + b"\n}"
    if not data.endswith(_tail(text)):
        raise CheckpointError(f"{where} is damaged: its content differs from its own hash")
    return body


def to_json(contents: Contents) -> dict[str, Any]:
    """Files and tensors as plain values."""
    return {
        "piece_bytes": PIECE_BYTES,
        "files": {name: entry._asdict() for name, entry in sorted(contents.files.items())},
        "groups": {
            group: {
                name: {**entry._asdict(), "slices": [part._asdict() for part in entry.slices]}
                for name, entry in sorted(tensors.items())
            }
            for group, tensors in sorted(contents.groups.items())
        },
    }


def from_json(body: dict[str, Any]) -> Contents:
    """The way back; an exception of any kind where ``body`` does not have that form."""
    if body["piece_bytes"] != PIECE_BYTES:
        raise ValueError(f"piece_bytes is {body['piece_bytes']}, and this program reads {PIECE_BYTES}")
    files = {name: _file_entry(name, entry) for name, entry in body["files"].items()}
    groups = {
        group: {name: _tensor_entry(entry, files) for name, entry in tensors.items()}
        for group, tensors in body["groups"].items()
    }
    return Contents(files, groups)


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for each setting that differs in two nested dicts: ``sleep.num_passes: saved 2, now 3``."""
    old, new = flatten(saved), flatten(current)
    return [
        f"{key}: saved {_show(old, key)}, now {_show(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def _show(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "absent"


def _require_whole(what: str, entry: TensorEntry) -> None:
    ranges = [Range(part.box, part.start, part.start + part.length) for part in entry.slices]
    if found := flaw(entry.shape, ranges):
        raise CheckpointError(f"{what} is not whole: {found}")


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON, a line for each entry of dicts down to ``depth``; the rest is left to the fast encoder of C."""
    if not isinstance(value, dict) or not value or depth < 0:
        return json.dumps(value)
    inner = f"{indent} "
    entries = (f"{inner}{json.dumps(key)}: {_lines(item, depth - 1, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def _tail(text: bytes) -> bytes:
    return f',\n "sha256": "{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()


def _file_entry(name: str, entry: dict[str, Any]) -> FileEntry:
    if not FILE_NAME.fullmatch(name):
        raise ValueError(f"no checkpoint has a file {name!r}")
    found = FileEntry(**entry)
    if not 0 <= _integer(found.head_bytes) <= min(_integer(found.size_bytes), LARGEST_TEXT_BYTES):
        raise ValueError(f"head_bytes is {found.head_bytes}")
    return found


def _tensor_entry(entry: dict[str, Any], files: dict[str, FileEntry]) -> TensorEntry:
    item_bytes, shape = ITEM_BYTES[entry["dtype"]], tuple(map(_integer, entry["shape"]))
    if any(not 0 <= size < 2**63 for size in shape):
        raise ValueError(f"shape is {entry['shape']}")
    slices = []
    for part in entry["slices"]:
        box = tuple((_integer(start), _integer(stop)) for start, stop in part["box"])
        checksums = tuple(map(str, part["crc32"]))
        found = SliceEntry(**{**part, "box": box, "crc32": checksums})
        end = _integer(found.offset) + _integer(found.length) * item_bytes
        if not 0 <= found.offset <= end <= files[found.file].size_bytes:
            raise ValueError(f"a slice lies outside of {found.file}")
        if not 0 <= _integer(found.start) <= found.start + found.length <= num_elements(box):
            raise ValueError("a slice lies outside of its box")
        if len(checksums) != math.ceil(found.length * item_bytes / PIECE_BYTES):
            raise ValueError("the number of checksums of a slice is wrong")
        slices.append(found)
    return TensorEntry(entry["dtype"], shape, slices)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value
