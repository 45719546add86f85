"""Text: next-token prediction over a folder of text files, each file a document."""

import gzip
import hashlib
import sysconfig
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from sleeptrain.config import TextConfig
from sleeptrain.schema import ConfigError
from sleeptrain.tasks.base import Examples, Floats, Ints, Split, Task
from sleeptrain.tasks.counter import content_hash, in_split, random_below
from sleeptrain.tasks.tokenizer import ByteTokenizer, FileTokenizer, make_tokenizer

# Not the standard library's own source: installed packages, and tests, which some distributions leave out.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_LARGEST_LOSS_OF_BYTES = 0.01  # a tokenizer whose tokens stand for fewer bytes would flatter bits per byte

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class Document(NamedTuple):
    """A file, named by where it is below the folder, and the SHA-256 of its bytes, which decides its split
    and its place there."""

    path: Path
    name: str
    num_bytes: int
    sha256: str


class TextCrops(Task):
    """Crops of the documents of a split, each document followed by one end-of-document token (the last id).

    Training crops start anywhere; validation and test are cut into consecutive crops, and index i is crop i
    (modulo their number). There is one difficulty, 0. A crop may hold several documents; what the model
    remembers is not reset between them. Where the documents come from is the subclass's affair.

    Documents "ab" and "c" as bytes, with 256 for the end of a document, and the crops of 2 tokens at 0 and 2:

    >>> tokens = join_documents([b"ab", b"c"], ByteTokenizer())
    >>> tokens.tolist()
    [97, 98, 256, 99, 256]
    >>> ids, targets = crop(tokens, np.array([0, 2]), num_tokens=2)
    >>> ids.tolist(), targets.tolist()
    ([[97, 98], [256, 99]], [[98, 256], [99, 256]])
    """

    config: TextConfig
    difficulty_name = "all"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._tokenizer = make_tokenizer(config.tokenizer, config.end_token)
        self.vocab_size = len(self._tokenizer.bytes_per_id)
        self.difficulties = (0,)
        self._tokens_of: dict[Split, Tokens] = {}

    @abstractmethod
    def read_tokens(self, split: Split) -> Tokens:
        """All tokens of a split. Raises ConfigError if they are too few for one example or lose part of the
        text."""

    def examples(
        self, seed: int, indices: Ints, split: Split = "train", difficulty: int | None = None
    ) -> Examples:
        self.check_difficulty(difficulty, 0, 0)
        tokens, length = self.tokens(split), self.sequence_tokens
        if split == "train":
            starts = random_below(len(tokens) - length, seed, "text/train", indices, 1)[:, 0]
        else:
            starts = indices % self._num_crops(split) * length
        ids, targets = crop(tokens, starts, length)
        everywhere = np.ones(ids.shape, dtype=bool)
        return Examples(ids, targets, everywhere, everywhere.copy(), np.zeros(len(indices), dtype=np.int64))

    def score(self, predictions: Ints, nll: Floats, examples: Examples) -> dict[str, Floats]:
        """``nll``: nats per token; ``bits_per_byte``: bits over the bytes of text that the targets stand for.

        The end of a document costs bits and is no byte. The mean over examples is the figure of the whole
        split as far as examples stand for equally many bytes ('bytes': all but the few with ends).
        """
        total = nll.sum(axis=1, dtype=np.float64)
        num_bytes = self._tokenizer.bytes_per_id[examples.targets].sum(axis=1)
        return {
            "nll": total / self.sequence_tokens,
            "bits_per_byte": total / np.log(2) / np.maximum(num_bytes, 1),
        }

    def num_examples(self, split: Split) -> int | None:
        return None if split == "train" else self._num_crops(split)

    @property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer.json; empty for bytes."""
        return self._tokenizer.sha256

    @property
    def tokenizer_name(self) -> str:
        """What a resumed run must find the same: the hash of the tokenizer, or 'bytes'."""
        end = f" {self.config.end_token}" if self.config.end_token else ""
        return (self.tokenizer_sha256 or self.config.tokenizer) + end

    @property
    def end_id(self) -> int:
        """What follows each document."""
        return self._tokenizer.end_id

    def tokens(self, split: Split) -> Tokens:
        """All tokens of a split, read at the first call."""
        if split not in self._tokens_of:
            self._tokens_of[split] = self.read_tokens(split)
        return self._tokens_of[split]

    def _num_crops(self, split: Split) -> int:
        return (len(self.tokens(split)) - 1) // self.sequence_tokens


class Text(TextCrops):
    """The documents are the files of a folder. Each belongs to one split by its bytes; equal files count
    once."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._documents = _find_documents(config)
        for split in get_args(Split):  # no token is shorter than a byte: says so early where it is certain
            self._require_example(split, sum(d.num_bytes + 1 for d in self._documents[split]))

    def fingerprint(self) -> dict[str, str | int]:
        documents = [d for split in get_args(Split) for d in self._documents[split]]
        all_hashes = "".join(sorted(d.sha256 for d in documents))
        return {
            "name": self.config.name,
            "sequence_tokens": self.sequence_tokens,
            "num_files": len(documents),
            "num_bytes": sum(d.num_bytes for d in documents),
            "files_sha256": hashlib.sha256(all_hashes.encode()).hexdigest(),
            "tokenizer": self.tokenizer_name,
        }

    def documents(self, split: Split) -> list[Document]:
        """In an order that depends on their bytes alone."""
        return self._documents[split]

    def read(self, document: Document) -> Tokens:
        """The ids of a document, without an end; raises ConfigError if its file changed since."""
        text = document.path.read_bytes()
        if hashlib.sha256(text).hexdigest() != document.sha256:
            raise ConfigError(
                f"task.folder={self.config.folder}: {document.name} changed while it was in use; start again"
            )
        return _narrow(self._tokenizer.encode(text), self.vocab_size)

    def marks(self, split: Split) -> dict[str, float]:
        """What ``gzip -9`` needs for the files of a split, each on its own."""
        texts = [d.path.read_bytes() for d in self._documents[split]]
        compressed_bits = 8 * sum(len(gzip.compress(text, 9)) for text in texts)
        return {"bits_per_byte of gzip -9": compressed_bits / sum(map(len, texts))}

    def read_tokens(self, split: Split) -> Tokens:
        tokens = join_documents([d.path.read_bytes() for d in self._documents[split]], self._tokenizer)
        self._require_example(split, len(tokens))
        self._require_bytes(split, tokens)
        return tokens

    def _require_example(self, split: Split, num_tokens: int) -> None:
        if num_tokens <= self.sequence_tokens:
            raise ConfigError(
                f"task.folder={self.config.folder} has {len(self._documents[split])} files with at most "
                f"{num_tokens} tokens in the {split} split, too few for task.sequence_tokens="
                f"{self.sequence_tokens} and one more; add files (a file belongs to one split as a whole) or "
                "lower task.sequence_tokens"
            )

    def _require_bytes(self, split: Split, tokens: Tokens) -> None:
        bytes_per_id = self._tokenizer.bytes_per_id
        chunk = 2**20  # a whole corpus at once would take 8 bytes a token
        counted = sum(int(bytes_per_id[tokens[i : i + chunk]].sum()) for i in range(0, len(tokens), chunk))
        actual = sum(d.num_bytes for d in self._documents[split])
        if abs(counted - actual) > _LARGEST_LOSS_OF_BYTES * actual:
            raise ConfigError(
                f"task.tokenizer={self.config.tokenizer} turns the {actual} bytes of the {split} split into "
                f"tokens that stand for {counted}, so bits per byte would be wrong; use 'bytes' or a "
                "byte-level tokenizer"
            )


def join_documents(texts: list[bytes], tokenizer: ByteTokenizer | FileTokenizer) -> Tokens:
    """The ids of all texts in one array, each text followed by the end-of-document id."""
    end, vocab_size = tokenizer.end_id, len(tokenizer.bytes_per_id)
    return np.concatenate([_narrow(np.append(tokenizer.encode(text), end), vocab_size) for text in texts])


def _narrow(ids: Ints, vocab_size: int) -> Tokens:
    """In a quarter or half of the bytes, so that corpora stay in memory."""
    return ids.astype(np.uint16) if vocab_size <= 2**16 else ids.astype(np.uint32)


def crop(tokens: Tokens, starts: Ints, num_tokens: int) -> tuple[Ints, Ints]:
    """Inputs and next-token targets, int64 [B, num_tokens], of the crops that start at ``starts`` [B]."""
    places = starts[:, None] + np.arange(num_tokens + 1)
    pieces = tokens[places].astype(np.int64)
    return pieces[:, :-1], pieces[:, 1:]


def _find_documents(config: TextConfig) -> dict[Split, list[Document]]:
    """The files of each split, without empty ones and repetitions, in the order of their hash."""
    is_stdlib = config.folder == "stdlib"
    folder = Path(sysconfig.get_path("stdlib") if is_stdlib else config.folder)
    if not folder.is_dir():
        raise ConfigError(f"task.folder={config.folder} is no folder; give one with text files, or 'stdlib'")
    suffixes = (".py",) if is_stdlib else config.suffixes
    by_hash: dict[str, Document] = {}
    for path in _walk(folder, skip=_NOT_STDLIB if is_stdlib else set()):
        text = path.read_bytes() if path.name.endswith(suffixes) else b""
        if text:
            sha256 = hashlib.sha256(text).hexdigest()
            name = path.relative_to(folder).as_posix()
            by_hash.setdefault(sha256, Document(path, name, len(text), sha256))
    if not by_hash:
        raise ConfigError(
            f"task.folder={config.folder} holds no file with text that ends in {', '.join(suffixes)}; "
            "change task.folder or task.suffixes"
        )
    ordered = [by_hash[sha256] for sha256 in sorted(by_hash)]
    hashes = content_hash(np.array([int(d.sha256[:16], 16) for d in ordered], dtype=np.uint64))
    return {
        split: [d for d, chosen in zip(ordered, in_split(hashes, split)) if chosen]
        for split in get_args(Split)
    }


def _walk(folder: Path, skip: set[str]) -> Iterator[Path]:
    """Every file below ``folder``, without folders that are links or named in ``skip``, by path."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink() and path.name not in skip:
            yield from _walk(path, skip)
