"""The visits of a sequence: the sleep loop as data (method: paper section 3).

A sequence is cut into windows of at most L tokens. A window that the model sleeps on is passed over N times,
h and the fast weights both carried from pass to pass; at its end h and the KV cache are dropped and only the
state crosses the border. ``plan`` writes this down as a list; one process walks it, the pipeline walks it
over its stages, and the FLOP counter adds over it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.schema import ConfigError

Segment = Literal["prelude", "core", "coda"]


class Window(NamedTuple):
    """Tokens ``start..stop`` of each sequence, and whether any of them has a loss."""

    start: int
    stop: int
    has_loss: bool


class Visit(NamedTuple):
    """One trip of a window through a segment. ``has_loss``: the head reads the result; ``is_read``: somebody
    does; ``is_kept``: checkpointing per pass leaves its activations in memory; ``is_after_loss``: no loss
    comes in it or after it, so no gradient either."""

    window: int
    pass_number: int
    segment: Segment
    has_loss: bool
    is_read: bool
    is_kept: bool = False
    is_after_loss: bool = False


def loss_tokens(windows: Sequence[Window]) -> int:
    """Tokens of a sequence whose logits are asked for."""
    return sum(window.stop - window.start for window in windows if window.has_loss)


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
    is_continued: bool | None = None,
) -> list[Visit]:
    """The visits of a sequence in order, without those whose output and state nobody reads. ``is_continued``:
    the next batch reads the state at the end; None: as in training."""
    is_continued = sleep.carry_between_batches if is_continued is None else is_continued
    last_with_loss = max((i for i, w in enumerate(windows) if w.has_loss), default=-1)
    segments = segments_of(config)
    visits: list[Visit] = []
    for i, window in enumerate(windows if is_continued else windows[: last_with_loss + 1]):
        order = _passes(window, num_passes if is_continued or i < last_with_loss else 1, sleep.schedule)
        steps = [(n, name) for n, name in order if name in segments]
        visits += _without_dead(i, steps, window.has_loss, segments, config, sleep.eviction == "sliding")
    return _marked(visits, windows, segments)


def _marked(visits: list[Visit], windows: Sequence[Window], segments: dict[Segment, range]) -> list[Visit]:
    """Marks the visits after the last loss; and of those up to it the last ones as kept, as many as hold
    together at most 1.5 times what the longest visit holds.

    Their backward pass comes before any visit is recomputed, so keeping them hardly raises the peak.
    """
    sizes = [(windows[v.window].stop - windows[v.window].start) * len(segments[v.segment]) for v in visits]
    room, has_gradient, marked = 1.5 * max(sizes, default=0), False, []
    for visit, size in zip(reversed(visits), reversed(sizes)):
        has_gradient = has_gradient or visit.has_loss
        room -= size if has_gradient else 0
        marked.append(visit._replace(is_kept=has_gradient and room >= 0, is_after_loss=not has_gradient))
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
