"""Which part of the model a rank holds: the split of each weight over the tensor ranks, the blocks of each
pipeline stage. Arithmetic alone.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from sleeptrain.config import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig, SleepConfig
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.visits import Segment, Visit, Window, plan, segments_of
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


def shares_of_stage(config: Config, vocab_size: int, stage: int) -> list[Share]:
    """The weights of a stage; its tensor ranks all hold equally much."""
    return _shares(degrees_alone(config), vocab_size, stage)


def degrees_alone(config: Config) -> Config:
    """Without what neither the shares nor the visits of a stage depend on: a search asks for them often."""
    size, num_stages = config.parallel.tensor_size, config.parallel.pipeline_size
    parallel = ParallelConfig(tensor_size=size, pipeline_size=num_stages)
    sleep = replace(config.sleep, activation_checkpointing="none")
    return replace(config, run=RunConfig(), data=DataConfig(), parallel=parallel, sleep=sleep)


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


def bucket_elements(num_elements: int) -> int:
    """How many elements of gradients DeepSpeed reduces at a time; it takes the room for all of them, 2 GB by
    default, so a small model asks for less, and a large one for 256 MiB."""
    return min(num_elements, 2**26)


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
