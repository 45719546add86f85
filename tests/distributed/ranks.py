"""Real processes for the tests: import once, then fork ranks that meet through a file."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 120


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` in each of ``num_ranks`` processes with a gloo group; their results by rank.

    Raises AssertionError with the traceback of the first that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = []
        for rank in range(num_ranks):
            child = os.fork()
            if child == 0:
                _run(rank, num_ranks, folder, function, arguments)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
        assert not errors, f"{errors[0].name}: {errors[0].read_text()}"
        results = [folder / f"result_{rank}" for rank in range(num_ranks)]
        assert all(path.exists() for path in results), "a rank died without a word"
        return [torch.load(path, weights_only=False) for path in results]


def _run(
    rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """In the child: never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
        result = function(*arguments)
        torch.save(result, folder / "result.tmp" if False else folder / f"result_{rank}")
        code = 0
    except BaseException:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)
