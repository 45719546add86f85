"""A model that reads, sleeps by itself when its window is full, and writes: the Python interface.

from sleeptrain import Session

session = Session("runs/text", num_passes=4)       # a run folder, or one checkpoint
session.read("It was a dark and stormy night")
print(session.text(max_tokens=100, temperature=0.8, seed=1))
session.save("memory.safetensors")                 # what it remembers outlives the process
Session("runs/text").load("memory.safetensors")
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.config import GSMInfiniteConfig, TextConfig
from sleeptrain.engine.restored import restore
from sleeptrain.model import ragged
from sleeptrain.model import session as sessions
from sleeptrain.model.decoder import Decoder
from sleeptrain.model.halting import Stop
from sleeptrain.model.layers import cast_linear_maps
from sleeptrain.model.visits import require_passes
from sleeptrain.parallel.backend import autocast, compute_dtype
from sleeptrain.schema import ConfigError, RunError, to_dict
from sleeptrain.tasks.text_decoder import BROKEN, TextDecoder
from sleeptrain.tasks.tokenizer import Tokenizer, make_tokenizer

FORMAT = "sleeptrain memory 1"

Given = str | Sequence[int]


class Sleep(NamedTuple):
    """That it slept: how many tokens it had read before and the passes it made (reading is the first), of the
    sequences that slept those with the most, and for how long."""

    num_tokens: int
    num_passes: int
    seconds: float


class Session:
    """``num_sequences`` of any lengths, read side by side, with ``num_passes`` (None: as trained) in each
    sleep, or fewer once a pass changes the fast weights of a sequence by less than ``tolerance`` of their
    norm, or, where halting is learned, once the chance of having halted reaches ``halt_threshold`` (None:
    0.5).

    ``on_sleep`` hears of every sleep. Raises ConfigError or RunError where there is no usable checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        num_passes: int | None = None,
        num_sequences: int = 1,
        device: str = "auto",
        tolerance: float = 0.0,
        halt_threshold: float | None = None,
        on_sleep: Callable[[Sleep], None] = lambda sleep: None,
    ) -> None:
        found = restore(Path(checkpoint), device)
        self.config, self.model, self.device = found.config, found.backend.model, found.backend.device
        self.num_passes = num_passes or found.config.sleep.num_passes
        require_passes(self.num_passes, found.config.model)
        self.stop = Stop(tolerance, halt_threshold)
        self.stop.check(found.config.sleep)
        task = found.config.task
        self.tokenizer = (
            make_tokenizer(task.tokenizer, task.end_token)
            if isinstance(task, TextConfig | GSMInfiniteConfig) and task.tokenizer != "words"
            else None
        )
        self.on_sleep = on_sleep
        self._autocast = partial(autocast, found.config, self.device)
        if (dtype := compute_dtype(found.config, self.device)) != self.model.dtype:
            cast_linear_maps(self.model, dtype)
        self._identity = _identity(found.config.run.id, found.checkpoint.step, to_dict(found.config))
        self._decoder = self._make_decoder()
        self._resting = ragged.begin(self.model, num_sequences)
        self._read = torch.zeros(num_sequences, dtype=torch.long, device=self.device)
        self._next = torch.zeros(num_sequences, self.model.head.out_features, device=self.device)

    def _make_decoder(self) -> Decoder | None:
        """What reads the tokens that it writes itself; none for a window that never ends."""
        return Decoder(self.model, self._autocast) if self.model.sleep.window_tokens else None

    @property
    def _rows(self) -> ragged.Rows:
        """Where the sequences are, taken back from the decoder where it holds them."""
        if self._decoder is not None and self._decoder.holds_rows:
            self._resting = self._decoder.leave()
        return self._resting

    @_rows.setter
    def _rows(self, rows: ragged.Rows) -> None:
        if self._decoder is not None:
            self._decoder.drop()
        self._resting = rows

    @property
    def num_tokens(self) -> int:
        """Read so far, by the sequence that read most."""
        return int(self._read.max())

    @property
    def next_logits(self) -> Tensor:
        """What comes next, ``[B, V]``; zeros where a sequence has read nothing."""
        return self._next

    def fork(self, rows: Sequence[int]) -> "Session":
        """A session of these sequences, each as often as it is named, that remembers what they do now and
        goes on by itself. The weights are shared."""
        other, index = copy.copy(self), torch.tensor(rows, dtype=torch.long, device=self.device)
        other._resting = ragged.take(self._rows, index)
        other._decoder = self._make_decoder()
        other._read, other._next = self._read[index], self._next[index]
        return other

    def require_tokenizer(self, remedy: str = "give a checkpoint of task.name=text") -> Tokenizer:
        """Raises ConfigError, with this remedy, where the model has none."""
        if self.tokenizer is None:
            raise ConfigError(f"task.name={self.config.task.name} is no text; {remedy}")
        return self.tokenizer

    def read(self, tokens: Given | Sequence[Given] | Tensor, num_passes: int | None = None) -> None:
        """Reads a text or ids; for several sequences a list of such, or ids ``[B, T]``. However much that is,
        it takes no more memory than a window. Raises ConfigError for a text where the model has no tokenizer,
        and for ids that it does not know."""
        for _ in self._pieces(*self._ids(tokens), num_passes):
            pass

    def feed(self, tokens: Given | Sequence[Given] | Tensor, num_passes: int | None = None) -> Tensor:
        """The same, and returns all logits ``[B, T, V]``, zeros after the end of shorter sequences."""
        ids, lengths = self._ids(tokens)
        logits = self._next.new_zeros(*ids.shape, self._next.shape[1])
        for begun, counts, piece in self._pieces(ids, lengths, num_passes):
            for row, (start, count) in enumerate(zip(begun, counts)):
                logits[row, start : start + count] = piece[row, :count]
        return logits

    def _pieces(
        self, ids: Tensor, left: Tensor, num_passes: int | None
    ) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Reads until a window is full, sleeps, and goes on: where each row's piece begins, how long it is,
        and the logits of all."""
        begun = torch.zeros_like(left)
        while left.any():
            take = torch.minimum(left, ragged.room_tokens(self.model, self._rows))
            places = begun[:, None] + torch.arange(int(take.max()), device=self.device)
            part = ids.gather(1, places.clamp_max(ids.shape[1] - 1))
            with self._autocast():
                piece, self._rows = ragged.read(self.model, self._rows, part, take)
            newest = piece[torch.arange(len(take)), take - 1]
            self._next = torch.where((take > 0)[:, None], newest, self._next)
            self._read = self._read + take
            yield begun.tolist(), take.tolist(), piece
            begun, left = begun + take, left - take
            self._sleep_where_full(num_passes)

    def sleep(self, num_passes: int | None = None) -> None:
        """Passes 2..N over what is in the open windows, which is then forgotten but for what was written."""
        if self._rows.filled.any():
            self._sleep(self._rows.filled > 0, num_passes)

    def _sleep_where_full(self, num_passes: int | None) -> None:
        full = ragged.room_tokens(self.model, self._rows) == 0
        if full.any():
            self._sleep(full, num_passes)

    def _sleep(self, which: Tensor, num_passes: int | None) -> None:
        start, chosen = time.perf_counter(), num_passes or self.num_passes
        with self._autocast():
            self._rows, told = ragged.sleep(self.model, self._rows, which, chosen, self.stop)
        most = max((int(slept.passes.max()) for slept in told), default=1)
        self.on_sleep(Sleep(int(self._read[which].max()), most, time.perf_counter() - start))

    def generate(
        self, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[Tensor]:
        """The next ids ``[B]``, one after the other, each of them read before the next; greedy at temperature
        0. It ends early where every sequence has come to the end of its document."""
        if not self._read.all():
            raise ConfigError(
                "a sequence has read nothing yet, so there is nothing to go on from; feed a token first"
            )
        generator = torch.Generator(self.device).manual_seed(seed)
        end = self.model.head.out_features if self.tokenizer is None else self.tokenizer.end_id
        for _ in range(max_tokens):
            ids = choose(self._next, temperature, top_p, generator)
            self._read_one(ids)
            yield ids
            if bool((ids == end).all()):
                return

    def _read_one(self, ids: Tensor) -> None:
        """A token of each sequence ``[B]``, by the decoder where it can."""
        decoder = self._decoder
        if decoder is None or not (decoder.holds_rows or decoder.can_enter(self._rows)):
            self.read(ids[:, None])
            return
        if not decoder.holds_rows:
            decoder.enter(self._rows)
        self._next, self._read = decoder.read(ids), self._read + 1
        if not decoder.room_tokens:
            self._sleep_where_full(None)

    def text(self, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> str:
        """What one sequence writes."""
        return "".join(self.stream(max_tokens, temperature, top_p, seed))

    def stream(
        self, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[str]:
        """The same in pieces that are whole letters. Raises ConfigError where there is no tokenizer."""
        tokenizer = self.require_tokenizer("use generate, which gives ids")
        decoder = TextDecoder(tokenizer)
        for ids in self.generate(max_tokens, temperature, top_p, seed):
            yield decoder.feed([int(ids[0])])
        yield decoder.rest().rstrip(BROKEN)

    def save(self, path: str | Path) -> None:
        """Writes what it remembers to a file, whole or not at all. Raises OSError."""
        own = {"next": self._next, "filled": self._rows.filled, "read": self._read}
        tensors = sessions.to_tensors(self._rows.session) | own
        said = {"format": FORMAT, "identity": self._identity}
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
            following, filled, read = (tensors.pop(name) for name in ("next", "filled", "read"))
            rows = ragged.Rows(sessions.from_tensors(self.model, tensors), filled)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise RunError(
                f"memory {path} cannot be used ({error}); give one that this model saved"
            ) from error
        self._next, self._rows, self._read = following, rows, read
        return self

    def _ids(self, tokens: Given | Sequence[Given] | Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T]`` on the device, and the lengths ``[B]``."""
        several = isinstance(tokens, Tensor) and tokens.dim() == 2
        several |= not isinstance(tokens, str | Tensor) and any(not isinstance(part, int) for part in tokens)
        rows = [self._row(part) for part in (tokens if several else [tokens])]  # type: ignore[arg-type]
        if len(rows) != len(self._next):
            raise ConfigError(
                f"{len(rows)} sequences were given to a session of {len(self._next)}; give as many"
            )
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def _row(self, tokens: Given | Tensor) -> Tensor:
        if isinstance(tokens, str):
            tokenizer = self.require_tokenizer("give ids")
            tokens = torch.from_numpy(tokenizer.encode(tokens.encode()))
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
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
