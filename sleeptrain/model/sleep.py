"""The sleep loop: windows and passes as a list of visits, and the loss (method: paper section 3).

A sequence is cut into windows of at most L tokens. A window that the model sleeps on is passed over N times,
h and the fast weights both carried from pass to pass; at its end h and the KV cache are dropped and only the
state crosses the border. ``plan`` writes this down as data; ``SleepModel`` walks it. The pipeline and the
FLOP counter read the same list.

Shape letters: B batch, T tokens, D model width, W windows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.memory import state_dtype
from sleeptrain.model.hybrid import HybridStack
from sleeptrain.model.init import initialise
from sleeptrain.model.layers import RMSNorm, rotary_table
from sleeptrain.model.state import State, Tokens, reset
from sleeptrain.model.window_state import Passes
from sleeptrain.schema import ConfigError

Segment = Literal["prelude", "core", "coda"]


class Window(NamedTuple):
    """Tokens ``start..stop`` of each sequence, and whether any of them has a loss."""

    start: int
    stop: int
    has_loss: bool


class Visit(NamedTuple):
    """One trip of a window through a segment. ``has_loss``: the head reads the result; ``is_read``: somebody
    does; ``is_kept``: checkpointing per pass leaves its activations in memory."""

    window: int
    pass_number: int
    segment: Segment
    has_loss: bool
    is_read: bool
    is_kept: bool = False


class Batch(Protocol):
    """What the model reads of a batch (built in ``data/batch.py``); see there for shapes."""

    ids: Tensor
    targets: Tensor
    loss_mask: Tensor
    valid: Tensor | None
    reset_state: Tensor | None
    windows_with_loss: Sequence[bool]


class Output(NamedTuple):
    """Summed loss over the masked targets, in nats, and per token ``[B, T]`` the loss and the most likely id.

    ``state`` is what the planned visits left, which end with the last loss; to go on reading use
    ``sleeptrain.model.session``.
    """

    loss_sum: Tensor
    nll: Tensor
    predictions: Tensor
    state: State


class PassTrace(NamedTuple):
    """Norms of the fast weights after a pass and of their change by it, averaged over sequences and
    blocks."""

    window: int
    pass_number: int
    norm: Tensor
    update: Tensor


def require_passes(num_passes: int, config: ModelConfig) -> None:
    """Raises ConfigError for an N below 1, or above 1 where no looped block has fast weights to write."""
    if num_passes < 1:
        raise ConfigError(f"num_passes={num_passes} is below 1; reading a window is already pass 1")
    if num_passes > 1 and not any(block.is_fast_weight for block in config.core_blocks):
        raise ConfigError(
            f"num_passes={num_passes} needs a gdn or jet block among the looped blocks, and model.pattern="
            f"{config.pattern!r} has none there; use num_passes=1"
        )


def segments_of(config: ModelConfig) -> dict[Segment, range]:
    """Block ranges of the segments that hold any block."""
    core_stop = len(config.blocks) - config.coda_blocks
    ranges: dict[Segment, range] = {
        "prelude": range(0, config.prelude_blocks),
        "core": range(config.prelude_blocks, core_stop),
        "coda": range(core_stop, len(config.blocks)),
    }
    return {name: blocks for name, blocks in ranges.items() if blocks}


def cut(sequence_tokens: int, window_tokens: int, windows_with_loss: Sequence[bool]) -> list[Window]:
    """Windows of ``window_tokens`` (0: one single window), the last one as short as it comes."""
    length = window_tokens or sequence_tokens
    starts = range(0, sequence_tokens, length)
    return [Window(s, min(s + length, sequence_tokens), loss) for s, loss in zip(starts, windows_with_loss)]


def plan(
    windows: Sequence[Window],
    num_passes: int,
    config: ModelConfig,
    sleep: SleepConfig,
) -> list[Visit]:
    """The visits of a sequence in order, without those whose output and state nobody reads."""
    last_with_loss = max((i for i, w in enumerate(windows) if w.has_loss), default=-1)
    segments = segments_of(config)
    visits: list[Visit] = []
    for i, window in enumerate(windows[: last_with_loss + 1]):
        order = _passes(window, num_passes if i < last_with_loss else 1, sleep.schedule)
        steps = [(n, name) for n, name in order if name in segments]
        visits += _without_dead(i, steps, window.has_loss, segments, config, sleep.eviction == "sliding")
    return _with_kept(visits, windows, segments)


def _with_kept(visits: list[Visit], windows: Sequence[Window], segments: dict[Segment, range]) -> list[Visit]:
    """Marks the visits at the end: as many as hold together at most 1.5 times what the longest visit holds.

    Their backward pass comes before any visit is recomputed, so keeping them hardly raises the peak.
    """
    sizes = [(windows[v.window].stop - windows[v.window].start) * len(segments[v.segment]) for v in visits]
    room, marked = 1.5 * max(sizes, default=0), []
    for visit, size in zip(reversed(visits), reversed(sizes)):
        room -= size
        marked.append(visit._replace(is_kept=room >= 0))
    return marked[::-1]


def _passes(window: Window, num_passes: int, schedule: str) -> list[tuple[int, Segment]]:
    """(pass, segment) of a window that is followed by another one, dead visits included."""
    awake: list[tuple[int, Segment]] = [(1, "prelude"), (1, "core"), (1, "coda")]
    again: list[tuple[int, Segment]] = [(n, "core") for n in range(2, num_passes + 1)]
    if schedule == "predict_then_consolidate":
        return awake + again
    return awake if window.has_loss else [*awake[:2], *again, (num_passes, "coda")]


def _without_dead(
    index: int,
    steps: list[tuple[int, Segment]],
    has_loss: bool,
    segments: dict[Segment, range],
    config: ModelConfig,
    keeps_cache: bool,
) -> list[Visit]:
    """Walks a window's steps backward: a step stays if its output is read or it writes state."""
    blocks, kept = config.blocks, []
    core_is_read = False  # whether a later step of this window starts from what the core left
    head_step = max((k for k, (n, _) in enumerate(steps) if n == 1), default=-1) if has_loss else -1
    for k in reversed(range(len(steps))):
        pass_number, segment = steps[k]
        is_read = k == head_step or (segment != "coda" and core_is_read)
        if is_read or any(blocks[b].is_fast_weight or keeps_cache for b in segments[segment]):
            kept.append(Visit(index, pass_number, segment, k == head_step, is_read))
            core_is_read = True
    return kept[::-1]


class SleepModel(nn.Module):
    """Embedding, stack, final norm and head, and the walk over the visits. N is an argument of
    ``forward``."""

    def __init__(self, config: ModelConfig, sleep: SleepConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.sleep = config, sleep
        self.embed = nn.Embedding(vocab_size, config.d_model)
        self.stack = HybridStack(config)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        if sleep.learned_initial_state:
            starts = enumerate(self.stack.initial_state(1))
            learned = {str(i): nn.Parameter(s.memory[0]) for i, s in starts if s.memory is not None}
            self.initial_memory = nn.ParameterDict(learned)
        initialise(self, config, seed)

    def initial_state(self, num_sequences: int) -> State:
        """The state before a sequence: zero or learned fast weights, nothing else."""
        state = self.stack.initial_state(num_sequences)
        if not self.sleep.learned_initial_state:
            return state
        learned = {int(i): p.expand(num_sequences, -1, -1, -1) for i, p in self.initial_memory.items()}
        return tuple(s._replace(memory=learned.get(i)) for i, s in enumerate(state))

    def windows(self, batch: Batch) -> list[Window]:
        return cut(batch.ids.shape[1], self.sleep.window_tokens, batch.windows_with_loss)

    def forward(
        self,
        batch: Batch,
        num_passes: int,
        state: State | None = None,
        trace: list[PassTrace] | None = None,
    ) -> Output:
        """Walks the visits of a batch; ``trace`` collects the norms of S of every pass that writes it."""
        require_passes(num_passes, self.config)
        windows = self.windows(batch)
        visits = plan(windows, num_passes, self.config, self.sleep)
        state = self.initial_state(len(batch.ids)) if state is None else state
        nll = torch.zeros(
            batch.ids.shape, dtype=state_dtype(self.embed.weight.dtype), device=batch.ids.device
        )
        predictions = torch.zeros_like(batch.ids)
        loss_sum = nll.new_zeros(())
        for i, window in enumerate(windows):
            here = [visit for visit in visits if visit.window == i]
            if not here:  # nobody reads what it would leave
                continue
            span = slice(window.start, window.stop)
            if batch.reset_state is not None:
                state = reset(state, batch.reset_state[:, i], self.initial_state(len(batch.ids)))
            valid = None if batch.valid is None else batch.valid[:, span]
            h, state = self.run_window(batch.ids[:, span], valid, state, here, trace)
            if h is not None:
                logits = self.logits(h)
                losses = F.cross_entropy(
                    logits.flatten(0, 1), batch.targets[:, span].flatten(), reduction="none"
                )
                losses = losses.view_as(logits[..., 0]) * batch.loss_mask[:, span]
                loss_sum = loss_sum + losses.sum()
                nll[:, span], predictions[:, span] = losses.detach(), logits.argmax(-1)
        return Output(loss_sum, nll, predictions, state)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Final norm and head, ``[B, T, V]`` in at least float32."""
        logits = self.head(self.final_norm(h_BTD))
        return logits.to(state_dtype(logits.dtype))

    def run_window(
        self,
        ids: Tensor,
        valid: Tensor | None,
        start: State,
        visits: Sequence[Visit],
        trace: list[PassTrace] | None = None,
    ) -> tuple[Tensor | None, State]:
        """All visits of one window from the state at its start; returns what the head reads, and the state
        after."""
        tokens = self.tokens(ids, valid)
        passes = Passes(start, self.sleep)
        predicts = any(visit.has_loss for visit in visits)
        num_cut = visits[-1].pass_number - self.sleep.backprop_passes if self.sleep.backprop_passes else 0
        h, for_head, pass_number = self.embed(ids), None, 1
        for visit in visits:
            if visit.segment == "core" and visit.pass_number > pass_number:
                pass_number = visit.pass_number
                h = self.final_norm(h) if self.sleep.norm_between_passes else h
                if pass_number == num_cut + 1:
                    h = h.detach()
                    passes.cut_gradient()
            awake = predicts and visit.pass_number == 1
            before = passes.begin(visit.pass_number, awake)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (awake or visit.pass_number > num_cut)):
                left, after = self._visit(h, before, tokens, visit)
            passes.record(segments_of(self.config)[visit.segment], after)
            if trace is not None:
                trace += _norms(visit, before, after)
            h = left if visit.segment != "coda" else h
            for_head = left if visit.has_loss else for_head
        return for_head, passes.end(tokens)

    def tokens(self, ids: Tensor, valid: Tensor | None, start: Tensor | int = 0) -> Tokens:
        """Positions of real tokens from ``start``, and what a mixer has to know beside."""
        if valid is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            positions = valid.cumsum(1) - 1
        dtype = self.embed.weight.dtype
        table = rotary_table(positions + start, self.config.attention_head_dim, self.config.rope_theta, dtype)
        length = self.sleep.window_tokens or ids.shape[1]
        sliding = self.sleep.eviction == "sliding"
        return Tokens(positions + start, valid, table, length, sliding, self.sleep.carries_convolution)

    def _visit(self, h: Tensor, state: State, tokens: Tokens, visit: Visit) -> tuple[Tensor, State]:
        """One segment; recomputed in the backward pass per pass and per block as the config asks."""
        blocks = segments_of(self.config)[visit.segment]
        mode = self.sleep.activation_checkpointing
        per_block = mode in ("block", "both")

        def run(h: Tensor, state: State) -> tuple[Tensor, State]:
            if visit.is_read:
                return self.stack(h, state, tokens, blocks, per_block)
            return h, self.stack.write(h, state, tokens, blocks, per_block)

        if mode in ("pass", "both") and torch.is_grad_enabled() and not visit.is_kept:
            return checkpoint(run, h, state, use_reentrant=False, preserve_rng_state=False)
        return run(h, state)


def _norms(visit: Visit, before: State, after: State) -> list[PassTrace]:
    pairs = [
        (old.memory.detach(), new.memory.detach())
        for old, new in zip(before, after)
        if new.memory is not None and old.memory is not None and new.memory is not old.memory
    ]
    if not pairs:
        return []
    norm = torch.stack([new.flatten(1).norm(dim=1).mean() for _, new in pairs]).mean()
    update = torch.stack([(new - old).flatten(1).norm(dim=1).mean() for old, new in pairs]).mean()
    return [PassTrace(visit.window, visit.pass_number, norm, update)]
