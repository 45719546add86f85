"""A Hugging Face folder on this disk: its config.json, and its tensors one by one.

Safetensors alone are read: nothing is unpickled, no code of the folder is run, nothing is fetched.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from sleeptrain.checkpoint.manifest import LARGEST_TEXT_BYTES
from sleeptrain.schema import ConfigError

INDEX, CONFIG, CARD = "model.safetensors.index.json", "config.json", "README.md"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_LICENCE_FILE = re.compile(r"(LICENSE|LICENCE|NOTICE)[\w.-]*", re.IGNORECASE)


class Found(NamedTuple):
    """A tensor of the folder: its file, shape, and type as torch calls it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class Folder:
    """``tensors`` by name. Raises ConfigError in one sentence for what cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ConfigError(f"source={path} is no folder; give one that holds config.json and safetensors")
        self.config = self._json(CONFIG)
        self.tensors: dict[str, Found] = {}
        for file in self._files():
            self._read_header(file)

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        file = self.tensors[name].file
        with _opened(self.path / file) as opened:
            return opened.get_tensor(name)

    @property
    def name(self) -> str:
        """As its makers call it where the config.json says so, and says no path; else the folder's own."""
        said = self.config.get("_name_or_path")
        if isinstance(said, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", said):
            return said
        return self.path.resolve().name

    def end_token(self) -> str:
        """With which documents end: that of the tokenizer's settings, empty where they name none."""
        if not (self.path / "tokenizer_config.json").is_file():
            return ""
        said = self._json("tokenizer_config.json").get("eos_token") or ""
        return str(said.get("content", "") if isinstance(said, dict) else said)

    def licence(self) -> str | None:
        """As the model card names it, or the first line of a licence file; None where nothing is said."""
        card = self.path / CARD
        said = _front_matter(card.read_text(errors="replace")) if card.is_file() else {}
        if "license" in said:
            return said.get("license_name") or said["license"]
        for path in side_files(self.path):
            if _LICENCE_FILE.fullmatch(path.name):
                lines = path.read_text(errors="replace").split("\n")
                return next((line.strip() for line in lines if line.strip()), None)
        return None

    def _files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            named = self._json(INDEX).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise ConfigError(f"{self.path}/{INDEX} has no weight_map; give a complete folder")
            files = sorted(set(named.values()))
        else:
            files = sorted(path.name for path in self.path.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for path in self.path.glob("*.bin")) or ["nothing"]
            raise ConfigError(
                f"source={self.path} holds {pickled[0]} and no safetensors; pickles can run code and are not "
                "read: load them where you trust them, and write them with save_pretrained(FOLDER)"
            )
        for file in files:
            if Path(file).name != file or not (self.path / file).is_file():
                raise ConfigError(f"{self.path}/{INDEX} names {file!r}, which is no file beside it; fetch it")
        return files

    def _read_header(self, file: str) -> None:
        with _opened(self.path / file) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ConfigError(
                        f"{self.path}/{file}: {name} is of type {part.get_dtype()}; give weights that are "
                        "not quantised"
                    )
                if name in self.tensors:
                    raise ConfigError(
                        f"{self.path}: {name} is in {self.tensors[name].file} and in {file}; leave one out"
                    )
                self.tensors[name] = Found(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            if path.stat().st_size > LARGEST_TEXT_BYTES:
                raise ValueError("it is too long")
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it is no object")
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); give a complete folder") from error
        return found


def side_files(path: Path) -> list[Path]:
    """Of a folder's tokenizer, and its licence."""
    names = sorted(found.name for found in path.iterdir() if found.is_file())  # links too: caches hold them
    return [path / name for name in names if name in TOKENIZER_FILES or _LICENCE_FILE.fullmatch(name)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(str(path), "pt") as opened:
            yield opened
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); fetch it again") from error


def _front_matter(text: str) -> dict[str, str]:
    """The plain ``key: value`` lines between the first two lines of dashes of a model card."""
    match = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    lines = match[1].split("\n") if match else []
    pairs = (line.split(":", 1) for line in lines if re.match(r"[\w-]+:", line))
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs}
