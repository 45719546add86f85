"""What ``dry_run=true`` prints before anything is trained: the model, the plan of visits, the cost over N."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from sleeptrain.config import Config
from sleeptrain.data.mixture import Mixture
from sleeptrain.data.stream import TrainStream
from sleeptrain.engine.retrofit import budget_lines
from sleeptrain.model import flops
from sleeptrain.model.visits import Visit, Window, cut, plan, segments_of
from sleeptrain.optim.schedule import num_passes_at
from sleeptrain.parallel.check import check_degrees
from sleeptrain.parallel.layout import Share, blocks_of_stage, model_of_rank, shares_of_stage
from sleeptrain.parallel.rank_memory import rank_bytes
from sleeptrain.tasks import Task


def plan_report(config: Config, task: Task, mixture: Mixture | None = None) -> str:
    """Data, parameters, windows, visits at the training N, cost over N, memory, schedules: text under 100
    columns.

    The window plan is that of the run's first batch; a pad counts as a token.
    """
    if mixture and mixture.is_packed:
        has_loss: Sequence[bool] = (True,) * -(-task.sequence_tokens // config.window_tokens)
    else:
        seed, data, length = config.run.seed, config.data, config.sleep.window_tokens
        has_loss = TrainStream(task, seed, data.batch_sequences, length).batch(0).windows_with_loss
    windows = cut(task.sequence_tokens, config.sleep.window_tokens, has_loss)
    vocab_size, parallel = config.model.rounded_vocab(task.vocab_size), config.parallel
    sections = [
        *([_sources(config, mixture)] if mixture else []),
        _parameters(config, vocab_size),
        _windows(config, windows),
        _costs(config, windows, vocab_size),
        _memory(config, vocab_size),
    ]
    if not parallel.is_local:
        world_size = parallel.tensor_size * parallel.pipeline_size * (parallel.data_size or 1)
        replicas = check_degrees(config, vocab_size, task.sequence_tokens, world_size)
        sections.append(rank_table(config, vocab_size, windows, replicas))
    sections.append(_schedules(config, windows, vocab_size))
    return "\n\n".join("\n".join(lines) for lines in sections)


def rank_table(config: Config, vocab_size: int, windows: Sequence[Window], replicas: int) -> list[str]:
    """What each rank holds and needs: a line per pipeline stage, whose ranks are all alike."""
    parallel = config.parallel
    rows = [
        ["stage", "blocks", "beside", "parameters", "S", "weights", "gradients", "optimizer"],
        ["", "", "", "", "B/seq.", "B", "B", "B"],
    ]
    needs = [["stage", "activations", "messages", "update", "fullest moment"], ["", "B", "B", "B", "B"]]
    for stage in range(parallel.pipeline_size):
        shares = shares_of_stage(config, vocab_size, stage)
        memory = rank_bytes(config, vocab_size, windows, replicas, stage)
        state = flops.state_bytes(model_of_rank(config, stage))
        rows.append([f"{stage}", _blocks(config, stage), ", ".join(_ends(shares)) or "-"])
        sizes = (sum(share.num_elements for share in shares), state, memory.weights, memory.gradients)
        rows[-1] += [human(size) for size in (*sizes, memory.masters + memory.optimizer)]
        last = (memory.activations, memory.messages, memory.update, memory.total)
        needs.append([f"{stage}", *(human(size) for size in last)])
    degrees = f"tensor {parallel.tensor_size} x pipeline {parallel.pipeline_size} x data {replicas}"
    return [
        f"ranks: {degrees}, ZeRO {parallel.zero_stage}; those of a stage are alike",
        *_table(rows, num_left=3),
        *_table(needs),
        "  optimizer: moments and DeepSpeed's copy of the weights; fullest moment: all that lasts, messages,",
        "  and activations or update, whichever is more",
    ]


def _blocks(config: Config, stage: int) -> str:
    """``prelude 0, core 1-2``, of the blocks that any segment has here."""
    here = blocks_of_stage(config.model, stage, config.parallel.pipeline_size)
    return ", ".join(f"{name} {_span(b.start, b.stop - 1)}" for name, b in here.items() if b)


def _ends(shares: Sequence[Share]) -> list[str]:
    names = {share.name.split(".")[0] for share in shares}
    return [part for part in ("embed", "final_norm", "head") if part in names]


def window_notation(windows: list[Window]) -> str:
    """``24x4/4``: four windows of 24 tokens and a last one of 4; ``24x4``: four windows."""
    lengths = [window.stop - window.start for window in windows]
    num_full = lengths.count(lengths[0])
    ragged = f"/{lengths[-1]}" if num_full < len(lengths) else ""
    return f"{lengths[0]}x{num_full}{ragged}"


def human(number: float) -> str:
    """Three digits and a decimal prefix: 1234567 -> ``1.23 M``."""
    prefixes = ["", " K", " M", " G", " T", " P", " E"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g}{prefixes[0]}"


def _table(rows: list[list[str]], num_left: int = 1) -> list[str]:
    """Aligned lines, headings first; the first ``num_left`` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            ["", *(c.ljust(w) if i < num_left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))]
        ).rstrip()
        for row in rows
    ]


def _sources(config: Config, mixture: Mixture) -> list[str]:
    """How often the run reads each source; pads between packed documents are not counted."""
    drawn = float(config.optim.num_steps * config.data.batch_sequences)
    sources = list(zip(mixture.urls, mixture.indexes, mixture.shares))
    if mixture.is_packed:
        mean_tokens = sum(share * index.num_tokens / index.num_samples for _, index, share in sources)
        drawn *= mixture.row_tokens / mean_tokens
    rows = [["source", "shards", "samples", "tokens", "share", "epochs of the run"]]
    for url, index, share in sources:
        counts = [human(len(index.shards)), human(index.num_samples)]
        tokens = human(index.num_tokens) if index.shards[0].is_made else "to be made"
        rows.append([url, *counts, tokens, f"{share:.1%}", f"{share * drawn / index.num_samples:.3g}"])
    kind = "documents, packed from window borders on" if mixture.is_packed else "examples"
    return [f"data: {kind}, by {mixture.num_streams} streams", *_table(rows)]


def _parameters(config: Config, vocab_size: int) -> list[str]:
    parts = flops.count_parameters(config.model, config.sleep, vocab_size)
    rows = [[name, human(size)] for name, size in parts._asdict().items()]
    ranges = ", ".join(f"{name} {len(blocks)}" for name, blocks in segments_of(config.model).items())
    return [
        f"model: width {config.model.d_model}, blocks {ranges}, vocabulary {vocab_size}",
        *_table([["part", "parameters"], *rows, ["total", human(sum(parts))]]),
        *(f"  {line}" for line in budget_lines(config, vocab_size)),
    ]


def _windows(config: Config, windows: list[Window]) -> list[str]:
    num_passes = config.sleep.num_passes
    visits = plan(windows, num_passes, config.model, config.sleep)
    rows = [["window", "tokens", "role", "passes", "dropped"]]
    for i, window in enumerate(windows):
        here = [visit for visit in visits if visit.window == i]
        span, dropped = f"{window.start}..{window.stop - 1}", _dropped(config, window, here)
        rows.append([str(i + 1), span, _role(window, here), _passes(here), dropped])
    return [
        f"windows {window_notation(windows)}, {config.sleep.eviction} eviction; visits at N = {num_passes}",
        *_table(rows, num_left=5),
    ]


def _role(window: Window, visits: list[Visit]) -> str:
    if not visits:
        return "not run"
    sleeps = not window.has_loss or visits[-1].pass_number > 1
    return ", ".join(["predicts"] * window.has_loss + ["sleeps"] * sleeps)


def _passes(visits: list[Visit]) -> str:
    """``prelude 1, core 1-3, coda 3``"""
    runs = [(name, [v.pass_number for v in run]) for name, run in groupby(visits, lambda v: v.segment)]
    return ", ".join(f"{name} {_span(numbers[0], numbers[-1])}" for name, numbers in runs)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _dropped(config: Config, window: Window, visits: list[Visit]) -> str:
    """What the plan leaves out of a window because nobody reads it, beside the head of a sleeping one."""
    if not visits:
        return "all"
    items: list[str] = [name for name in segments_of(config.model) if name not in {v.segment for v in visits}]
    num_passes, last = config.sleep.num_passes, visits[-1].pass_number
    if window.has_loss and config.sleep.schedule == "predict_then_consolidate" and last < num_passes:
        items.append(f"passes {_span(last + 1, num_passes)}")
    items += [f"end of {visit.segment} {visit.pass_number}" for visit in visits if not visit.is_read]
    return ", ".join(items)


def _shown_passes(config: Config) -> list[int]:
    """Every N of training and evaluation, and 1..4 where the model can sleep."""
    if not any(spec.is_fast_weight for spec in config.model.core_blocks):
        return [1]
    return sorted({1, 2, 3, 4, config.sleep.num_passes, *config.eval.num_passes})


def _costs(config: Config, windows: list[Window], vocab_size: int) -> list[str]:
    num_tokens = windows[-1].stop
    rows = [
        ["N", "visits", "forward", "training", "as run", "R(N)", "activations", "per pass"],
        ["", "/sequence", "FLOP/token", "FLOP/token", "FLOP/token", "", "B/sequence", "B/sequence"],
    ]
    for n in _shown_passes(config):
        visits = plan(windows, n, config.model, config.sleep)
        cost = flops.training_flops(config.model, config.sleep, windows, visits, vocab_size)
        ratio = flops.pass_ratio(config.model, config.sleep, windows, vocab_size, n)
        activations = [
            flops.activation_bytes(config.model, config.sleep, windows, visits, vocab_size, per_pass)
            for per_pass in (False, True)
        ]
        per_token = [human(value / num_tokens) for value in cost]
        rows.append([f"{n}", f"{len(visits)}", *per_token, f"{ratio:.2f}", *map(human, activations)])
    return [
        "cost over N; R(N): training FLOPs against N = 1; per pass: activations checkpointed so",
        *_table(rows),
        f"  as run: with sleep.activation_checkpointing={config.sleep.activation_checkpointing}",
        f"  {_parts(config, windows, vocab_size)}",
    ]


def _parts(config: Config, windows: list[Window], vocab_size: int) -> str:
    """``forward at N = 2: linear 90 %, ...``"""
    n = config.sleep.num_passes
    visits = plan(windows, n, config.model, config.sleep)
    parts = flops.forward_flops(config.model, config.sleep, windows, visits, vocab_size)
    shares = [f"{name} {100 * part / sum(parts):.0f} %" for name, part in parts._asdict().items()]
    return f"forward at N = {n}: {', '.join(shares)}"


def _memory(config: Config, vocab_size: int) -> list[str]:
    fixed = flops.fixed_bytes(config.model, config.sleep, vocab_size)
    rows = [[name, human(size)] for name, size in fixed._asdict().items()]
    return [
        "memory beside activations, float32",
        *_table([["part", "B"], *rows, ["total", human(sum(fixed))]]),
        f"  fast weights: {human(flops.state_bytes(config.model))} B/sequence",
    ]


def _schedules(config: Config, windows: list[Window], vocab_size: int) -> list[str]:
    optim, num_steps = config.optim, config.optim.num_steps
    warmup = min(optim.warmup_steps, num_steps)
    decay = min(round(optim.decay_fraction * num_steps), num_steps)
    steps_by_n = Counter(
        num_passes_at(step, config.sleep, num_steps, config.run.seed) for step in range(num_steps)
    )
    costs = {
        n: flops.training_flops(
            config.model, config.sleep, windows, plan(windows, n, config.model, config.sleep), vocab_size
        )
        for n in steps_by_n
    }
    sequences, tokens = config.data.batch_sequences, config.data.batch_sequences * windows[-1].stop
    model = sequences * sum(steps * costs[n].model for n, steps in steps_by_n.items())
    hardware = sequences * sum(steps * costs[n].hardware for n, steps in steps_by_n.items())
    stable = max(0, num_steps - warmup - decay)
    return [
        f"schedule, {num_steps} steps",
        f"  learning rate  Muon {optim.muon_lr:g}, AdamW {optim.adamw_lr:g}; steps: {warmup} warm-up, "
        f"{stable} stable, {decay} decay",
        textwrap.fill(
            f"  passes N       {config.sleep.passes_schedule}; steps: "
            + ", ".join(f"{steps} with N = {n}" for n, steps in sorted(steps_by_n.items())),
            width=99,
            subsequent_indent=" " * 17,
        ),
        f"  batch          {sequences} sequences, {human(tokens)} tokens",
        f"  run            {human(num_steps * tokens)} tokens, {human(model)} FLOP training, "
        f"{human(hardware)} FLOP as run",
    ]
