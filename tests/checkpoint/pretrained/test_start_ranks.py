"""Imported weights on tensor and pipeline ranks: each reads its part, and together they predict what one
process does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from importing import import_to
from layouts import TINY_JET, TINY_OURO, write_tiny
from ranks import run_ranks
from small import batch_of, held_out
from torch import Tensor

from sleeptrain.config import Config, ParallelConfig, RunConfig, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.engine.restored import restore
from sleeptrain.engine.resume import initial_weights
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.topology import join

pytestmark = pytest.mark.more
VOCAB = 62


def losses_of_rank(config: Config, batch: Batch, num_passes: int) -> tuple[Tensor, int]:
    """Of every token, and how many weights this rank holds."""
    backend = MegatronDeepspeedBackend(config, VOCAB, join(config.parallel, torch.device("cpu")))
    backend.start_from(initial_weights(config, VOCAB))
    return backend.evaluate(batch, num_passes).nll, sum(h.parameter.numel() for h in backend.held)


def write_model(kind: str, folder: Path) -> None:
    if kind in ("ouro", "jet"):
        write_tiny(folder, {"ouro": TINY_OURO, "jet": TINY_JET}[kind], torch.bfloat16)
        return
    from tiny_models import build

    build(kind, torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        ("llama", {"tensor_size": 2}),
        ("ouro", {"tensor_size": 2, "zero_stage": 0}),
        ("ouro", {"tensor_size": 2, "pipeline_size": 2}),
        ("jet", {"tensor_size": 2, "sequence_parallel": True}),
        ("jet", {"pipeline_size": 2}),
        ("qwen3_5", {"tensor_size": 2}),
        ("qwen3_5", {"data_size": 2, "zero_stage": 3}),
        ("olmo_hybrid", {"tensor_size": 2}),
    ],
    ids=str,
)
def test_ranks_predict_what_one_process_does(kind: str, degrees: dict[str, Any], tmp_path: Path) -> None:
    write_model(kind, tmp_path / "model")
    config = import_to(tmp_path / "model", tmp_path / "run")
    num_passes = 2 if any(block.is_fast_weight for block in config.model.blocks) else 1
    sleep = replace(SleepConfig(window_tokens=6), norm_between_passes=config.sleep.norm_between_passes)
    run = RunConfig(init_from=str(tmp_path / "run"), device="cpu")
    config = replace(config, sleep=sleep if num_passes > 1 else replace(sleep, num_passes=1), run=run)
    batch = held_out(batch_of())
    alone = restore(tmp_path / "run", "cpu").backend.model
    alone.sleep = config.sleep
    with torch.no_grad():
        expected = alone(batch, num_passes).nll
    parallel = replace(config, parallel=ParallelConfig(**degrees))
    size = degrees.get("tensor_size", 1) * degrees.get("pipeline_size", 1)
    ranks = run_ranks(max(size, degrees.get("data_size", 1)), losses_of_rank, parallel, batch, num_passes)
    for nll, held in ranks:
        torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)
        if size > 1:
            assert held < 0.75 * sum(p.numel() for p in alone.parameters())
