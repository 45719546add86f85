"""Batches that go on with the state of the batch before: a document of k T tokens in k batches of T equals
one walk over it whose state is detached at the borders of batches."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from plain import WINDOW, assert_same, build, gradients, make, plain_nll, spans
from torch import Tensor

from sleeptrain.data.batch import Batch
from sleeptrain.model import SleepModel
from sleeptrain.model.sleep import Walk
from sleeptrain.model.state import State, map_tensors

NUM_BATCHES, WINDOWS = 3, 2  # of each batch
TOKENS = NUM_BATCHES * WINDOWS * WINDOW
EVERY_KIND = "attn jet swa:7 gdn"  # one band reaches back over a whole window
CROSSINGS = [
    {"eviction": "hard"},
    {"eviction": "hard", "convolution": "carried", "prelude_blocks": 1, "coda_blocks": 1},
    {"eviction": "sliding", "coda_blocks": 1},
    {"eviction": "sliding", "convolution": "reset", "prelude_blocks": 1},
    {"eviction": "sliding", "sliding_kv": "per_pass", "backprop_passes": 1},
    {"eviction": "sliding", "window_tokens": WINDOWS * WINDOW},  # a batch is one window
]
EVERY = range(NUM_BATCHES * WINDOWS)
LOSSES = {"consolidate_or_predict": [0, 2, 3, 4], "predict_then_consolidate": EVERY}


def label(settings: dict | str) -> str:
    return settings if isinstance(settings, str) else "-".join(map(str, settings.values()))


def document(losses: Sequence[int], window: int = WINDOW) -> Batch:
    """Three rows; the second one has pads in the middle, the last one at the very start."""
    valid = torch.ones(3, TOKENS, dtype=torch.bool)
    valid[1, 3 * WINDOW : 3 * WINDOW + 2] = False
    valid[2, :3] = False
    losses = [w for w in losses if w * window < TOKENS]
    return make(TOKENS, losses, 3, window, valid=valid)


def batches_of(whole: Batch) -> list[Batch]:
    """A long batch as consecutive ones."""
    size, tokens = len(whole.windows_with_loss) // NUM_BATCHES, TOKENS // NUM_BATCHES
    parts = []
    for b in range(NUM_BATCHES):
        here = slice(b * tokens, (b + 1) * tokens)
        resets = None if whole.reset_state is None else whole.reset_state[:, b * size : (b + 1) * size]
        part = replace(
            whole,
            **{name: getattr(whole, name)[:, here] for name in ("ids", "targets", "loss_mask", "valid")},
            reset_state=resets,
            windows_with_loss=whole.windows_with_loss[b * size : (b + 1) * size],
        )
        parts.append(replace(part, num_targets=int(part.loss_mask.sum())))
    return parts


def carried(model: SleepModel, batches: Sequence[Batch], num_passes: int) -> tuple[Tensor, Tensor, State]:
    """Losses per token of all batches, their sum, and the state at the end."""
    state, outputs = None, []
    for batch in batches:
        outputs.append(model(batch, num_passes, state, is_continued=True))
        state = map_tensors(Tensor.detach, outputs[-1].state)
    return torch.cat([o.nll for o in outputs], dim=1), torch.stack([o.loss_sum for o in outputs]).sum(), state


def detached_walk(model: SleepModel, whole: Batch, num_passes: int) -> tuple[Tensor, Tensor, State]:
    """The same in one walk, detached where a batch begins."""
    walk, h, loss_sum = Walk(model, whole, num_passes, is_continued=True), torch.empty(0), 0
    size, before = len(walk.windows) // NUM_BATCHES, -1
    for index, visit in enumerate(walk.visits):
        if visit.window != before and visit.window % size == 0:
            walk.carry = map_tensors(Tensor.detach, walk.carry)
        h, loss = walk.visit(index, h)
        loss_sum, before = loss_sum + (0 if loss is None else loss), visit.window
    return walk.nll, loss_sum, walk.carry.passes.start


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
@pytest.mark.parametrize("schedule", LOSSES)
@pytest.mark.parametrize("num_passes", [1, 3])
def test_batches_equal_one_walk_over_the_document(crossing: dict, schedule: str, num_passes: int) -> None:
    """Losses, gradients and the state that is left."""
    model = build(EVERY_KIND, schedule=schedule, **crossing)
    whole = document(LOSSES[schedule], model.sleep.window_tokens)
    parts = batches_of(whole)
    nll, loss, left = carried(model, parts, num_passes)
    true_nll, true_loss, true_left = detached_walk(model, whole, num_passes)
    torch.testing.assert_close(nll, true_nll, rtol=1e-12, atol=1e-12)
    assert_same(gradients(loss, model), gradients(true_loss, model), 1e-12)
    map_tensors(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), left, true_left)
    fresh = torch.cat([model(part, num_passes).nll for part in parts], dim=1)
    first = slice(0, TOKENS // NUM_BATCHES)
    torch.testing.assert_close(fresh[:, first], nll[:, first])
    later = (fresh - nll).abs()[:, first.stop :] > 1e-3
    assert later.any(1).all()  # the negative control: without carrying, each row of later batches differs


@pytest.mark.parametrize("crossing", CROSSINGS[:5], ids=label)
def test_losses_are_those_of_the_plain_model_on_the_document(crossing: dict) -> None:
    model = build(EVERY_KIND, schedule="predict_then_consolidate", **crossing)
    whole = make(TOKENS, EVERY)
    parts = batches_of(replace(whole, valid=torch.ones_like(whole.loss_mask)))
    expected = plain_nll(model, whole.ids, whole.targets, spans(whole), 3)
    torch.testing.assert_close(carried(model, parts, 3)[0], expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_row_whose_document_starts_is_as_fresh_and_the_others_go_on(eviction: str) -> None:
    model = build(EVERY_KIND, schedule="predict_then_consolidate", eviction=eviction)
    going_on = batches_of(document(EVERY))
    starts = torch.zeros(3, WINDOWS, dtype=torch.bool)
    starts[1, 0] = True
    starting = [going_on[0], replace(going_on[1], reset_state=starts), going_on[2]]
    tokens = TOKENS // NUM_BATCHES
    usual, reset = (carried(model, batches, 3)[0] for batches in (going_on, starting))
    assert torch.equal(reset[[0, 2]], usual[[0, 2]])
    assert torch.equal(reset[:, :tokens], usual[:, :tokens])
    fresh = carried(model, going_on[1:], 3)[0]
    torch.testing.assert_close(reset[1, tokens:], fresh[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(reset[1, tokens:], usual[1, tokens:], rtol=1e-3)


def test_a_learned_start_learns_from_the_rows_that_start_alone() -> None:
    model = build("attn gdn", learned_initial_state=True)
    first, second, _ = batches_of(document([1, 3]))
    state = map_tensors(Tensor.detach, model(first, 2, is_continued=True).state)
    for start in (False, True):
        batch = replace(second, reset_state=torch.tensor([[start, False]] * 3))
        gradient = gradients(model(batch, 2, state, is_continued=True).loss_sum, model)["initial_memory.1"]
        assert gradient.any() == start


def test_what_comes_after_the_last_loss_needs_no_graph() -> None:
    model = build("attn gdn", eviction="sliding")
    [batch, *_] = batches_of(document([0]))
    walk, h, graphs = Walk(model, batch, 2, is_continued=True), torch.empty(0), []
    for index in range(len(walk.visits)):
        h, _ = walk.visit(index, h)
        graphs.append(h.requires_grad)
    assert graphs == [not visit.is_after_loss for visit in walk.visits] == [True, False, False]
