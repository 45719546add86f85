"""Batches: masks and window plan from what a task gives."""

import numpy as np
import pytest
import torch

from sleeptrain.config import DepoConfig, Rule110Config
from sleeptrain.data.batch import make_batch
from sleeptrain.tasks import Examples, make_task


def test_rule110_has_no_pads_and_asks_in_its_last_window() -> None:
    task = make_task(Rule110Config(width=24, num_strings=4))
    examples = task.examples(0, np.arange(5))
    batch = make_batch(examples, 24)
    assert batch.windows_with_loss == (False, False, False, False, True)
    assert batch.valid is None
    assert batch.reset_state is None
    assert batch.num_targets == 20
    assert batch.ids.tolist() == examples.ids.tolist()
    assert batch.targets.tolist() == examples.targets.tolist()
    assert batch.loss_mask.tolist() == examples.loss_mask.tolist()
    assert make_batch(examples, 0).windows_with_loss == (True,)


def test_depo_keeps_its_left_pads_and_one_plan_for_all_rows() -> None:
    task = make_task(DepoConfig(max_nodes=12, max_queries=3))
    examples = task.examples(0, np.arange(8))
    batch = make_batch(examples, 12)
    assert batch.valid is not None
    assert batch.valid.tolist() == examples.valid.tolist()
    assert not batch.valid.all()
    assert batch.windows_with_loss == (False, False, False, False, True, True)
    assert batch.num_targets == int(batch.loss_mask.sum())


def test_a_window_has_a_loss_if_any_row_has() -> None:
    mask = np.zeros((2, 7), dtype=bool)
    mask[0, 2] = mask[1, 6] = True
    zeros, valid = np.zeros((2, 7), dtype=np.int64), np.ones((2, 7), dtype=bool)
    batch = make_batch(Examples(zeros, zeros, mask, valid, zeros[:, 0]), 3)
    assert batch.windows_with_loss == (True, False, True)


def test_rows_keep_the_plan_of_the_whole() -> None:
    task = make_task(DepoConfig(max_nodes=12, max_queries=3))
    batch = make_batch(task.examples(0, np.arange(6)), 12)
    parts = [batch.rows(slice(s, s + 2)) for s in (0, 2, 4)]
    assert sum(part.num_targets for part in parts) == batch.num_targets
    assert {part.windows_with_loss for part in parts} == {batch.windows_with_loss}
    for name in ("ids", "targets", "loss_mask", "valid", "difficulty"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_a_batch_is_frozen() -> None:
    batch = make_batch(make_task(Rule110Config()).examples(0, np.arange(1)), 12)
    with pytest.raises(AttributeError):
        batch.num_targets = 0
