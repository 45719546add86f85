"""Small models and batches of all kinds."""

import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sleeptrain.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SleepConfig,
)
from sleeptrain.data.batch import Batch

VOCAB, WINDOW, TOKENS, ROWS = 14, 6, 16, 8  # three windows, the last one ragged
CARRY: dict[str, Any] = {"carry_between_batches": True, "shards": ("documents",)}
SMALL: dict[str, Any] = {
    "d_model": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "memory_heads": 4,
    "memory_qk_heads": 2,
    "memory_key_dim": 4,
    "memory_value_dim": 3,
    "jet_reduction": 2,
    "mlp_dim": 8,
    "init_std": 0.05,
    "embedding_init_std": 1.0,
    "window_tokens": WINDOW,
    "batch_sequences": ROWS,
    "muon_lr": 0.01,
    "adamw_lr": 0.01,
    "weight_decay": 0.1,
    "device": "cpu",
}


def config_of(tensor: int = 1, pipeline: int = 1, data: int = 1, **settings: Any) -> Config:
    """Degrees, and settings of any section by their name alone."""
    left = SMALL | {"tensor_size": tensor, "pipeline_size": pipeline, "data_size": data} | settings
    sections = {}
    for section, kind in (
        ("run", RunConfig),
        ("model", ModelConfig),
        ("sleep", SleepConfig),
        ("data", DataConfig),
        ("parallel", ParallelConfig),
        ("optim", OptimConfig),
    ):
        own = {f.name: left.pop(f.name) for f in fields(kind) if f.name in left}
        sections[section] = kind(**own)
    assert not left, left
    return Config(**sections)


def batch_of(
    loss_windows: Sequence[int] = (2,),
    padded: bool = False,
    resets: bool = False,
    seed: int = 0,
    num_tokens: int = TOKENS,
    num_rows: int = ROWS,
) -> Batch:
    """Random tokens, and targets at some of those of the ``loss_windows``; pads, borders of documents and the
    first of several windows with a loss are in the second half of the rows alone."""
    draw = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(VOCAB, (2, num_rows, num_tokens), generator=draw)
    late = torch.arange(num_rows)[:, None] >= num_rows // 2
    of_window = torch.arange(num_tokens) // WINDOW
    mask = torch.isin(of_window, torch.tensor(list(loss_windows))) & (
        torch.rand(ids.shape, generator=draw) < 0.7
    )
    if len(loss_windows) > 1:
        mask &= (of_window != loss_windows[0]) | late
    valid = reset_state = None
    if padded:
        num_pads = torch.randint(1, num_tokens - WINDOW, (num_rows, 1), generator=draw) * late
        valid = torch.arange(num_tokens) >= num_pads
        mask &= valid
    if resets:
        reset_state = late & (torch.rand(num_rows, int(of_window[-1]) + 1, generator=draw) < 0.4)
    difficulty = torch.zeros(num_rows, dtype=torch.long)
    keys = torch.arange(num_rows) + seed * num_rows
    batch = Batch(ids, targets, mask, valid, reset_state, difficulty, (), 0, keys)
    return rows_of(batch, slice(None))


def rows_of(batch: Batch, chosen: slice) -> Batch:
    """Some rows as the data stream would have made them: with the plan, targets and pads of their own."""
    part = batch.rows(chosen)
    has_loss = part.loss_mask.any(0)
    plan = tuple(bool(w.any()) for w in has_loss.split(WINDOW))
    valid = None if part.valid is None or part.valid.all() else part.valid
    return replace(part, valid=valid, windows_with_loss=plan)


def held_out(batch: Batch) -> Batch:
    """Seven rows for an evaluation: a number that nothing divides."""
    return replace(rows_of(batch, slice(0, 7)), example_keys=None)


def disturbed(name: str, shape: torch.Size) -> Tensor:
    """What is added to an initial weight, so that none of them is all zero or all one."""
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
