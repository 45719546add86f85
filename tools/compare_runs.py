"""Are two runs equal, bit for bit? For a change that must not change results, a resume, or another machine.

    python tools/compare_runs.py runs/before runs/after

Compared are the tensors of the newest whole checkpoint of each run, and every value of every row of
metrics.jsonl except measured ones: keys that end in _seconds, _per_second, _gib, mfu or hfu.
Exit code: 0 equal, 1 different, 2 there is nothing to compare.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleeptrain.checkpoint.manifest import CheckpointError
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.store import find_latest

EQUAL, DIFFERENT, UNUSABLE = 0, 1, 2
MEASURED = ("_seconds", "_per_second", "_gib", "mfu", "hfu")  # endings of keys that differ from run to run


class UnusableError(Exception):
    """A run folder lacks what is to be compared."""


def main(arguments: list[str] | None = None) -> int:
    """Prints what was compared or the first differences; returns the exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="a run folder: holds checkpoints/ and metrics.jsonl")
    parser.add_argument("b", type=Path, help="the run folder to compare it with")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="differences to print (default 10)")
    options = parser.parse_args(arguments)
    try:
        runs = [(final_checkpoint(folder), metrics(folder)) for folder in (options.a, options.b)]
    except (UnusableError, CheckpointError) as error:
        print(f"nothing compared: {error}", file=sys.stderr)
        return UNUSABLE
    (final_a, rows_a), (final_b, rows_b) = runs
    found = [*tensor_differences(final_a, final_b), *metric_differences(rows_a, rows_b)]
    for line in found[: options.show]:
        print(line)
    if found:
        print(f"DIFFERENT in {len(found)} places, {min(len(found), options.show)} of them shown")
        return DIFFERENT
    num_values = sum(len(row) for row in rows_a)
    print(
        f"EQUAL: {len(tensor_names(final_a))} tensors of step {final_a.step}, {len(rows_a)} rows and "
        f"{num_values} values of metrics with {len({key for row in rows_a for key in row})} keys"
    )
    return EQUAL


def final_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint of a run, with tensors in it; raises UnusableError or CheckpointError."""
    checkpoint = find_latest(folder / "checkpoints", lambda line: print(f"{folder}: {line}", file=sys.stderr))
    if checkpoint is None:
        raise UnusableError(f"{folder / 'checkpoints'} holds no checkpoint")
    if not tensor_names(checkpoint):
        raise UnusableError(f"{checkpoint.path} holds no tensors")
    return checkpoint


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` without measured keys; raises UnusableError if they hold no value."""
    path = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        kept = [{key: value for key, value in row.items() if not key.endswith(MEASURED)} for row in rows]
    except (OSError, ValueError, AttributeError) as error:
        raise UnusableError(f"{path} cannot be read as rows of metrics ({error})") from error
    if not any(row.keys() - {"step"} for row in kept):
        raise UnusableError(f"{path} holds no values to compare")
    return kept


def tensor_names(checkpoint: Checkpoint) -> set[tuple[str, str]]:
    """(group, name) of each tensor."""
    return {(group, name) for group in checkpoint.groups for name in checkpoint.names(group)}


def tensor_differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """One line per tensor that differs in existence, dtype, shape or any bit; or that the steps differ."""
    if a.step != b.step:
        yield f"final checkpoints: step {a.step} and step {b.step}, so their tensors were not compared"
        return
    left, right = tensor_names(a), tensor_names(b)
    for place in sorted(left | right):
        name = "/".join(place)
        if place not in left or place not in right:
            yield f"{name}: only in the {'first' if place in left else 'second'} run"
            continue
        x, y = a.read(*place), b.read(*place)
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            yield f"{name}: {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
        elif not torch.equal(_bits(x), _bits(y)):
            yield f"{name}: max abs difference {_max_difference(x, y):.6g}"


def metric_differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[str]:
    """One line per value that is not the same number, text or list in both; rows are paired in order."""
    if len(a) != len(b):
        yield f"metrics.jsonl: {len(a)} rows and {len(b)} rows"
    for number, (left, right) in enumerate(zip(a, b), 1):
        for key in sorted(left.keys() | right.keys()):
            x, y = (json.dumps(row[key]) if key in row else "absent" for row in (left, right))
            if x != y:  # as text: NaN equals NaN, and 0.0 is not -0.0
                yield f"metrics.jsonl row {number}, step {left.get('step')}: {key} is {x} and {y}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _max_difference(x: Tensor, y: Tensor) -> float:
    """NaN if only one of two values is NaN; 0.0 if only signs of zero or NaN payloads differ."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs()).max().item()


if __name__ == "__main__":
    sys.exit(main())
