"""The sleep loop: the walk over the visits of a batch, and the loss (method: paper section 3).

``visits.py`` says which window passes through which blocks how often; here it is done. One process walks all
visits in a row (``SleepModel.forward``); a stage of a pipeline holds a part of the blocks and takes the same
steps one by one (``Walk.visit``).

Shape letters: B batch, T tokens, D model width, W windows, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.memory import state_dtype
from sleeptrain.model.dropout import Dropout, token_keys
from sleeptrain.model.graphs import PassGraphs
from sleeptrain.model.halting import Halting, HaltingHead, Sleepers, Stop
from sleeptrain.model.hybrid import HybridStack
from sleeptrain.model.init import initialise
from sleeptrain.model.layers import RMSNorm, rotary_table
from sleeptrain.model.sizes import tokens_at_once
from sleeptrain.model.state import State, Tokens, reset
from sleeptrain.model.visits import Visit, Window, cut, loss_tokens, plan, require_passes, segments_of
from sleeptrain.model.window_state import Passes


class Batch(Protocol):
    """What the model reads of a batch (built in ``data/batch.py``); see there for shapes."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def valid(self) -> Tensor | None: ...
    @property
    def reset_state(self) -> Tensor | None: ...
    @property
    def example_keys(self) -> Tensor | None: ...
    @property
    def windows_with_loss(self) -> Sequence[bool]: ...


class Output(NamedTuple):
    """Summed loss over the masked targets, in nats, and per token ``[B, T]`` the loss and the most likely id.

    ``state`` is what the planned visits left. They end with the last loss unless the batch is continued; to
    go on reading use ``sleeptrain.model.session``. ``passes`` ``[B, windows slept on]``, with a stop rule: as
    many as each sequence made, reading included; where halting is learned and no rule is given, as it makes
    on average, with their gradient. 0 where a window holds none of its tokens. None in all other cases.
    """

    loss_sum: Tensor
    nll: Tensor
    predictions: Tensor
    state: State
    passes: Tensor | None = None


class PassTrace(NamedTuple):
    """Squared norms of the fast weights after a pass and of their change by it, ``[blocks, B]``, over the
    heads held here."""

    window: int
    pass_number: int
    norm: Tensor
    update: Tensor


class CrossEntropy(nn.Module):
    """What is asked of the logits ``[B, T, V]``, in one place for the sake of a vocabulary that is split."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Nats per token ``[B, T]``; may overwrite ``logits``."""
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def predict(self, logits: Tensor) -> Tensor:
        """The most likely ids ``[B, T]``."""
        return logits.argmax(-1)


class SleepModel(nn.Module):
    """Embedding, stack, final norm and head. N is an argument of ``forward``.

    ``held`` are the blocks of each segment that are here: all of them, or a stage's part, which may lack
    embedding and head, too.
    """

    def __init__(self, config: ModelConfig, sleep: SleepConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.sleep, self.vocab_size = config, sleep, vocab_size
        self.held, self.holds_embedding, self.holds_head = segments_of(config), True, True
        self.token_part = (0, 1)  # which part of the tokens h holds between blocks, of how many
        # Not drawn twice; on the meta device, the first draw would import the whole of torch.compile.
        self.embed = nn.Embedding.from_pretrained(torch.empty(vocab_size, config.d_model), freeze=False)
        self.stack = HybridStack(config)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps, config.zero_centred_norms)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.graphs: PassGraphs | None = None  # to replay the passes with; whoever trains the model sets it
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        if sleep.learned_initial_state:
            starts = enumerate(self.stack.initial_state(1))
            learned = {str(i): nn.Parameter(s.memory[0]) for i, s in starts if s.memory is not None}
            self.initial_memory = nn.ParameterDict(learned)
        if sleep.halting == "learned":
            self.halting_head = HaltingHead(config.d_model, config.norm_eps)
        initialise(self, config, seed)

    @property
    def dtype(self) -> torch.dtype:
        """Of losses, positions and fast weights: at least float32."""
        return state_dtype(next(self.parameters()).dtype)

    def initial_state(self, num_sequences: int) -> State:
        """The state before a sequence: zero or learned fast weights, nothing else."""
        state = self.stack.initial_state(num_sequences)
        if not self.sleep.learned_initial_state:
            return state
        learned = {int(i): p.expand(num_sequences, -1, -1, -1) for i, p in self.initial_memory.items()}
        return tuple(s._replace(memory=learned.get(i)) for i, s in enumerate(state))

    def halting(self, num_passes: int, stop: Stop | None) -> Halting:
        """What may end the passes over a window. Raises ConfigError for a rule that this model cannot
        follow."""
        if stop is not None:
            stop.check(self.sleep)
        head = self.halting_head if self.sleep.halting == "learned" else None
        return Halting(segments_of(self.config)["core"], num_passes, head, stop)

    def windows(self, batch: Batch) -> list[Window]:
        return cut(batch.ids.shape[1], self.sleep.window_tokens, batch.windows_with_loss)

    def forward(
        self,
        batch: Batch,
        num_passes: int,
        state: State | None = None,
        trace: list[PassTrace] | None = None,
        is_continued: bool = False,
        stop: Stop | None = None,
    ) -> Output:
        """Walks the visits of a batch from ``state`` on; ``trace`` collects the norms of S of every pass that
        writes it. ``is_continued``: the next batch starts from the state that this one leaves. ``stop``: a
        sequence may make fewer than N passes; without gradients only, else ValueError."""
        walk = Walk(self, batch, num_passes, state, trace, is_continued, stop)
        loss_sum, h = walk.nll.new_zeros(()), walk.nll  # the first visit reads the embeddings instead
        for index in range(len(walk.visits)):
            h, loss = walk.visit(index, h)
            loss_sum = loss_sum if loss is None else loss_sum + loss
        return Output(loss_sum, walk.nll, walk.predictions, walk.carry.passes.start, walk.passes_made)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Final norm and head, ``[B, T, V]`` in at least float32."""
        logits = self.head(self.final_norm(h_BTD))
        return logits.to(state_dtype(logits.dtype))

    def tokens(self, ids: Tensor, valid: Tensor | None, start: Tensor | int = 0) -> Tokens:
        """Positions of real tokens from ``start``, and what a mixer has to know beside."""
        if valid is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            positions = valid.cumsum(1) - 1
        positions = positions + start
        table = rotary_table(positions, self.config.rotary_dim, self.config.rope_theta, self.dtype)
        length = self.sleep.window_tokens or ids.shape[1]
        sliding = self.sleep.eviction == "sliding"
        return Tokens(positions, valid, table, length, sliding, self.sleep.carries_convolution)

    def run(
        self, h: Tensor, state: State, tokens: Tokens, visit: Visit, weights: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The blocks held here of one visit; recomputed in the backward pass as the config asks. ``weights``:
        those of ``graphs.begin()``, to replay them."""
        blocks, mode = self.held.get(visit.segment, range(0)), self.sleep.activation_checkpointing
        per_block = mode in ("block", "both")
        behind = range(blocks.stop, segments_of(self.config)[visit.segment].stop)
        is_read = visit.is_read or any(self.stack.remembers(i, tokens.keeps_cache) for i in behind)
        arguments = (h, state, tokens, blocks, is_read, per_block)
        is_kept = torch.is_grad_enabled() and visit.is_kept
        if weights is not None and not is_kept:
            assert self.graphs is not None
            return self.graphs.run(weights, *arguments)
        if mode in ("pass", "both") and torch.is_grad_enabled() and not is_kept:
            return checkpoint(self.stack, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self.stack(*arguments)


class Carry(NamedTuple):
    """All that one visit leaves to the next: what the blocks hold, what the core left to its next pass where
    the coda comes in between, and how far the sequences are that may stop."""

    passes: Passes
    core_left: Tensor | None = None
    sleepers: Sleepers | None = None


class Walk:
    """One batch on its way through the visits.

    What lasts is ``carry`` alone, so that a schedule may take other batches in between, and cut the gradient
    there. ``nll`` and ``predictions`` ``[B, T]`` fill up where the head is held (``predictions`` without
    gradients only), and ``passes_made`` ``[B, windows slept on]`` where sequences may stop.
    """

    def __init__(
        self,
        model: SleepModel,
        batch: Batch,
        num_passes: int,
        state: State | None = None,
        trace: list[PassTrace] | None = None,
        is_continued: bool = False,
        stop: Stop | None = None,
    ) -> None:
        require_passes(num_passes, model.config)
        if stop is not None and torch.is_grad_enabled():
            raise ValueError("a stop rule is for inference: call the model without gradients")
        self.model, self.batch, self.trace = model, batch, trace
        self.windows = model.windows(batch)
        self.visits = plan(self.windows, num_passes, model.config, model.sleep, is_continued)
        initial = model.initial_state(len(batch.ids)) if state is None else state
        self.carry = Carry(Passes.opening(initial))
        self.nll = torch.zeros(batch.ids.shape, dtype=model.dtype, device=batch.ids.device)
        self.predictions = torch.zeros_like(batch.ids)
        self.halting = model.halting(num_passes, stop)
        self.weights = None if model.graphs is None else model.graphs.begin()
        self.passes_made = batch.ids[:, :0] if self.halting.is_on else None

    def visit(self, index: int, arrived: Tensor) -> tuple[Tensor, Tensor | None]:
        """One visit: ``arrived`` is what the visit before left, or the stage before; returns what this one
        leaves, and the summed loss of its window where it has one and the head is here."""
        visit = self.visits[index]
        if index == 0 or self.visits[index - 1].window != visit.window:
            self._open(visit.window)
        left, loss = (arrived, None) if self._is_over(visit) else self._pass(index, arrived)
        if index + 1 == len(self.visits) or self.visits[index + 1].window != visit.window:
            self._close()
        return left, loss

    def _pass(self, index: int, arrived: Tensor) -> tuple[Tensor, Tensor | None]:
        visit = self.visits[index]
        awake = self.predicts and visit.pass_number == 1
        if self._starts_gradient(visit):
            self.carry = self.carry._replace(passes=self.carry.passes.cut_gradient())
        h = self._enter(index, arrived) if self.model.holds_embedding else arrived
        before = self.carry.passes.begin(visit.pass_number, awake)
        tokens = self.tokens._replace(dropout=self._dropout(index))
        learns = not visit.is_after_loss and (awake or visit.pass_number > self.num_cut)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            left, after = self.model.run(h, before, tokens, visit, self.weights)
            if self.trace is not None:
                self.trace += _norms(visit, before, after)
            if visit.segment == "core" and self.sleeps and self.halting.is_on:
                left, after = self._halt(visit, left, before, after)
        held = self.model.held.get(visit.segment, range(0))
        self.carry = self.carry._replace(passes=self.carry.passes.record(held, after))
        return left, self._loss(left) if visit.has_loss and self.model.holds_head else None

    def _halt(self, visit: Visit, left: Tensor, before: State, after: State) -> tuple[Tensor, State]:
        """After a pass of the core over a window slept on: what it leaves where sequences may stop."""
        sleepers, kept, valid = self.carry.sleepers, self.carry.passes.latest, self.tokens.valid
        if sleepers is None:
            left, after, sleepers = self.halting.begin(left, after, valid)
        else:
            states = (before, after, kept)
            left, after, sleepers = self.halting.go_on(visit.pass_number, sleepers, left, *states, valid)
        self.carry = self.carry._replace(sleepers=sleepers)
        return left, after

    def _is_over(self, visit: Visit) -> bool:
        """Whether all sequences have stopped before this pass."""
        sleepers = self.carry.sleepers
        if visit.segment != "core" or sleepers is None or self.halting.stop is None:
            return False
        return not bool(sleepers.moves.any())

    def _open(self, window: int) -> None:
        self.span = slice(self.windows[window].start, self.windows[window].stop)
        here = [visit for visit in self.visits if visit.window == window]
        self.predicts = any(visit.has_loss for visit in here)
        backprop, num_passes = self.model.sleep.backprop_passes, here[-1].pass_number
        self.num_cut = num_passes - backprop if backprop else 0
        self.sleeps = num_passes > 1
        batch = self.batch
        valid = None if batch.valid is None else batch.valid[:, self.span]
        self.tokens = self.model.tokens(batch.ids[:, self.span], valid)
        if batch.reset_state is not None:
            initial = self.model.initial_state(len(batch.ids))
            start = reset(self.carry.passes.start, batch.reset_state[:, window], initial)
            self.carry = Carry(Passes.opening(start))

    def _close(self) -> None:
        if self.passes_made is not None and self.carry.sleepers is not None:
            self.passes_made = torch.cat([self.passes_made, self.carry.sleepers.passes[:, None]], dim=1)
        self.carry = Carry(Passes.opening(self.carry.passes.end(self.tokens, self.model.sleep)))

    def _dropout(self, index: int) -> Dropout | None:
        """That of this visit: in training, which is where the batch has keys."""
        rate, keys = self.model.config.dropout, self.batch.example_keys
        if not rate or keys is None:
            return None
        num_tokens = self.span.stop - self.span.start
        return Dropout(rate, token_keys(keys, index, num_tokens, self.span.start), self.model.token_part)

    def _starts_gradient(self, visit: Visit) -> bool:
        return visit.segment == "core" and visit.pass_number == self.num_cut + 1 > 1

    def _enter(self, index: int, arrived: Tensor) -> Tensor:
        """What the first block of a visit reads."""
        visit, core_left = self.visits[index], self.carry.core_left
        if index == 0 or self.visits[index - 1].window != visit.window:
            return self.model.embed(self.batch.ids[:, self.span]).to(self.model.dtype)
        self.carry = self.carry._replace(core_left=arrived if visit.segment == "coda" else None)
        if visit.segment != "core" or visit.pass_number == 1:
            return arrived
        h = arrived if core_left is None else core_left
        h = self.model.final_norm(h) if self.model.sleep.norm_between_passes else h
        return h.detach() if self._starts_gradient(visit) else h

    def _loss(self, h: Tensor) -> Tensor:
        targets, mask = self.batch.targets[:, self.span], self.batch.loss_mask[:, self.span]
        size = tokens_at_once(len(h), self.model.vocab_size)
        is_split = h.shape[1] < targets.shape[1]  # over ranks; the head puts the tokens together
        if loss_tokens(self.windows) <= size or is_split:
            found = [self._predict(h, targets)]
        else:
            pieces = zip(h.split(size, dim=1), targets.split(size, dim=1))
            predict = partial(checkpoint, self._predict, use_reentrant=False, preserve_rng_state=False)
            found = [predict(part, ids) for part, ids in pieces]
        if not torch.is_grad_enabled():
            self.predictions[:, self.span] = torch.cat([ids for _, ids in found], dim=1)
        nll = torch.cat([nll for nll, _ in found], dim=1) * mask
        self.nll[:, self.span] = nll.detach()
        return nll.sum()

    def _predict(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nats per token ``[B, T]``, and without gradients the most likely ids."""
        logits, ids = self.model.logits(h), targets
        if not torch.is_grad_enabled():
            ids = self.model.cross_entropy.predict(logits)
        return self.model.cross_entropy(logits, targets), ids


def _norms(visit: Visit, before: State, after: State) -> list[PassTrace]:
    pairs = [
        (old.memory.detach(), new.memory.detach())
        for old, new in zip(before, after)
        if new.memory is not None and old.memory is not None and new.memory is not old.memory
    ]
    if not pairs:
        return []
    norm = torch.stack([new.flatten(1).square().sum(1) for _, new in pairs])
    update = torch.stack([(new - old).flatten(1).square().sum(1) for old, new in pairs])
    return [PassTrace(visit.window, visit.pass_number, norm, update)]
