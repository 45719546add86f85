"""Which part of the model a rank holds, and how many bytes it needs for it: the split of each weight over the
tensor ranks, the blocks of each pipeline stage, what is alive at once. Arithmetic alone.
Activations count in float32, as in ``model/flops.py``; under bfloat16 autocast they are 10 to 25 % smaller.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from sleeptrain.config import Config, DataConfig, ModelConfig, ParallelConfig, SleepConfig
from sleeptrain.model.flops import FLOAT32_BYTES, activation_bytes
from sleeptrain.model.sizes import tokens_at_once
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.visits import Segment, Visit, Window, loss_tokens, plan, segments_of
from sleeptrain.optim.optimizer import is_muon, takes_decay
from sleeptrain.parallel.rows import micro_batch_of
from sleeptrain.schema import ConfigError

GATHERED_ELEMENTS = 1_000_000_000  # what ZeRO 3 leaves gathered
MUON_ELEMENTS = 64_000_000  # of matrices that Muon holds whole at once

Box = tuple[tuple[int, int], ...]  # start and stop in each dimension of a logical tensor


class Split(NamedTuple):
    """How a weight is spread over the tensor ranks: along a dimension, or not at all; ``is_summed``:
    whole on each rank, but each sees a part of the gradient only."""

    dim: int | None
    is_summed: bool = False


COLUMN = Split(0)  # output channels of a linear map
ROW = Split(1)  # its input channels
VOCABULARY = Split(0)
HEADS = Split(0)  # one entry per head
CHANNELS = Split(0)  # kernels of a depthwise convolution
REPLICATED = Split(None)
SUMMED = Split(None, is_summed=True)

TABLE = (
    ("embed.weight", VOCABULARY),
    ("head.weight", VOCABULARY),
    ("initial_memory.*", HEADS),
    ("*.mixer.[qkvabg]_proj.weight", COLUMN),
    ("*.mixer.[qkv]_proj.bias", COLUMN),
    ("*.mixer.o_proj.weight", ROW),
    ("*.mixer.A_log", HEADS),
    ("*.mixer.dt_bias", HEADS),
    ("*.mixer.[qkv]_conv", CHANNELS),
    ("*.mixer.kernel_in.weight", SUMMED),
    ("*.mixer.kernel_out.*", COLUMN),
    ("*.mixer.[qko]_norm.weight", SUMMED),
    ("*.mixer.[qk]_width_norm.weight", HEADS),
    ("*.mlp.gate_proj.weight", COLUMN),
    ("*.mlp.up_proj.weight", COLUMN),
    ("*.mlp.down_proj.weight", ROW),
    ("*_norm.weight", REPLICATED),
    ("halting_head.*", REPLICATED),
)


def split_of(name: str, sequence_parallel: bool = False) -> Split:
    """The table's entry for a weight; KeyError for one that it does not know."""
    for pattern, split in TABLE:
        if fnmatch.fnmatchcase(name, pattern):
            return SUMMED if split == REPLICATED and sequence_parallel else split
    raise KeyError(f"parallel/layout.py has no split for the weight {name}; add it to TABLE")


def box_of(name: str, shape: torch.Size, rank: int, size: int) -> Box:
    """What of a logical tensor the tensor rank holds."""
    dim = split_of(name).dim
    box = [(0, n) for n in shape]
    if dim is not None:
        box[dim] = (shape[dim] * rank // size, shape[dim] * (rank + 1) // size)
    return tuple(box)


def check_tensor_size(config: ModelConfig, vocab_size: int, size: int) -> None:
    """Raises ConfigError unless heads and vocabulary divide by the tensor-parallel degree."""
    kinds = {block.kind for block in config.blocks}
    counts = {"the MLP's width (model.mlp_dim)": config.mlp_hidden, "the vocabulary": vocab_size}
    if kinds & {"attn", "swa"}:
        counts |= {"model.num_heads": config.num_heads, "model.num_kv_heads": config.kv_heads}
    if kinds & {"gdn", "jet"}:
        counts |= {"model.memory_heads": config.memory_heads, "model.memory_qk_heads": config.qk_heads}
    for name, count in counts.items():
        if count % size:
            remedy = (
                "set model.vocab_multiple to round it up"
                if name == "the vocabulary"
                else "change one of them"
            )
            raise ConfigError(f"parallel.tensor_size={size} does not divide {name}={count}; {remedy}")


def blocks_of_stage(config: ModelConfig, stage: int, num_stages: int) -> dict[Segment, range]:
    """Each stage's part of each segment, so that looping over the core keeps every stage busy.

    Raises ConfigError unless the core divides evenly; prelude and coda are spread as evenly as they come.
    """
    ranges = segments_of(config)
    num_core = len(ranges["core"])
    if num_core % num_stages:
        raise ConfigError(
            f"parallel.pipeline_size={num_stages} does not divide the {num_core} looped blocks of "
            "model.pattern; choose a divisor, or move blocks to model.prelude_blocks or model.coda_blocks"
        )
    return {
        name: range(
            blocks.start + len(blocks) * stage // num_stages,
            blocks.start + len(blocks) * (stage + 1) // num_stages,
        )
        for name, blocks in ranges.items()
    }


def is_on_both_ends(name: str, config: Config) -> bool:
    """Whether the first and the last stage both hold this weight, and must sum its gradient."""
    if name == "embed.weight":
        return config.model.tie_embeddings
    return name == "final_norm.weight" and config.sleep.norm_between_passes


class Share(NamedTuple):
    """A logical weight and how many of its elements a rank holds."""

    name: str
    shape: torch.Size
    num_elements: int


class RankBytes(NamedTuple):
    """Device memory of one rank. ``weights``: what the model computes with; ``masters``: DeepSpeed's own copy
    of those that this replica updates. ``gradients`` are whole, whatever the ZeRO stage, because they add up
    over all visits before they are reduced once. Activations are gone when the update begins."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    messages: int
    update: int

    @property
    def total(self) -> int:
        fixed = self.weights + self.masters + self.gradients + self.optimizer + self.messages
        return fixed + max(self.activations, self.update)


def shares_of_stage(config: Config, vocab_size: int, stage: int) -> list[Share]:
    """The weights of a stage; its tensor ranks all hold equally much."""
    return _shares(_degrees_alone(config), vocab_size, stage)


def _degrees_alone(config: Config) -> Config:
    """Without what neither the shares nor the visits of a stage depend on: a search asks for them often."""
    size, num_stages = config.parallel.tensor_size, config.parallel.pipeline_size
    parallel = ParallelConfig(tensor_size=size, pipeline_size=num_stages)
    sleep = replace(config.sleep, activation_checkpointing="none")
    return replace(config, data=DataConfig(), parallel=parallel, sleep=sleep)


@lru_cache(maxsize=1024)
def _shares(config: Config, vocab_size: int, stage: int) -> list[Share]:
    size, num_stages = config.parallel.tensor_size, config.parallel.pipeline_size
    here = {i for blocks in blocks_of_stage(config.model, stage, num_stages).values() for i in blocks}
    on_last, on_first = stage == num_stages - 1, stage == 0

    def is_here(name: str) -> bool:
        if name in ("embed.weight", "head.weight", "final_norm.weight"):
            is_first = on_first and name == "embed.weight"
            is_last = on_last and name != "embed.weight"
            return is_first or is_last or ((on_first or on_last) and is_on_both_ends(name, config))
        if name.startswith("halting_head"):
            return on_last
        return int(name.removeprefix("stack.blocks.").removeprefix("initial_memory.").split(".")[0]) in here

    return [
        Share(name, shape, math.prod(stop - start for start, stop in box_of(name, shape, 0, size)))
        for name, shape in logical_shapes(config, vocab_size).items()
        if is_here(name)
    ]


def logical_shapes(config: Config, vocab_size: int) -> dict[str, torch.Size]:
    """Of every weight of the whole model."""
    weights = SleepConfig(
        learned_initial_state=config.sleep.learned_initial_state, halting=config.sleep.halting
    )
    return _shapes(config.model, weights, vocab_size)


@lru_cache(maxsize=4)
def _shapes(config: ModelConfig, sleep: SleepConfig, vocab_size: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = SleepModel(config, sleep, vocab_size)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def rank_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], replicas: int, stage: int
) -> RankBytes:
    """What the fullest moment of a step needs on a rank of this stage, in the first replica."""
    shares = shares_of_stage(config, vocab_size, stage)
    whole = sum(share.num_elements for share in shares)
    weights, masters, gradients, moments = fixed_bytes(config, shares, replicas)
    activations, messages = live_bytes(config, vocab_size, windows, replicas, stage)
    if _zero_stage(config, replicas) == 3:  # its bucket has its room from the start
        weights += FLOAT32_BYTES * min(whole, GATHERED_ELEMENTS)
        messages += FLOAT32_BYTES * bucket_elements(whole)
    update = _update_bytes(config, shares, replicas)
    return RankBytes(weights, masters, gradients, moments, activations, messages, update)


def fixed_bytes(config: Config, shares: Sequence[Share], replicas: int) -> tuple[int, int, int, int]:
    """Weights, masters, gradients, and moments: Muon's momentum, AdamW's two. DeepSpeed fills each replica's
    part of a group of weights up to an even number."""
    stage, whole = _zero_stage(config, replicas), sum(share.num_elements for share in shares)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for share in shares:
        kind = (is_muon(share.name, share.shape), takes_decay(share.name))
        groups.setdefault(kind, []).append(share.num_elements)
    muon = sum(sum(sizes) for (by_muon, _), sizes in groups.items() if by_muon)
    if stage == 0:
        masters, weights, moments = 0, FLOAT32_BYTES * whole, 2 * whole - muon
    else:
        if stage == 3:
            parts = {kind: sum(-(-n // replicas) for n in sizes) for kind, sizes in groups.items()}
        else:
            parts = {kind: 2 * -(-sum(sizes) // (2 * replicas)) for kind, sizes in groups.items()}
        copies = 1 if stage == 3 else replicas
        weights = sum(copies * part * _weight_bytes(config, decays) for (_, decays), part in parts.items())
        moments = sum(min(muon, part) if by_muon else 2 * part for (by_muon, _), part in parts.items())
        masters = sum(parts.values())
    if config.parallel.offload_optimizer:
        masters = moments = 0
    return weights, FLOAT32_BYTES * masters, FLOAT32_BYTES * whole, FLOAT32_BYTES * moments


def _weight_bytes(config: Config, takes_decay: bool) -> int:
    """What takes no weight decay (norms, A_log, dt_bias, initial fast weights) stays in float32."""
    return 2 if takes_decay and config.parallel.weights == "bfloat16" else FLOAT32_BYTES


def _zero_stage(config: Config, replicas: int) -> int:
    """0 also for plain torch."""
    return 0 if config.parallel.is_local and replicas == 1 else config.parallel.zero_stage


def bucket_elements(num_elements: int) -> int:
    """How many elements of gradients DeepSpeed reduces at a time; it takes the room for all of them, 2 GB by
    default, so a small model asks for less, and a large one for 256 MiB."""
    return min(num_elements, 2**26)


def muon_batch(shape: torch.Size) -> int:
    """Matrices of one shape that are gathered and orthogonalised together."""
    return max(1, MUON_ELEMENTS // math.prod(shape))


def _update_bytes(config: Config, shares: Sequence[Share], replicas: int) -> int:
    """What reducing and updating needs for a while: a flat copy or a bucket of gradients, this replica's part
    of them; and Muon's matrices of one shape, whole, with the products of an iteration."""
    stage, whole = _zero_stage(config, replicas), sum(share.num_elements for share in shares)
    by_shape: dict[torch.Size, int] = {}
    for share in shares:
        if is_muon(share.name, share.shape):
            by_shape[share.shape] = by_shape.get(share.shape, 0) + 1
    batches = {s: min(n, muon_batch(s)) for s, n in by_shape.items()}
    muon = max((n * (5 * math.prod(s) + 3 * min(s) ** 2) for s, n in batches.items()), default=0)
    if stage == 0:
        return FLOAT32_BYTES * max(whole if replicas > 1 else 0, muon)
    part = whole // replicas
    return FLOAT32_BYTES * (part + max(bucket_elements(whole) if stage < 3 else 0, muon))


def live_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], replicas: int, stage: int
) -> tuple[int, int]:
    """Most bytes of activations, and of messages, that a stage holds at once.

    A pipeline holds the visits between their forward and backward passes, and of each what it sent on.
    """
    num_stages, rows = config.parallel.pipeline_size, config.data.batch_sequences // replicas
    micro = micro_batch_of(config, rows)
    visits = visit_bytes(config, vocab_size, windows, stage)
    num_micro = min(rows // micro, 3 * num_stages) if num_stages > 1 else 1  # more only repeat it
    activations = most_alive(visits, num_micro, num_stages, stage)
    if num_stages == 1:
        return micro * activations, 0
    message = FLOAT32_BYTES * max(w.stop - w.start for w in windows) * config.model.d_model
    sent = most_alive([(message, 0)] * len(visits), num_micro, num_stages, stage)
    return micro * activations, micro * (sent + 4 * message)  # 4 on the way: h and its gradient, in and out


def most_alive(visits: Sequence[tuple[int, int]], num_micro: int, num_stages: int, stage: int) -> int:
    """Most that is alive in megatron-core's interleaved schedule, each visit holding its first number from
    its forward pass to the end of its backward pass, and its second beside during the latter. On the first
    stage about (V - 1) p + 2 (p - 1) visits are in between."""
    groups = [range(i, min(i + num_stages, num_micro)) for i in range(0, num_micro, num_stages)]
    forward = [held for group in groups for held, _ in visits for _ in group]
    backward = [visit for group in groups for visit in reversed(visits) for _ in group]
    behind = num_stages - stage - 1
    warmup = behind if len(visits) == 1 else 2 * behind + (len(visits) - 1) * num_stages
    alive = most = sum(forward[:warmup])
    for i, (held, again) in enumerate(backward):
        alive += sum(forward[warmup + i : warmup + i + 1])
        most = max(most, alive + again)
        alive -= held
    return most


def visit_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], stage: int
) -> list[tuple[int, int]]:
    """Bytes of one sequence that each visit holds on a stage until its backward pass, and those that it needs
    beside in the latter: what is computed again, and the gradients of an MLP at work."""
    mode, part = config.sleep.activation_checkpointing, model_of_rank(config, stage)
    visits = plan(windows, config.sleep.num_passes, config.model, config.sleep)
    memory = FLOAT32_BYTES * part.memory_heads * part.memory_key_dim * part.memory_value_dim
    found = []
    for visit, body in zip(visits, _bodies(_degrees_alone(config), tuple(windows), stage)):
        tokens = windows[visit.window].stop - windows[visit.window].start
        here = [part.blocks[i] for i in segments_of(part).get(visit.segment, ())]
        h, states = FLOAT32_BYTES * tokens * part.d_model, memory * sum(spec.is_fast_weight for spec in here)
        of_blocks, largest = len(here) * h + states, body // max(1, len(here))
        held, again = body, 0
        if body and mode in ("pass", "both") and not visit.is_kept:
            held, again = h + states, body if mode == "pass" else of_blocks + largest
        elif body and mode in ("block", "both"):
            held, again = of_blocks, largest
        again += FLOAT32_BYTES * tokens * (6 * part.d_model + 4 * part.mlp_hidden) if body else 0
        if visit.has_loss and stage == config.parallel.pipeline_size - 1:
            at_once = tokens_at_once(1, vocab_size)
            logits = FLOAT32_BYTES * min(tokens, at_once) * vocab_size // config.parallel.tensor_size
            head, beside = (3 * h + logits, 0) if loss_tokens(windows) <= at_once else (h, 3 * logits)
            held, again = held + head, max(beside, again - head)  # its own backward pass comes first
        found.append((held, again))
    return found


@lru_cache(maxsize=1024)
def _bodies(config: Config, windows: tuple[Window, ...], stage: int) -> list[int]:
    """Bytes of one sequence that the blocks of a stage save in each visit; 0 where no gradient comes by."""
    part, sizes, after = model_of_rank(config, stage), [], 0
    later: list[Visit] = []
    for visit in reversed(visits_of_stage(config, windows, stage)):
        later = later if visit is None else [visit._replace(has_loss=False), *later]
        total = activation_bytes(part, config.sleep, windows, later, 1, per_pass=False)
        sizes.append(total - after)
        after = total
    return sizes[::-1]


def visits_of_stage(config: Config, windows: Sequence[Window], stage: int) -> list[Visit | None]:
    """The planned visits as ``model_of_rank`` sees them; None where the stage has nothing to compute."""
    sleep, segments = config.sleep, segments_of(config.model)
    mine = blocks_of_stage(config.model, stage, config.parallel.pipeline_size)
    is_last = stage == config.parallel.pipeline_size - 1

    def writes(blocks: range) -> bool:
        return any(config.model.blocks[i].is_fast_weight or sleep.eviction == "sliding" for i in blocks)

    found: list[Visit | None] = []
    for visit in plan(windows, sleep.num_passes, config.model, sleep):
        here = mine[visit.segment]
        is_read = visit.is_read or writes(range(here.stop, segments[visit.segment].stop))
        has_work = bool(here) and (is_read or writes(here))
        seen = visit._replace(is_read=is_read, has_loss=visit.has_loss and is_last)
        found.append(seen if has_work else None)
    return found


def model_of_rank(config: Config, stage: int) -> ModelConfig:
    """The blocks that a rank computes, as if they were a model of their own."""
    model, size = config.model, config.parallel.tensor_size
    here = blocks_of_stage(model, stage, config.parallel.pipeline_size)
    words = model.pattern.split() * model.pattern_repeats
    return replace(
        model,
        pattern=" ".join(words[i] for blocks in here.values() for i in blocks),
        pattern_repeats=1,
        prelude_blocks=len(here.get("prelude", ())),
        coda_blocks=len(here.get("coda", ())),
        num_heads=model.num_heads // size,
        num_kv_heads=model.kv_heads // size,
        head_dim=model.attention_head_dim,
        memory_heads=model.memory_heads // size,
        memory_qk_heads=model.qk_heads // size,
        mlp_dim=model.mlp_hidden // size,
        jet_reduction=max(1, model.jet_reduction // size),  # its hidden layer is not split
    )
