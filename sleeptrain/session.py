"""A model that reads, sleeps by itself when its window is full, and writes: the Python interface.

from sleeptrain import Session

session = Session("runs/text", num_passes=4)       # a run folder, or one checkpoint
session.feed("It was a dark and stormy night")
print(session.text(max_tokens=100, temperature=0.8, seed=1))
session.save("memory.safetensors")                 # what it remembers outlives the process
Session("runs/text").load("memory.safetensors")
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.config import TextConfig
from sleeptrain.engine.restored import restore
from sleeptrain.model import session as sessions
from sleeptrain.model.visits import require_passes
from sleeptrain.schema import ConfigError, RunError, to_dict
from sleeptrain.tasks.text import make_tokenizer

FORMAT = "sleeptrain memory 1"


class Sleep(NamedTuple):
    """That it slept: how many tokens it had read before, the passes of the sequence that made most of them
    (reading is the first), and for how long."""

    num_tokens: int
    num_passes: int
    seconds: float


class Session:
    """``num_sequences`` that are read side by side, with ``num_passes`` (None: as trained) in each sleep, or
    fewer once a pass changes the fast weights of a sequence by less than ``tolerance`` of their norm.

    ``on_sleep`` hears of every sleep. Raises ConfigError or RunError where there is no usable checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        num_passes: int | None = None,
        num_sequences: int = 1,
        device: str = "auto",
        tolerance: float = 0.0,
        on_sleep: Callable[[Sleep], None] = lambda sleep: None,
    ) -> None:
        found = restore(Path(checkpoint), device)
        self.config, self.model, self.device = found.config, found.backend.model, found.backend.device
        self.num_passes = num_passes or found.config.sleep.num_passes
        require_passes(self.num_passes, found.config.model)
        self.tolerance = tolerance
        task = found.config.task
        self.tokenizer = make_tokenizer(task) if isinstance(task, TextConfig) else None
        self.on_sleep, self.num_tokens = on_sleep, 0
        self._backend = found.backend
        self._identity = _identity(found.config.run.id, found.checkpoint.step, to_dict(found.config))
        self._session = sessions.begin(self.model, num_sequences)
        self._next = torch.zeros(num_sequences, self.model.head.out_features, device=self.device)

    def feed(self, tokens: str | Sequence[int] | Tensor, num_passes: int | None = None) -> Tensor:
        """Reads a text, ids, or ids ``[B, T]``; returns logits ``[B, T, V]``. Raises ConfigError for a text
        where the model has no tokenizer, and for ids that it does not know."""
        ids, logits = self._ids(tokens), []
        while ids.shape[1]:
            room = sessions.room_tokens(self.model, self._session)
            with self._backend.autocast():
                more, self._session = sessions.read(self.model, self._session, ids[:, :room])
            self.num_tokens += more.shape[1]
            logits.append(more)
            ids = ids[:, room:]
            if sessions.is_full(self.model, self._session):
                self.sleep(num_passes)
        if not logits:
            return self._next[:, None][:, :0]
        self._next = logits[-1][:, -1]
        return torch.cat(logits, dim=1)

    def sleep(self, num_passes: int | None = None) -> None:
        """Passes 2..N over what is in the open window, which is then forgotten but for what was written."""
        start, chosen = time.perf_counter(), num_passes or self.num_passes
        with self._backend.autocast():
            slept = sessions.sleep_until_settled(self.model, self._session, chosen, self.tolerance)
        self._session, used = slept
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.on_sleep(Sleep(self.num_tokens, int(used.max()), time.perf_counter() - start))

    def generate(
        self, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[Tensor]:
        """The next ids ``[B]``, one after the other, each of them read before the next; greedy at temperature
        0. It ends early where every sequence has come to the end of its document."""
        if not self.num_tokens:
            raise ConfigError("nothing was read yet, so there is nothing to go on from; feed a token first")
        generator = torch.Generator(self.device).manual_seed(seed)
        end = self.model.head.out_features if self.tokenizer is None else len(self.tokenizer.bytes_per_id) - 1
        for _ in range(max_tokens):
            ids = choose(self._next, temperature, top_p, generator)
            self.feed(ids[:, None])
            yield ids
            if bool((ids == end).all()):
                return

    def text(self, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> str:
        """What one sequence writes."""
        return "".join(self.stream(max_tokens, temperature, top_p, seed))

    def stream(
        self, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[str]:
        """The same in pieces that are whole letters. Raises ConfigError where there is no tokenizer."""
        if self.tokenizer is None:
            raise ConfigError(f"task.name={self.config.task.name} is no text; use generate, which gives ids")
        written: list[int] = []
        told = ""
        for ids in self.generate(max_tokens, temperature, top_p, seed):
            written.append(int(ids[0]))
            whole = self.tokenizer.decode(written).decode(errors="replace").rstrip("\ufffd")
            yield whole[len(told) :]
            told = whole

    def save(self, path: str | Path) -> None:
        """Writes what it remembers to a file, whole or not at all. Raises OSError."""
        tensors = sessions.to_tensors(self._session) | {"next": self._next}
        said = {"format": FORMAT, "identity": self._identity, "num_tokens": self.num_tokens}
        plain = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}  # none shared
        replace_file(Path(path), safetensors.torch.save(plain, {"sleeptrain": json.dumps(said)}))

    def load(self, path: str | Path) -> "Session":
        """Goes on from a file. Raises RunError where it is damaged, or was written by another model."""
        try:
            with safetensors.safe_open(str(path), "pt", device=str(self.device)) as file:
                said = json.loads((file.metadata() or {}).get("sleeptrain", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if said.get("format") != FORMAT or said.get("identity") != self._identity:
                raise ValueError("another model, or another checkpoint of it, wrote it")
            following = tensors.pop("next")
            self._session = sessions.from_tensors(self.model, tensors)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise RunError(
                f"memory {path} cannot be used ({error}); give one that this model saved"
            ) from error
        self._next, self.num_tokens = following, int(said["num_tokens"])
        return self

    def _ids(self, tokens: str | Sequence[int] | Tensor) -> Tensor:
        """``[B, T]`` on the device."""
        if isinstance(tokens, str):
            if self.tokenizer is None:
                raise ConfigError(f"task.name={self.config.task.name} is no text; give ids")
            tokens = self.tokenizer.encode(tokens.encode()).tolist()
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        ids = ids[None] if ids.dim() == 1 else ids
        if len(ids) != len(self._next):
            raise ConfigError(
                f"{len(ids)} sequences were given to a session of {len(self._next)}; give as many"
            )
        vocab_size = self.model.head.out_features
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ConfigError(f"an id is not in 0..{vocab_size - 1}, which is all that the model knows")
        return ids


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Ids ``[B]`` from logits ``[B, V]``: the most likely at ``temperature`` 0, else drawn from the fewest
    most likely ids whose probabilities add up to ``top_p``. Raises ConfigError for a value out of range."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"temperature={temperature} must be at least 0 and top_p={top_p} in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1)
    shares, order = torch.softmax(logits.double() / temperature, -1).sort(
        dim=-1, descending=True, stable=True
    )
    before = shares.cumsum(-1) - shares
    shares = torch.where(before < top_p, shares, 0.0)
    drawn = torch.multinomial(shares, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def _identity(run_id: str, step: int, config: dict[str, object]) -> str:
    """Of the weights that wrote a memory: nobody else can read it."""
    named = {"run": run_id, "step": step, "model": config["model"], "sleep": config["sleep"]}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
