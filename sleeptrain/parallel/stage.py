"""The part of the model that a process holds: its pipeline stage's blocks, and of these its tensor rank's
share.

Every logical tensor has the name and the initial values that it has in one process, whatever the degrees.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sleeptrain.config import Config
from sleeptrain.model.init import draw
from sleeptrain.model.layers import RMSNorm
from sleeptrain.model.sleep import SleepModel
from sleeptrain.parallel.layout import Box, Split, blocks_of_stage, box_of, is_on_both_ends, split_of
from sleeptrain.parallel.tensor import split_model
from sleeptrain.parallel.topology import Topology


class Held(NamedTuple):
    """A parameter here: the logical tensor it is a part of, and whether this process is the one to count
    it (of a weight that first and last stage share, only the first is)."""

    parameter: nn.Parameter
    name: str
    shape: torch.Size
    box: Box
    split: Split
    is_counted: bool


def build_stage(config: Config, vocab_size: int, topology: Topology) -> tuple[SleepModel, list[Held]]:
    """The model with only this process's weights, drawn as in one process, and what they are parts of."""
    with torch.device("meta"):
        model = SleepModel(config.model, config.sleep, vocab_size)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        _keep_stage(model, topology)
        if topology.tensor.size() > 1:
            split_model(model, topology.tensor, config.parallel.sequence_parallel)
        if config.parallel.weights == "bfloat16":
            _store_in_bfloat16(model)
    model.to_empty(device=topology.device)
    if config.model.tie_embeddings and model.holds_embedding and model.holds_head:
        model.head.weight = model.embed.weight
    held = [_held(name, p, shapes, config, topology) for name, p in model.named_parameters()]
    with torch.no_grad():
        for h in held:
            h.parameter.copy_(initial_values(h, config))
            if h.parameter.dtype == torch.bfloat16:
                h.parameter.grad_dtype = torch.float32  # gradients add up in float32
    return model, held


def initial_values(held: Held, config: Config) -> Tensor:
    """Of this process's part of a weight, float32 on the CPU."""
    return part_of(draw(held.name, held.shape, config.model, config.run.seed), held.box)


def part_of(values: Tensor, box: Box) -> Tensor:
    """What lies inside the box."""
    return values[tuple(slice(start, stop) for start, stop in box)]


def _store_in_bfloat16(model: SleepModel) -> None:
    """All weights but norms, A_log, dt_bias and initial fast weights."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            exempt = isinstance(module, RMSNorm) or name in ("A_log", "dt_bias") or parameter.dim() == 3
            if not exempt:
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16)))


def _keep_stage(model: SleepModel, topology: Topology) -> None:
    """Drops what other stages hold."""
    config, stage, num_stages = model.config, topology.pipeline.rank(), topology.pipeline.size()
    model.held = blocks_of_stage(config, stage, num_stages)
    model.holds_embedding, model.holds_head = topology.is_first_stage, topology.is_last_stage
    here = {i for blocks in model.held.values() for i in blocks}
    for i in range(len(config.blocks)):
        if i not in here:
            model.stack.blocks[i] = None  # type: ignore[index]
            if model.sleep.learned_initial_state and str(i) in model.initial_memory:
                del model.initial_memory[str(i)]
    if not model.holds_embedding:
        del model.embed
    if not model.holds_head:
        del model.head
        if not (model.holds_embedding and model.sleep.norm_between_passes):  # there pass n + 1 begins
            del model.final_norm


def _held(
    name: str, parameter: nn.Parameter, shapes: dict[str, torch.Size], config: Config, topology: Topology
) -> Held:
    tied_head = name == "head.weight" and config.model.tie_embeddings
    name = "embed.weight" if tied_head else name
    tensor = topology.tensor
    split = split_of(name, config.parallel.sequence_parallel)
    box = box_of(name, shapes[name], tensor.rank(), tensor.size())
    is_shared = is_on_both_ends(name, config)
    is_counted = not (is_shared and topology.is_last_stage and not topology.is_first_stage)
    return Held(parameter, name, shapes[name], box, split, is_counted)
