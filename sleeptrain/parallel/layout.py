"""Which part of the model a rank holds: the split of each weight over the tensor ranks, the blocks of each
pipeline stage. Arithmetic alone; nothing here talks to another process.
"""

import fnmatch
from typing import NamedTuple

import torch

from sleeptrain.config import Config, ModelConfig
from sleeptrain.model.visits import Segment, segments_of
from sleeptrain.schema import ConfigError

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
