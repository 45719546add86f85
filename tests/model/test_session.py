"""Wake and sleep at inference equals the training loop, however the tokens come."""

import pytest
import torch
import torch.nn.functional as F
from plain import WINDOW, build, make
from torch import Tensor

from sleeptrain.model import SleepModel, session

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
