"""What crosses the border of a window: fast weights, surviving keys and values, tails, and no more."""

import itertools

import pytest
import torch
from plain import WINDOW, assert_same, build, gradients, make, plain_nll
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleeptrain.model import window_state
from sleeptrain.model.sleep import Walk
from sleeptrain.model.state import map_tensors

EVERY_KIND = "attn jet swa:3 gdn"
CROSSINGS = [
    {"eviction": "hard", "convolution": "reset"},
    {"eviction": "hard", "convolution": "carried"},
    {"eviction": "sliding", "convolution": "carried"},
    {"eviction": "sliding", "convolution": "reset", "sliding_kv": "per_pass"},
]


def label(settings: dict) -> str:
    return "-".join(map(str, settings.values()))


def at_borders(monkeypatch: pytest.MonkeyPatch, change) -> None:
    end = window_state.Passes.end
    monkeypatch.setattr(window_state.Passes, "end", lambda self, *rest: map_tensors(change, end(self, *rest)))


def of_floats(function):
    return lambda x: function(x) if x.is_floating_point() else x


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
def test_zeroing_what_crosses_forgets_earlier_windows_exactly(crossing: dict, monkeypatch) -> None:
    model, batch = build(EVERY_KIND, **crossing), make(3 * WINDOW, [2], 1)
    first_changed = make(3 * WINDOW, [2], 1)
    first_changed.ids[:, : 2 * WINDOW] = (first_changed.ids[:, : 2 * WINDOW] + 1) % 13
    assert not torch.equal(model(batch, 2).nll, model(first_changed, 2).nll)
    at_borders(monkeypatch, torch.zeros_like)  # the validity of cached keys, too
    assert torch.equal(model(batch, 2).nll, model(first_changed, 2).nll)


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
def test_the_first_window_gets_its_gradient_only_through_what_crosses(crossing: dict, monkeypatch) -> None:
    model, batch = build(EVERY_KIND, **crossing), make(2 * WINDOW, [1], 1)
    batch.ids.copy_(torch.arange(2 * WINDOW))

    def first_window() -> Tensor:
        return gradients(model(batch, 3).loss_sum, model)["embed.weight"][:WINDOW]

    assert (first_window() != 0).any(dim=1).all()
    at_borders(monkeypatch, of_floats(Tensor.detach))
    assert (first_window() == 0).all()


def test_hard_eviction_with_reset_leaves_fast_weights_alone() -> None:
    state = build(EVERY_KIND)(make(2 * WINDOW, [1]), 2).state
    assert [s.memory is not None for s in state] == [False, True, False, True]
    assert all(s.tail is None and s.caches == () for s in state)


@pytest.mark.parametrize(("sliding_kv", "num_caches"), [("last_pass", 1), ("per_pass", 3)])
def test_surviving_keys_and_values_are_bounded(sliding_kv: str, num_caches: int) -> None:
    model = build(EVERY_KIND, eviction="sliding", sliding_kv=sliding_kv, schedule="predict_then_consolidate")
    walk, h = Walk(model, make(5 * WINDOW, range(5)), 3), torch.empty(0)
    for index, visit in enumerate(walk.visits):
        if visit.window == 4:
            break
        h, _ = walk.visit(index, h)
    state = walk.carry.passes.start
    assert [len(s.caches) for s in state] == [num_caches, 0, num_caches, 0]
    assert {c.keys.shape[1] for c in state[0].caches} == {WINDOW - 1}
    assert {c.keys.shape[1] for c in state[2].caches} == {2}
    assert state[0].caches[0].positions.tolist() == [[-4, -3, -2, -1]] * 2


# Left pads of different counts, whole windows of them, right pads in the last window and in one before.
PADDED = [
    "xxxxx xxxxx xxxxx",
    "---xx xxxxx xxxx-",
    "----- --xxx xxxxx",
    "xxxxx xxx-- xx---",
    "----- ----- xxx--",
]


def real_tokens() -> Tensor:
    return torch.tensor([[c == "x" for c in row.replace(" ", "")] for row in PADDED])


@pytest.mark.parametrize("pattern", ["attn gdn", "swa:3 jet", EVERY_KIND])
@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
def test_pads_are_exact_no_ops(pattern: str, crossing: dict) -> None:
    """Each row alone and without its pads, in windows of its real tokens: same losses and gradients."""
    model = build(pattern, prelude_blocks=1 if pattern == EVERY_KIND else 0, **crossing)
    batch = make(3 * WINDOW, [2], len(PADDED), valid=real_tokens())
    output, expected = model(batch, 3), torch.zeros((), dtype=torch.float64)
    for row, real in enumerate(batch.valid):
        counts = [int(part.sum()) for part in real.split(WINDOW)]
        borders = itertools.pairwise([0, *itertools.accumulate(counts)])
        windows = [(start, stop, w == 2) for w, (start, stop) in enumerate(borders) if start < stop]
        nll = plain_nll(model, batch.ids[row : row + 1, real], batch.targets[row : row + 1, real], windows, 3)
        torch.testing.assert_close(output.nll[row, real], nll[0].detach(), rtol=1e-10, atol=1e-10)
        expected = expected + nll.sum()
    assert_same(gradients(output.loss_sum, model), gradients(expected, model))


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
def test_what_a_pad_holds_is_never_seen(crossing: dict) -> None:
    model, valid = build(EVERY_KIND, **crossing), real_tokens()
    batch = make(3 * WINDOW, [2], len(PADDED), valid=valid)
    before = model(batch, 2)
    batch.ids[~valid] = (batch.ids[~valid] + 5) % 13
    assert torch.equal(model(batch, 2).nll, before.nll)


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
@pytest.mark.parametrize("learned", [False, True])
def test_reset_is_running_the_document_alone(crossing: dict, learned: bool) -> None:
    model = build(EVERY_KIND, learned_initial_state=learned, **crossing)
    starts = torch.tensor([[True, False, True], [True, False, False], [True, True, False]])
    batch = make(3 * WINDOW, [2], 3, reset_state=starts)
    output, expected = model(batch, 3), torch.zeros((), dtype=torch.float64)
    for row, first in enumerate([2, 0, 1]):
        ids, targets = (x[row : row + 1, first * WINDOW :] for x in (batch.ids, batch.targets))
        windows = [(w * WINDOW, (w + 1) * WINDOW, w == 2 - first) for w in range(3 - first)]
        nll = plain_nll(model, ids, targets, windows, 3)
        torch.testing.assert_close(output.nll[row, first * WINDOW :], nll[0].detach(), rtol=1e-10, atol=1e-10)
        expected = expected + nll.sum()
    assert_same(gradients(output.loss_sum, model), gradients(expected, model))


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
def test_a_state_can_be_continued_split_and_saved(crossing: dict, tmp_path) -> None:
    """Four sequences over two windows equal two pairs that go on from a stored state."""
    model, batch = build(EVERY_KIND, **crossing), make(2 * WINDOW, [0, 1], 4)
    first, second = make(WINDOW, [0], 4), make(WINDOW, [0], 4)
    for part, span in ((first, slice(0, WINDOW)), (second, slice(WINDOW, None))):
        part.ids.copy_(batch.ids[:, span])
        part.targets.copy_(batch.targets[:, span])
    whole, state = model(batch, 2), model(first, 2).state
    for rows in (slice(0, 2), slice(2, 4)):
        leaves: list[Tensor] = []
        map_tensors(lambda x, rows=rows, leaves=leaves: leaves.append(x[rows].contiguous()) or x, state)
        save_file({str(i): x for i, x in enumerate(leaves)}, tmp_path / "state.safetensors")
        stored, order = load_file(tmp_path / "state.safetensors"), itertools.count()
        restored = map_tensors(lambda _, stored=stored, order=order: stored[str(next(order))], state)
        continued = model(second.rows(rows), 2, state=restored)
        torch.testing.assert_close(continued.nll, whole.nll[rows, WINDOW:], rtol=1e-12, atol=1e-12)
        expected = map_tensors(lambda x, rows=rows: x[rows], whole.state)
        torch.testing.assert_close(continued.state, expected, rtol=1e-12, atol=1e-12)
