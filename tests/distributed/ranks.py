"""Real processes for the tests: import once, then fork ranks that meet through a file."""

import faulthandler
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sleeptrain.parallel.cpu_compat import prepare_deepspeed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that the two can do without
    prepare_deepspeed(torch.device("cpu"))
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (else each rank does, and torch.compile)

    import sleeptrain.parallel.megatron  # noqa: F401

TIMEOUT_SECONDS = 600  # cores may be shared with other tests
GRACE_SECONDS = 2  # what the others have, once one rank has failed


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` in each of ``num_ranks`` processes with a gloo group; their results by rank.

    Raises AssertionError with the traceback of the first that failed, or when they do not come back; no
    process is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), {}
        for rank in range(num_ranks):
            child = os.fork()
            if child == 0:
                _run(rank, num_ranks, folder, function, arguments)
            children[child] = rank
        missing = _wait(children, folder)
        errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
        assert not errors, f"{errors[0].name}: {errors[0].read_text()}"
        assert not missing, f"ranks did not come back, by rank: {missing}"
        return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(num_ranks)]


def _wait(children: dict[int, int], folder: Path) -> dict[int, str]:
    """Waits for the processes and kills what hangs; how the ranks ended that left no result, with the stacks
    of a crash."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    has_failed, running, codes = False, dict(children), dict[int, int]()
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if not has_failed and any(folder.glob("error_*")):
            has_failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if running and time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            break
        time.sleep(0.005)
    missing = [rank for rank in children.values() if not (folder / f"result_{rank}").exists()]
    crash = {rank: (folder / f"crash_{rank}").read_text() for rank in missing}
    return {rank: f"exit code {codes.get(rank, 'none, it hung')}\n{crash[rank]}" for rank in missing}


def _run(
    rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """In the child: never returns."""
    code = 1
    faulthandler.enable((folder / f"crash_{rank}").open("w"))
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
        result = function(*arguments)
        torch.save(result, folder / f"result_{rank}.part")
        (folder / f"result_{rank}.part").rename(folder / f"result_{rank}")
        code = 0
    except BaseException:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)
