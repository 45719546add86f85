"""Parameters, FLOPs and memory as functions of N, window and depth: arithmetic over planned visits.

FLOPs count two per multiply-add of the products of matrices, over every token of a window (a pad costs what
a token costs), attention over the pairs that the mask lets through. Norms, activations, gates are left out.
Bytes are those of float32 weights and computation.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sleeptrain.config import BlockSpec, ModelConfig, SleepConfig
from sleeptrain.memory import RULES
from sleeptrain.memory.chunked import chunk_tokens
from sleeptrain.model.sizes import (
    block_norms,
    fast_blocks,
    jet_hidden,
    key_channels,
    mixer_matrices,
    mixer_vectors,
    mlp_matrices,
    state_size,
    tokens_at_once,
    value_channels,
)
from sleeptrain.model.visits import Visit, Window, loss_tokens, plan, segments_of

FLOAT32_BYTES = 4

# Dense bfloat16 FLOP/s by a word of the device's name (vendor data sheets); the longer name comes first.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class Parameters(NamedTuple):
    """Numbers of weights. A block's norm counts with what it precedes, the final norm with the head, the
    halting head with the memory."""

    embedding: int
    attention: int
    memory: int
    mlp: int
    head: int


class Flops(NamedTuple):
    """FLOPs by part: linear maps of mixers and MLP, attention, short convolutions and memory rule, head."""

    linear: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    head: float = 0.0

    def plus(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(self, other)))


class Cost(NamedTuple):
    """FLOPs of one sequence: forward; ``model``: training as the mathematics asks; ``hardware``: as it runs,
    with what activation checkpointing recomputes."""

    forward: float
    model: float
    hardware: float


class FixedBytes(NamedTuple):
    """Bytes that do not depend on the batch: Muon keeps one moment of the matrices, AdamW two of the rest."""

    weights: int
    gradients: int
    optimizer: int


def count_parameters(config: ModelConfig, sleep: SleepConfig, vocab_size: int) -> Parameters:
    """The weights of ``SleepModel(config, sleep, vocab_size)``, by part."""
    width, blocks = config.d_model, config.blocks
    sizes = {
        kind: sum(
            block_norms(config, spec)
            + mixer_vectors(config, spec)
            + sum(mixer_matrices(config, spec).values())
            for spec in blocks
            if spec.is_fast_weight == kind
        )
        for kind in (False, True)
    }
    start = state_size(config) * len(fast_blocks(blocks)) if sleep.learned_initial_state else 0
    halting = width + 1 if sleep.halting == "learned" else 0
    return Parameters(
        embedding=vocab_size * width,
        attention=sizes[False],
        memory=sizes[True] + start + halting,
        mlp=sum(
            block_norms(config, spec) + mlp_matrices(config, spec) for spec in blocks if config.has_mlp(spec)
        ),
        head=width + (0 if config.tie_embeddings else vocab_size * width),
    )


def fixed_bytes(config: ModelConfig, sleep: SleepConfig, vocab_size: int) -> FixedBytes:
    """Bytes of weights, gradients and both optimizers' moments."""
    total = sum(count_parameters(config, sleep, vocab_size))
    by_muon = sum(
        sum(mixer_matrices(config, spec).values()) + mlp_matrices(config, spec) for spec in config.blocks
    )
    weights = FLOAT32_BYTES * total
    return FixedBytes(weights, weights, FLOAT32_BYTES * (by_muon + 2 * (total - by_muon)))


def state_bytes(config: ModelConfig) -> int:
    """Bytes of the fast weights of one sequence."""
    return FLOAT32_BYTES * state_size(config) * len(fast_blocks(config.blocks))


def forward_flops(
    config: ModelConfig,
    sleep: SleepConfig,
    windows: Sequence[Window],
    visits: Sequence[Visit],
    vocab_size: int,
) -> Flops:
    """Forward FLOPs of one sequence over its planned visits."""
    total = Flops()
    for visit in visits:
        window = windows[visit.window]
        total = total.plus(_visit_flops(config, sleep, window, visit))
        total = total.plus(_head_flops(config, window, visit, vocab_size))
    return total


def training_flops(
    config: ModelConfig,
    sleep: SleepConfig,
    windows: Sequence[Window],
    visits: Sequence[Visit],
    vocab_size: int,
) -> Cost:
    """Forward and backward FLOPs of one sequence: a backward pass costs two forward passes.

    A visit that no gradient reaches (``sleep.backprop_passes``, ``sleep.detach_state``) costs forward only.
    """
    forward = model = hardware = 0.0
    is_in_pieces = loss_tokens(windows) > tokens_at_once(1, vocab_size)
    for visit, learns in zip(visits, _learning(sleep, windows, visits)):
        window = windows[visit.window]
        head = sum(_head_flops(config, window, visit, vocab_size))
        once = sum(_visit_flops(config, sleep, window, visit)) + head
        trained = 3 * once if learns else once
        forward, model = forward + once, model + trained
        hardware += trained + (_recomputed_flops(config, sleep, window, visit) if learns else 0.0)
        hardware += head if learns and is_in_pieces else 0.0
    return Cost(forward, model, hardware)


def pass_ratio(
    config: ModelConfig, sleep: SleepConfig, windows: Sequence[Window], vocab_size: int, num_passes: int
) -> float:
    """R(N): model FLOPs of training with N passes over those of training with one."""

    def cost(n: int) -> float:
        return training_flops(config, sleep, windows, plan(windows, n, config, sleep), vocab_size).model

    return cost(num_passes) / cost(1)


def activation_bytes(
    config: ModelConfig,
    sleep: SleepConfig,
    windows: Sequence[Window],
    visits: Sequence[Visit],
    vocab_size: int,
    per_pass: bool,
) -> int:
    """Most bytes that one sequence holds for its backward pass, the logits included.

    All activations of all visits; or, checkpointed ``per_pass``, the h and fast weights that each visit
    starts from and the activations of the visits kept at the end, or of the one that is being recomputed. A
    visit that no gradient reaches holds nothing.
    """
    learning = [v for v, learns in zip(visits, _learning(sleep, windows, visits)) if learns]
    is_in_pieces = loss_tokens(windows) > tokens_at_once(1, vocab_size)
    of_token = config.d_model if is_in_pieces else 3 * config.d_model + vocab_size
    heads = sum((windows[v.window].stop - windows[v.window].start) * of_token for v in learning if v.has_loss)
    of_visits = [_visit_activations(config, sleep, windows[v.window], v) for v in learning]
    if not per_pass:
        return FLOAT32_BYTES * (heads + sum(of_visits))
    inputs = sum(_visit_inputs(config, windows[v.window], v) for v in learning if not v.is_kept)
    kept = sum(size for v, size in zip(learning, of_visits) if v.is_kept)
    return FLOAT32_BYTES * (heads + inputs + max(kept, *of_visits, 0))


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a known accelerator, by the name that torch reports; None for any other."""
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in _PEAKS.items() if f" {name} " in words), None)


def _steps(config: ModelConfig, sleep: SleepConfig, visit: Visit) -> list[tuple[BlockSpec, bool]]:
    """The blocks that a visit runs, and whether whole; where nobody reads it, the last one only writes."""
    blocks = [config.blocks[i] for i in segments_of(config)[visit.segment]]
    if visit.is_read:
        return [(spec, True) for spec in blocks]
    writers = [i for i, spec in enumerate(blocks) if spec.is_fast_weight or sleep.eviction == "sliding"]
    return [(spec, i < writers[-1]) for i, spec in enumerate(blocks[: writers[-1] + 1])]


def _visit_flops(config: ModelConfig, sleep: SleepConfig, window: Window, visit: Visit) -> Flops:
    total = Flops()
    for spec, whole in _steps(config, sleep, visit):
        total = total.plus(_block_flops(config, sleep, window, spec, whole))
    return total


def _head_flops(config: ModelConfig, window: Window, visit: Visit, vocab_size: int) -> Flops:
    num_tokens = window.stop - window.start if visit.has_loss else 0
    return Flops(head=2.0 * num_tokens * config.d_model * vocab_size)


def _block_flops(
    config: ModelConfig, sleep: SleepConfig, window: Window, spec: BlockSpec, whole: bool
) -> Flops:
    """A block over a window; not ``whole``: what it remembers, without its output."""
    num_tokens = window.stop - window.start
    linear = sum(_executed(config, sleep, spec, whole).values())
    linear += mlp_matrices(config, spec) if whole else 0
    flops = Flops(linear=2.0 * num_tokens * linear)
    if spec.is_fast_weight:
        return flops._replace(memory=float(num_tokens * _memory_flops(config, sleep, spec, whole)))
    pairs = attention_pairs(window, spec, sleep) if whole else 0
    return flops._replace(attention=4.0 * pairs * config.num_heads * config.attention_head_dim)


def _executed(config: ModelConfig, sleep: SleepConfig, spec: BlockSpec, whole: bool) -> dict[str, int]:
    """The matrices of a mixer that run; a write has no output, and queries only for the tail."""
    matrices = mixer_matrices(config, spec)
    if whole:
        return matrices
    has_queries = spec.is_fast_weight and sleep.carries_convolution
    unused = {"g", "o"} if has_queries else {"g", "o", "q"}
    return {name: size for name, size in matrices.items() if name not in unused}


def _memory_flops(config: ModelConfig, sleep: SleepConfig, spec: BlockSpec, whole: bool) -> int:
    """Per token: convolution, and the rule as a recurrence, as Megatron counts it (delta: 8 K V a head).

    Each product with the state costs 2 K V: two to erase along a key, one to write, one to read.
    """
    channels = value_channels(config)
    if spec.kind == "gdn":
        channels += key_channels(config) * (2 if whole or sleep.carries_convolution else 1)
    products = (2 if RULES[config.rule].erases else 0) + 1 + (1 if whole else 0)
    return 2 * config.conv_width * channels + 2 * products * state_size(config)


def attention_pairs(window: Window, spec: BlockSpec, sleep: SleepConfig) -> int:
    """(query, key) pairs in the band of an attention block, surviving keys of earlier windows included."""
    num_tokens = window.stop - window.start
    band = _band(window, spec, sleep)
    survived = _survived(window, spec, sleep)
    rising = min(num_tokens, band - survived)  # queries whose band still reaches the oldest key
    return rising * survived + rising * (rising + 1) // 2 + (num_tokens - rising) * band


def _band(window: Window, spec: BlockSpec, sleep: SleepConfig) -> int:
    return spec.width_tokens or sleep.window_tokens or window.stop - window.start


def _survived(window: Window, spec: BlockSpec, sleep: SleepConfig) -> int:
    if sleep.eviction == "hard":
        return 0
    most = _band(window, spec, sleep) - 1
    return most if sleep.carry_between_batches else min(most, window.start)  # carried: from the second batch


def _learning(sleep: SleepConfig, windows: Sequence[Window], visits: Sequence[Visit]) -> list[bool]:
    """Whether a gradient reaches each visit."""
    last_pass = {visit.window: visit.pass_number for visit in visits}
    nothing_crosses = sleep.detach_state and sleep.eviction == "hard" and not sleep.carries_convolution

    def learns(visit: Visit) -> bool:
        if visit.is_after_loss:
            return False
        if visit.pass_number == 1 and windows[visit.window].has_loss:
            return True
        is_cut = 0 < sleep.backprop_passes <= last_pass[visit.window] - visit.pass_number
        return not (is_cut or nothing_crosses)

    return [learns(visit) for visit in visits]


def _recomputed_flops(config: ModelConfig, sleep: SleepConfig, window: Window, visit: Visit) -> float:
    """What activation checkpointing runs again: it stops before a last product, which saves nothing.

    With both kinds nested a visit is run again up to its last whole block, then each whole block once more.
    """
    mode, steps = sleep.activation_checkpointing, _steps(config, sleep, visit)
    again, stops = [], []
    if mode in ("block", "both"):
        again = [step for step in steps if step[1]]
        stops = [spec for spec, _ in again]
    if mode in ("pass", "both") and not visit.is_kept:
        again += steps[:-1] if mode == "both" and visit.is_read else steps
        stops += [steps[-1][0]] if mode == "pass" and visit.is_read else []
    saved = 2.0 * (window.stop - window.start) * sum(_last_product(config, spec) for spec in stops)
    return sum(sum(_block_flops(config, sleep, window, spec, whole)) for spec, whole in again) - saved


def _last_product(config: ModelConfig, spec: BlockSpec) -> int:
    """The matrix with which a block ends; 0 where a norm follows, which saves what the product gives."""
    if config.norms(spec)[1]:
        return 0
    return config.d_model * config.mlp_hidden if config.has_mlp(spec) else mixer_matrices(config, spec)["o"]


def _visit_inputs(config: ModelConfig, window: Window, visit: Visit) -> int:
    """Numbers that a visit starts from: h and the fast weights of its blocks."""
    blocks = [config.blocks[i] for i in segments_of(config)[visit.segment]]
    return (window.stop - window.start) * config.d_model + len(fast_blocks(blocks)) * state_size(config)


def _visit_activations(config: ModelConfig, sleep: SleepConfig, window: Window, visit: Visit) -> int:
    """Numbers that the operations of a visit save for their gradients."""
    num_tokens, total = window.stop - window.start, 0
    for spec, whole in _steps(config, sleep, visit):
        before, after = config.norms(spec)
        of_norm = num_tokens * 3 * config.d_model  # its input, normalised, and with its weight
        total += of_norm if before else num_tokens * config.d_model
        total += of_norm if after and whole else 0
        if whole and config.has_mlp(spec):
            total += of_norm * (before + after) + num_tokens * 4 * config.mlp_hidden
        if spec.is_fast_weight:
            total += _memory_activations(config, sleep, num_tokens, spec, whole)
        elif whole:
            total += _attention_activations(config, sleep, window, spec)
    return total


def _attention_activations(config: ModelConfig, sleep: SleepConfig, window: Window, spec: BlockSpec) -> int:
    """Queries, output, keys and values; and the mask where the causal one does not do."""
    num_tokens = window.stop - window.start
    num_keys = num_tokens + _survived(window, spec, sleep)
    is_causal = num_keys == num_tokens <= _band(window, spec, sleep)
    heads = 2 * num_tokens * config.num_heads + 2 * num_keys * config.kv_heads
    if config.qk_norm != "none":  # what is normalised, and the result
        heads += 2 * (num_tokens * config.num_heads + num_tokens * config.kv_heads)
    if config.attention_gate:  # its logits, the gate, and what it lets through
        heads += 3 * num_tokens * config.num_heads
    return heads * config.attention_head_dim + (0 if is_causal else num_tokens * num_keys)


def _memory_activations(
    config: ModelConfig, sleep: SleepConfig, num_tokens: int, spec: BlockSpec, whole: bool
) -> int:
    """Around the rule per token, inside it per chunk (see ``memory/chunked.py``)."""
    keys, values, heads, taps = (
        key_channels(config),
        value_channels(config),
        config.memory_heads,
        config.conv_width,
    )
    key_dim, value_dim = config.memory_key_dim, config.memory_value_dim
    has_queries = whole or sleep.carries_convolution
    if spec.kind == "gdn":  # padded input, output and activation of the convolution
        around = 3 * (values + keys * (2 if has_queries else 1))
    else:
        around = (2 + taps) * values + 2 * jet_hidden(config) + 2 * keys * (2 if whole else 1)
    if whole:  # output of the rule, its norm, and its gate
        around += 6 * values
    decays, erases = RULES[config.rule]
    length = chunk_tokens(num_tokens, key_dim)
    squares = (1 if whole else 0) + (1 if erases else 0) + (1 if decays else 0)  # q k^T, k k^T, decays
    inside = (key_dim if whole else 0) + key_dim + 2 * value_dim
    inside += (key_dim + value_dim if erases else 0) + squares * length
    states = -(-num_tokens // length) * state_size(config)
    return num_tokens * (around + heads * inside) + states
