"""Calls of tools/make_shards.py, for its tests."""

import contextlib
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fsspec.implementations.local import LocalFileSystem

from sleeptrain.config import Config
from sleeptrain.pretrain import compose_config

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # as where the script itself runs
import make_shards  # noqa: E402

DEPO = ("experiment=depo_small", "task.max_hops=8", "run.seed=5")
SIZES = ("--num-examples", "12", "--shard-samples", "3")


@lru_cache
def composed(settings: tuple[str, ...]) -> Config:
    return compose_config([*settings])


def make(out: object, *arguments: str, num_procs: int = 1) -> int:
    """The exit code; equal settings are composed once, which is what takes longest."""
    with patch("sleeptrain.pretrain.compose_config", lambda settings: composed(tuple(settings))):
        return make_shards.main([str(out), "--num-procs", str(num_procs), *arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_child(action: Callable[[], int]) -> int:
    """The exit code of ``action`` in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 77
        with contextlib.suppress(BaseException):
            code = action()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def plan(out: Path) -> Any:
    return make_shards.plan_of(make_shards.parse([str(out), *SIZES, *DEPO, "--num-procs", "1"]))


def die_at(plan: Any, operation: int) -> bool:
    """Makes the set in a process that dies just before a file operation, or, if that writes a file, after
    half of it. Whether it died: otherwise it was through."""

    def run() -> int:
        done = 0

        def counted(name: str) -> None:
            original = getattr(LocalFileSystem, name)

            def operate(self: Any, *arguments: Any, **keywords: Any) -> Any:
                nonlocal done
                done += 1
                if done == operation:
                    if name == "pipe_file":
                        original(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os._exit(99)
                return original(self, *arguments, **keywords)

            setattr(LocalFileSystem, name, operate)

        for name in ("makedirs", "pipe_file", "mv", "rm"):
            counted(name)
        make_shards.make(plan, 1)
        return 0

    return in_child(run) == 99
