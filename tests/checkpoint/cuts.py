"""Logical tensors cut as distributed runs cut them, and small checkpoints to damage."""

import random
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sleeptrain.checkpoint.manifest import step_name
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.slices import Box, Slice, box_shape, num_elements, whole, whole_box


def boxes(shape: tuple[int, ...], dim: int, num_parts: int) -> list[Box]:
    """Cut along one dimension into parts that differ by at most one; some are empty if there are many."""
    edges = [shape[dim] * part // num_parts for part in range(num_parts + 1)]
    return [
        tuple((a, b) if d == dim else side for d, side in enumerate(whole_box(shape)))
        for a, b in pairwise(edges)
    ]


def part(tensor: Tensor, box: Box) -> Tensor:
    """The elements of a box, 1-D."""
    return tensor[tuple(slice(*side) for side in box)].reshape(-1)


def fragments(name: str, tensor: Tensor, box: Box, edges: list[int]) -> list[Slice]:
    """The elements of a box, cut at ``edges`` as ZeRO does."""
    values, edges = part(tensor, box), [0, *edges, num_elements(box)]
    return [Slice(name, tuple(tensor.shape), box, a, values[a:b]) for a, b in pairwise(edges)]


def random_cut(name: str, tensor: Tensor, chance: random.Random) -> list[Slice]:
    """Boxes along a random dimension, each cut at random edges; some slices are empty."""
    cut = [whole_box(tensor.shape)]
    if tensor.dim():
        cut = boxes(tuple(tensor.shape), chance.randrange(tensor.dim()), chance.randint(1, 4))
    found = []
    for box in cut:
        edges = sorted(chance.randint(0, num_elements(box)) for _ in range(chance.randint(0, 3)))
        found += fragments(name, tensor, box, edges)
    chance.shuffle(found)
    return found


def wholes(groups: dict[str, dict[str, Tensor]]) -> dict[str, list[Slice]]:
    return {group: [whole(name, t) for name, t in tensors.items()] for group, tensors in groups.items()}


def save_groups(
    folder: Path,
    step: int,
    groups: dict[str, list[Slice]],
    documents: dict | None = None,
    keep_last: int = 2,
    keep_every_steps: int = 0,
) -> Path:
    """Saves and waits; raises what went wrong."""
    saver = Saver(folder, keep_last, keep_every_steps)
    saver.save(step, groups, documents or {})
    if failure := saver.wait():
        raise failure
    assert saver.committed_step == step
    return folder / step_name(step)


def save_filled(folder: Path, step: int, fill: int | None = None, **options: int) -> Path:
    """A small checkpoint every value of which is ``fill`` (the step unless told)."""
    fill = step if fill is None else fill
    model = {"w": torch.full((300,), float(fill)), "b": torch.tensor(fill)}
    groups = {"model": model, "optimizer": {"w/m": torch.full((7, 5), float(fill))}}
    return save_groups(folder, step, wholes(groups), {"trainer": {"fill": fill}}, **options)


def fill_of(checkpoint) -> int:  # type: ignore[no-untyped-def]
    """The value all of the checkpoint holds; fails if its parts disagree."""
    tensors = [t for group in checkpoint.groups for t in checkpoint.read_all(group).values()]
    values = {v for t in tensors for v in t.flatten().tolist()}
    assert len(tensors) == 3
    assert values == {checkpoint.documents["trainer"]["fill"]}
    return values.pop()


def selected(tensor: Tensor, box: Box, start: int, stop: int) -> Tensor:
    """What ``Checkpoint.read`` must give."""
    assert box_shape(box) == tensor[tuple(slice(*side) for side in box)].shape
    return part(tensor, box)[start:stop]
