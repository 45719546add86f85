"""Wake and sleep at inference equals the training loop, however the tokens come."""

import math

import pytest
import torch
import torch.nn.functional as F
from plain import WINDOW, build, make
from torch import Tensor

from sleeptrain.model import SleepModel, session
from sleeptrain.model.halting import Stop
from sleeptrain.model.state import map_tensors

EVERY_KIND = "attn jet gdn swa:3 gdn"
MODES = [
    {"eviction": "hard"},
    {"eviction": "hard", "convolution": "carried"},
    {"eviction": "sliding"},
    {"eviction": "sliding", "convolution": "reset"},
    {"eviction": "sliding", "sliding_kv": "per_pass"},
    {"eviction": "sliding", "prelude_blocks": 1, "coda_blocks": 2},
    {"eviction": "sliding", "sliding_kv": "per_pass", "prelude_blocks": 2, "coda_blocks": 1},
    {"eviction": "hard", "prelude_blocks": 2, "coda_blocks": 2, "norm_between_passes": True},
]


def label(settings: dict) -> str:
    return "-".join(map(str, settings.values()))


def fed(model: SleepModel, ids: Tensor, pieces: list[int], num_passes: int) -> Tensor:
    now, logits = session.begin(model, len(ids)), []
    for piece in ids.split(pieces, dim=1):
        out, now = session.feed(model, now, piece, num_passes)
        logits.append(out)
    return torch.cat(logits, dim=1)


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.mT, targets, reduction="none")


@pytest.mark.parametrize("mode", MODES, ids=label)
def test_pieces_split_anywhere_equal_one_call_of_the_training_loop(mode: dict) -> None:
    model = build(EVERY_KIND, schedule="predict_then_consolidate", **mode)
    length = 3 * WINDOW - 2
    batch = make(length, [0, 1, 2])
    expected = model(batch, 3).nll
    splits = [[at, length - at] for at in range(1, length, 3)] + [[length], [1] * length, [4, 2, 7]]
    for pieces in splits:
        nll = nll_of(fed(model, batch.ids, pieces, 3), batch.targets)
        torch.testing.assert_close(nll, expected, rtol=1e-9, atol=1e-9, msg=str(pieces))


@pytest.mark.parametrize("mode", [m for m in MODES if m.get("sliding_kv") != "per_pass"], ids=label)
def test_a_session_of_the_other_schedule_sleeps_as_in_training(mode: dict) -> None:
    """The coda's writes while awake are provisional: after sleep it has run once, after pass N."""
    model, batch = build(EVERY_KIND, **mode), make(3 * WINDOW - 2, [2])
    nll = nll_of(fed(model, batch.ids, [4, 9], 3), batch.targets)
    torch.testing.assert_close(nll[:, 2 * WINDOW :], model(batch, 3).nll[:, 2 * WINDOW :])


def test_one_pass_forgets_at_the_border_without_sleeping() -> None:
    model, batch = build(), make(2 * WINDOW, [0, 1])
    torch.testing.assert_close(nll_of(fed(model, batch.ids, [3, 7], 1), batch.targets), model(batch, 1).nll)


def test_sleep_on_a_part_of_a_window_and_state_stays_bounded() -> None:
    model = build("attn gdn", eviction="sliding", sliding_kv="per_pass")
    ids = make(8 * WINDOW, []).ids
    _, now = session.feed(model, session.begin(model, 2), ids[:, :3], 2)
    assert now.position_tokens == 3
    now = session.sleep(model, now, 2)
    assert now.position_tokens == 0
    _, now = session.feed(model, now, ids, 2)
    caches = now.start[0].caches
    assert [c.keys.shape[1] for c in caches] == [WINDOW - 1] * 2
    assert caches[0].positions.min() == -(WINDOW - 1)  # relative: a long session stays exact
    assert not now.hidden.requires_grad


def test_sleep_with_nothing_read_changes_nothing() -> None:
    model = build("attn gdn", eviction="sliding")
    ids = make(2 * WINDOW, []).ids
    _, now = session.feed(model, session.begin(model, 2), ids[:, :WINDOW], 2)  # full, so it has slept
    again = session.sleep(model, now, 2)
    expected, _ = session.feed(model, now, ids[:, WINDOW:], 2)
    torch.testing.assert_close(session.feed(model, again, ids[:, WINDOW:], 2)[0], expected)


@pytest.mark.parametrize("call", [session.feed, session.sleep])
def test_less_than_one_pass_is_refused(call) -> None:
    model = build("attn gdn")
    ids = make(WINDOW + 1, []).ids
    _, now = session.feed(model, session.begin(model, 2), ids[:, :3], 1)
    arguments = (ids,) if call is session.feed else ()
    with pytest.raises(ValueError, match="num_passes=0 "):
        call(model, now, *arguments, 0)


def row_of(now: session.Session, row: int) -> session.Session:
    return map_tensors(lambda tensor: tensor[row : row + 1], now)


@pytest.mark.parametrize("mode", MODES, ids=label)
@pytest.mark.parametrize("schedule", ["predict_then_consolidate", "consolidate_or_predict"])
def test_a_sequence_that_settles_early_has_slept_with_fewer_passes(mode: dict, schedule: str) -> None:
    """Each row goes on as it would alone, with as many passes as it made."""
    model = build(EVERY_KIND, schedule=schedule, **mode)
    ids = make(2 * WINDOW - 1, []).ids
    _, now = session.feed(model, session.begin(model, len(ids)), ids, 4)
    seen = set()
    for tolerance in (1e-30, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, math.inf):
        slept, used = session.sleep_until_settled(model, now, 6, Stop(tolerance))
        seen.add(tuple(used.tolist()))
        logits, _ = session.feed(model, slept, ids[:, :5], 4)
        for row, passes in enumerate(used.tolist()):
            alone = session.sleep(model, row_of(now, row), passes)
            expected, _ = session.feed(model, alone, ids[row : row + 1, :5], 4)
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-9, atol=1e-9)
    assert {(6, 6), (2, 2)} <= seen
    assert any(a != b for a, b in seen)


def test_without_tolerance_all_make_all_passes() -> None:
    model = build("attn gdn gdn")
    ids = make(WINDOW - 1, []).ids
    _, now = session.feed(model, session.begin(model, 2), ids, 3)
    slept, used = session.sleep_until_settled(model, now, 3, Stop())
    expected = session.sleep(model, now, 3)
    assert used.tolist() == [3, 3]
    assert all(
        torch.equal(a.memory, b.memory) for a, b in zip(slept.start, expected.start) if a.memory is not None
    )
