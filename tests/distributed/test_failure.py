"""One process fails: all end within seconds, each with its own log, and the first error is named."""

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import TIMEOUT_SECONDS

from sleeptrain.engine.trainer import Trainer
from sleeptrain.pretrain import main

SMALL = ["optim.num_steps=4", "eval.num_examples=4", "data.batch_sequences=8", "log.every_steps=1"]


def exit_codes(folder: Path, num_ranks: int, arguments: list[str], sabotage: Callable[[], None]) -> list[int]:
    """Of ``python -m sleeptrain.pretrain`` in each of ``num_ranks`` forked processes."""
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
                meet = f"file://{folder}/meet"
                dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=num_ranks)
                sabotage()
                code = main(["experiment=quickstart", f"run.dir={folder}/run", *SMALL, *arguments])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def nothing() -> None:
    """No sabotage."""


def log_of(folder: Path, rank: int) -> str:
    return (folder / "run" / "logs" / f"rank_{rank}.log").read_text()


def fail_on_rank_1() -> None:
    train_step = Trainer.train_step

    def step(trainer: Trainer):
        if trainer.step == 2 and os.environ["RANK"] == "1":
            raise OSError("the disk of this node is gone")
        return train_step(trainer)

    Trainer.train_step = step


def hang_on_rank_0_fail_on_rank_1() -> None:
    fail_on_rank_1()
    train_step = Trainer.train_step

    def step(trainer: Trainer):
        if trainer.step == 2 and os.environ["RANK"] == "0":
            time.sleep(TIMEOUT_SECONDS)
        return train_step(trainer)

    Trainer.train_step = step


@pytest.mark.parametrize("degrees", ["dp2", "pp2"])
def test_the_others_end_and_name_the_first(tmp_path: Path, degrees: str) -> None:
    start = time.monotonic()
    codes = exit_codes(tmp_path, 2, [f"parallel={degrees}"], fail_on_rank_1)
    assert codes == [1, 1]
    assert time.monotonic() - start < TIMEOUT_SECONDS / 2
    assert "rank 1 failed first: OSError: the disk of this node is gone" in log_of(tmp_path, 0)
    assert "the disk of this node is gone" in log_of(tmp_path, 1)


@pytest.mark.more
def test_a_process_that_hangs_meanwhile_is_ended_too(tmp_path: Path) -> None:
    start = time.monotonic()
    assert exit_codes(tmp_path, 2, ["parallel=dp2"], hang_on_rank_0_fail_on_rank_1) == [1, 1]
    assert time.monotonic() - start < TIMEOUT_SECONDS / 2
    assert "rank 1 failed first" in log_of(tmp_path, 0)


@pytest.mark.parametrize(
    ("num_ranks", "arguments", "sentence"),
    [
        (2, ["parallel=tp2_pp2"], "needs 4 processes and there are 2; start that many"),
        (2, ["parallel=single"], "needs 1 processes and there are 2"),
        (3, ["parallel.tensor_size=2"], "replicas of 2 processes, which do not divide the 3 that run"),
        (2, ["parallel=tp2", "model.memory_qk_heads=1"], "does not divide model.memory_qk_heads=1"),
        (2, ["parallel=tp2", "model.num_kv_heads=1"], "does not divide model.num_kv_heads=1"),
        (
            2,
            ["parallel=tp2", "task.num_strings=3"],
            "the vocabulary=5; set model.vocab_multiple to round",
        ),
        (2, ["parallel=pp2", "model.pattern=attn gdn gdn"], "does not divide the 3 looped blocks"),
        (2, ["parallel=pp2", "data.micro_batch_sequences=8"], "needs a multiple of 2 microbatches and has 1"),
        (2, ["parallel=dp2", "data.batch_sequences=9"], "data.batch_sequences=9 does not divide among 2"),
        (2, ["parallel=dp2", "data.micro_batch_sequences=8"], "does not divide the 4 rows"),
        (2, ["parallel=pp2", "parallel.zero_stage=3"], "parallel.zero_stage=3 does not go with"),
        (2, ["parallel.backend=local"], "parallel.backend=local is one process, and 2 were started"),
        (
            2,
            ["parallel=tp2", "parallel.sequence_parallel=true", "task.width=9", "sleep.window_tokens=9"],
            "one has 9 tokens",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_degrees_that_do_not_fit_are_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture, num_ranks: int, arguments: list[str], sentence: str
) -> None:
    assert exit_codes(tmp_path, num_ranks, arguments, nothing) == [2] * num_ranks
    [_, error] = capfd.readouterr().err.split("error: ")  # the lowest says it for all
    assert sentence in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_arguments_on_one_process_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def other_seed_on_rank_1() -> None:
        if os.environ["RANK"] == "1":
            SMALL.append("run.seed=7")

    assert 0 not in exit_codes(tmp_path, 2, ["parallel=dp2"], other_seed_on_rank_1)
    assert "rank 1 was started with other settings than rank 0" in log_of(tmp_path, 0) + log_of(tmp_path, 1)
