"""Which part of the model a rank holds, and how many bytes it needs for it: the split of each weight over the
tensor ranks, the blocks of each pipeline stage, what is alive at once. Arithmetic alone; nothing here talks
to another process.

Activations count in float32, as in ``model/flops.py``; under bfloat16 autocast they are 10 to 25 % smaller.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from sleeptrain.config import Config, ModelConfig
from sleeptrain.model.flops import FLOAT32_BYTES
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.visits import Segment, Window, segments_of
from sleeptrain.optim.optimizer import is_muon, takes_decay
from sleeptrain.schema import ConfigError

BUCKET_ELEMENTS = 500_000_000  # what DeepSpeed reduces at a time: the room is taken whatever the model
GATHERED_ELEMENTS = 1_000_000_000  # what ZeRO 3 leaves gathered

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
    ("*.mixer.o_proj.weight", ROW),
    ("*.mixer.A_log", HEADS),
    ("*.mixer.dt_bias", HEADS),
    ("*.mixer.[qkv]_conv", CHANNELS),
    ("*.mixer.kernel_in.weight", SUMMED),
    ("*.mixer.kernel_out.*", COLUMN),
    ("*.mixer.o_norm.weight", SUMMED),
    ("*.mlp.gate_proj.weight", COLUMN),
    ("*.mlp.up_proj.weight", COLUMN),
    ("*.mlp.down_proj.weight", ROW),
    ("*_norm.weight", REPLICATED),
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
    """Device memory of one rank. ``weights`` as the model computes with, ``masters``: DeepSpeed's own copy of
    what this replica updates; ``gradients`` are whole, whatever the ZeRO stage, because they add up over all
    visits before they are reduced once. Activations and messages are gone when the update begins."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    messages: int
    update: int

    @property
    def total(self) -> int:
        fixed = self.weights + self.masters + self.gradients + self.optimizer
        return fixed + max(self.activations + self.messages, self.update)


def shares_of_stage(config: Config, vocab_size: int, stage: int) -> list[Share]:
    """The weights of a stage; its tensor ranks all hold equally much."""
    size, num_stages = config.parallel.tensor_size, config.parallel.pipeline_size
    here = {i for blocks in blocks_of_stage(config.model, stage, num_stages).values() for i in blocks}
    on_last, on_first = stage == num_stages - 1, stage == 0

    def is_here(name: str) -> bool:
        if name in ("embed.weight", "head.weight", "final_norm.weight"):
            is_first = on_first and name == "embed.weight"
            is_last = on_last and name != "embed.weight"
            return is_first or is_last or ((on_first or on_last) and is_on_both_ends(name, config))
        return int(name.removeprefix("stack.blocks.").removeprefix("initial_memory.").split(".")[0]) in here

    return [
        Share(name, shape, math.prod(stop - start for start, stop in box_of(name, shape, 0, size)))
        for name, shape in logical_shapes(config, vocab_size).items()
        if is_here(name)
    ]


def logical_shapes(config: Config, vocab_size: int) -> dict[str, torch.Size]:
    """Of every weight of the whole model."""
    return _shapes(replace(config, parallel=type(config.parallel)()), vocab_size)


@lru_cache(maxsize=4)
def _shapes(config: Config, vocab_size: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = SleepModel(config.model, config.sleep, vocab_size)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def rank_bytes(
    config: Config, vocab_size: int, windows: Sequence[Window], replicas: int, stage: int
) -> RankBytes:
    """What the busiest moment of a step needs on a rank of this stage, in the first replica."""
    shares = shares_of_stage(config, vocab_size, stage)
    activations, messages = _live_bytes(config, vocab_size, windows, replicas, stage)
    return RankBytes(
        *fixed_bytes_of(config, shares, replicas),
        activations,
        messages,
        _update_bytes(config, shares, replicas),
    )


def fixed_bytes_of(config: Config, shares: Sequence[Share], replicas: int) -> tuple[int, int, int, int]:
    """Weights, masters, gradients and moments; a replica's part of a group is filled up to even length."""
    parallel, whole = config.parallel, sum(share.num_elements for share in shares)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for share in shares:
        kind = (is_muon(share.name, share.shape), takes_decay(share.name))
        groups.setdefault(kind, []).append(share.num_elements)
    of_muon = sum(sum(sizes) for (muon, _), sizes in groups.items() if muon)
    if parallel.zero_stage == 0:
        return tuple(FLOAT32_BYTES * n for n in (whole, 0, whole, 2 * whole - of_muon))  # type: ignore[return-value]
    if parallel.zero_stage == 3:
        parts = {kind: sum(-(-n // replicas) for n in sizes) for kind, sizes in groups.items()}
        weights = sum(parts.values()) + (min(whole, GATHERED_ELEMENTS) if replicas > 1 else 0)
        owned = parts.get((True, True), 0)
    else:
        parts = {kind: 2 * -(-sum(sizes) // (2 * replicas)) for kind, sizes in groups.items()}
        weights = replicas * sum(parts.values())
        owned = min(of_muon, parts.get((True, True), 0))
    moments = owned + 2 * sum(part for (muon, _), part in parts.items() if not muon)
    on_device = 0 if parallel.offload_optimizer else 1
    numbers = (weights, on_device * sum(parts.values()), whole, on_device * moments)
    return tuple(FLOAT32_BYTES * n for n in numbers)  # type: ignore[return-value]
