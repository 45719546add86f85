"""Text to ids and back: bytes, or a Hugging Face ``tokenizer.json`` from a local folder, without network and
without code of others."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sleeptrain.schema import ConfigError
from sleeptrain.tasks.base import Ints

# The parts of a decoder that join all tokens, and those that take each by itself, or with those beside it.
FUSING = {"ByteLevel", "Fuse"}
APART = {"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece"}


class ByteTokenizer:
    """Ids are byte values."""

    sha256, end_id = "", 256

    def __init__(self) -> None:
        self.bytes_per_id = np.append(np.ones(256, dtype=np.int64), 0)

    def encode(self, text: bytes) -> Ints:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The end of a document is no text."""
        return bytes(i for i in ids if i < self.end_id)

    def is_text(self, i: int) -> bool:
        """Whether it stands for anything."""
        return i < self.end_id

    def settles(self, i: int) -> bool:
        """Whether the text up to it stays as it is whatever follows, but for a letter that is not whole."""
        return True


class FileTokenizer:
    """A Hugging Face ``tokenizer.json``, without its special tokens but the one that ends a document, if it
    has one for that; needs the ``tokenizers`` package."""

    def __init__(self, path: Path, end_token: str = "") -> None:
        if not path.is_file():
            raise ConfigError(f"task.tokenizer={path} is no file; give a tokenizer.json or use 'bytes'")
        from tokenizers import Tokenizer

        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(
                f"task.tokenizer={path} is no tokenizer.json ({error}); give another file or use 'bytes'"
            ) from error
        content = json.loads(self._tokenizer.to_str())
        kinds = _kinds(content["decoder"])
        self._falls_back, self._is_local = "ByteFallback" in kinds, _is_local(kinds)
        self.bytes_per_id = np.append(self._count_bytes(content), 0)
        self.end_id = len(self.bytes_per_id) - 1
        if end_token:
            found = self._tokenizer.token_to_id(end_token)
            if found is None:
                raise ConfigError(
                    f"task.end_token={end_token!r} is no token of {path}; give one, or leave it out"
                )
            self.bytes_per_id, self.end_id = self.bytes_per_id[:-1], found
            self.bytes_per_id[found] = 0

    def encode(self, text: bytes) -> Ints:
        decoded = text.decode(errors="replace")
        return np.array(self._tokenizer.encode(decoded, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The end of a document is no text."""
        known = [i for i in ids if i < len(self.bytes_per_id) and i != self.end_id]
        return str(self._tokenizer.decode(known, skip_special_tokens=False)).encode()

    def is_text(self, i: int) -> bool:
        """Whether it stands for anything."""
        return i != self.end_id and self._tokenizer.id_to_token(i) is not None

    def settles(self, i: int) -> bool:
        """Whether the text up to it stays as it is whatever follows, but for a letter that is not whole. Of
        bytes in a row that have no tokens of their own, one that is wrong spoils all; where parts of the
        decoder see all tokens as one text, nothing is sure before its end."""
        return self._is_local and not (self._falls_back and _is_byte(self._tokenizer.id_to_token(i) or ""))

    def _count_bytes(self, content: dict[str, Any]) -> Ints:
        """Bytes that each id stands for, [vocabulary]."""
        byte_level = any(_has_type(content.get(part), "ByteLevel") for part in ("pre_tokenizer", "decoder"))
        added = {token["id"] for token in content["added_tokens"]}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        counts = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
        for token, i in vocab.items():
            if byte_level and i not in added:
                counts[i] = len(token)  # one letter for each byte
            elif _is_byte(token):
                counts[i] = 1
            else:
                counts[i] = len(token.replace("▁", " ").encode())
        return counts


Tokenizer = ByteTokenizer | FileTokenizer


def make_tokenizer(name: str, end_token: str = "") -> Tokenizer:
    """``name``: 'bytes', or the path of a tokenizer.json or of the folder that holds it. Raises ConfigError
    where there is no such file, or no such token in it."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    return FileTokenizer(path / "tokenizer.json" if path.is_dir() else path, end_token)


def _is_byte(token: str) -> bool:
    """Whether it is a byte that has no token of its own."""
    return token.startswith("<0x") and len(token) == len("<0x00>")


def _is_local(kinds: Sequence[str]) -> bool:
    """Whether what a token stands for depends on the tokens beside it alone: on fused tokens no part of the
    decoder works but those that take something off the ends."""
    num_apart = next((n for n, kind in enumerate(kinds) if kind in FUSING), len(kinds))
    return set(kinds[:num_apart]) <= APART and set(kinds[num_apart + 1 :]) <= {"Fuse", "Strip"}


def _kinds(decoder: dict[str, Any] | None) -> list[str]:
    """The types of its parts, in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _kinds(part)]
    return [decoder["type"]]


def _has_type(component: Any, name: str) -> bool:
    """Whether a part of a tokenizer.json is, or is a sequence that holds, a component of this type."""
    if isinstance(component, dict):
        return component.get("type") == name or any(_has_type(value, name) for value in component.values())
    return isinstance(component, list) and any(_has_type(item, name) for item in component)
