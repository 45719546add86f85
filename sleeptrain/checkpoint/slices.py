"""Slices of logical tensors: what one process holds of a whole one, and where two cuts of it meet.

A logical tensor is a weight or a moment as one process alone would hold it. A tensor-parallel process holds
a *box* of it, (start, stop) per dimension; ZeRO leaves it a *range* of that box, elements start to stop in
row-major order. A plain parameter is the whole range of the whole box. Any cut can be read from any other.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

Box = tuple[tuple[int, int], ...]


class Slice(NamedTuple):
    """Elements ``start``, ``start + 1``, ... of a box of the logical tensor ``name``.

    ``shape`` is that of the whole tensor, ``box`` is () for a scalar, ``values`` is 1-D, on any device,
    strided or not, and may be empty. Over all processes the boxes of a tensor do not overlap, and the slices
    of a box cover it once.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    start: int
    values: Tensor


class Range(NamedTuple):
    """Elements ``start`` to ``stop`` of a box, in row-major order inside it."""

    box: Box
    start: int
    stop: int


def whole(name: str, tensor: Tensor) -> Slice:
    """The slice of a process that holds all of a tensor."""
    shape = tuple(tensor.shape)
    return Slice(name, shape, whole_box(shape), 0, tensor.detach().reshape(-1))


def whole_box(shape: Sequence[int]) -> Box:
    """(4, 6) -> ((0, 4), (0, 6))."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """((2, 4), (0, 6)) -> (2, 6)."""
    return tuple(stop - start for start, stop in box)


def num_elements(box: Box) -> int:
    """1 for a scalar."""
    return math.prod(box_shape(box))


def common(a: Range, b: Range) -> list[Box]:
    """What two ranges of the same tensor share, as few boxes that do not overlap."""
    crossings = (_intersection(x, y) for x in _rectangles(a) for y in _rectangles(b))
    return [box for box in crossings if num_elements(box)]


def view(values: Tensor, of: Range, box: Box) -> Tensor:
    """``values`` are the elements of a range, contiguous; a view of those in ``box``, which lies in it."""
    strides = _strides(box_shape(of.box))
    first = sum((start - origin) * stride for (start, _), (origin, _), stride in zip(box, of.box, strides))
    return values.as_strided(box_shape(box), strides, values.storage_offset() + first - of.start)


def flaw(shape: Sequence[int], ranges: Iterable[Range]) -> str | None:
    """Why the ranges do not hold every element of a tensor exactly once; None if they do."""
    by_box: dict[Box, list[tuple[int, int]]] = {}
    for box, start, stop in ranges:
        by_box.setdefault(box, []).append((start, stop))
    for box, parts in by_box.items():
        if len(box) != len(shape) or any(not 0 <= a <= b <= size for (a, b), size in zip(box, shape)):
            return f"a slice lies outside of its shape {list(shape)}"
        reached = 0
        for start, stop in sorted(parts):
            if start != reached:
                return "elements are missing" if start > reached else "elements are held twice"
            reached = stop
        if reached != num_elements(box):
            return "elements are missing"
    boxes = [box for box in by_box if num_elements(box)]
    if _overlap(boxes):
        return "elements are held twice"
    held = sum(num_elements(box) for box in boxes)
    return None if held == math.prod(shape) else "elements are missing"


def _rectangles(of: Range) -> list[Box]:
    """A range as at most 2 d - 1 boxes: what is left of a row, whole rows, the beginning of a row."""
    rows = _rows(box_shape(of.box), of.start, of.stop)
    return [tuple((o + a, o + b) for (o, _), (a, b) in zip(of.box, row)) for row in rows]


def _rows(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start, stop),) if shape else ()]
    row = math.prod(shape[1:])
    (first, skipped), (last, rest) = divmod(start, row), divmod(stop, row)
    if first == last:
        return [((first, first + 1), *inner) for inner in _rows(shape[1:], skipped, rest)]
    found: list[Box] = []
    if skipped:
        found += [((first, first + 1), *inner) for inner in _rows(shape[1:], skipped, row)]
        first += 1
    if first < last:
        found.append(((first, last), *whole_box(shape[1:])))
    return found + [((last, last + 1), *inner) for inner in _rows(shape[1:], 0, rest)]


def _intersection(a: Box, b: Box) -> Box:
    pairs = [(max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b)]
    return tuple((start, max(start, stop)) for start, stop in pairs)


def _overlap(boxes: list[Box]) -> bool:
    """Whether any two boxes share an element: a sweep along the dimension that is cut most finely."""
    if len(boxes) < 2:
        return False
    axis = max(range(len(boxes[0])), key=lambda d: len({box[d] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[axis]):
        open_boxes = [other for other in open_boxes if other[axis][1] > box[axis][0]]
        if any(num_elements(_intersection(box, other)) for other in open_boxes):
            return True
        open_boxes.append(box)
    return False


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
