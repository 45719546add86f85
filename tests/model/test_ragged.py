"""Rows of different lengths side by side give what each gives alone."""

import pytest
import torch
from plain import WINDOW, build, make
from test_session import EVERY_KIND, MODES, label
from torch import Tensor

from sleeptrain.model import SleepModel, ragged, session

LENGTHS = [(5, 2, 7), (0, 4, 1), (3, 0, 6), (7, 7, 7), (1, 13, 0), (9, 2, 11)]  # pieces, by row


def fed_raggedly(
    model: SleepModel, ids: Tensor, pieces: list[tuple[int, ...]], num_passes: int
) -> tuple[list[Tensor], ragged.Rows]:
    """The logits of each row."""
    rows, logits = ragged.begin(model, len(ids)), [[] for _ in ids]
    begun = [0] * len(ids)
    for lengths in pieces:
        left = torch.tensor(lengths)
        while left.any():
            take = torch.minimum(left, ragged.room_tokens(model, rows))
            part = torch.zeros(len(ids), int(take.max()), dtype=torch.long)
            for row, count in enumerate(take.tolist()):
                part[row, :count] = ids[row, begun[row] : begun[row] + count]
                begun[row] += count
            out, rows = ragged.read(model, rows, part, take)
            for row, count in enumerate(take.tolist()):
                logits[row].append(out[row, :count])
            left = left - take
            full = ragged.room_tokens(model, rows) == 0
            rows, _ = ragged.sleep(model, rows, full, num_passes)
    return [torch.cat(row) for row in logits], rows


@pytest.mark.parametrize("mode", MODES, ids=label)
@pytest.mark.parametrize("schedule", ["predict_then_consolidate", "consolidate_or_predict"])
@pytest.mark.parametrize("num_passes", [1, 3])
def test_each_row_gives_what_it_gives_alone(mode: dict, schedule: str, num_passes: int) -> None:
    model = build(EVERY_KIND, schedule=schedule, **mode)
    totals = [sum(row) for row in zip(*LENGTHS)]
    ids = torch.cat([make(max(totals), []).ids] * 2)[:3]
    ids[1:] = ids[1:].roll(3, dims=1)
    found, rows = fed_raggedly(model, ids, LENGTHS, num_passes)
    for row, total in enumerate(totals):
        alone = session.begin(model, 1)
        expected, alone = session.feed(model, alone, ids[row : row + 1, :total], num_passes)
        torch.testing.assert_close(found[row], expected[0], rtol=1e-9, atol=1e-9)
        assert rows.filled[row] == alone.position_tokens
        for a, b in zip(rows.session.start, alone.start):
            if b.memory is not None:
                torch.testing.assert_close(a.memory[row], b.memory[0], rtol=1e-9, atol=1e-9)


def test_rows_may_sleep_amid_their_windows() -> None:
    model = build(EVERY_KIND, eviction="sliding")
    ids = make(3 * WINDOW, []).ids
    rows = ragged.begin(model, 2)
    _, rows = ragged.read(model, rows, ids[:, :5], torch.tensor([5, 2]))
    rows, told = ragged.sleep(model, rows, torch.tensor([True, True]), 3)
    assert sorted((t.rows.tolist(), t.passes.tolist()) for t in told) == [([0], [3]), ([1], [3])]
    assert rows.filled.tolist() == [0, 0]
    after = torch.stack([ids[0, 5:9], ids[1, 2:6]])
    logits, _ = ragged.read(model, rows, after, torch.tensor([4, 4]))
    for row, count in enumerate((5, 2)):
        _, alone = session.feed(model, session.begin(model, 1), ids[row : row + 1, :count], 3)
        expected, _ = session.feed(model, session.sleep(model, alone, 3), after[row : row + 1], 3)
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-9, atol=1e-9)


def test_what_rows_hold_does_not_grow() -> None:
    model = build("attn gdn", eviction="sliding", sliding_kv="per_pass")
    ids = make(40 * WINDOW, []).ids[:, : 40 * WINDOW]
    generator = torch.Generator().manual_seed(0)
    pieces = [tuple(torch.randint(0, 6, (2,), generator=generator).tolist()) for _ in range(60)]
    _, rows = fed_raggedly(model, ids, pieces, 2)
    for block in (*rows.session.start, *rows.session.state):
        assert all(cache.keys.shape[1] < WINDOW for cache in block.caches)
    assert rows.session.hidden.shape[1] == rows.filled.max() < WINDOW


def test_more_than_the_window_holds_is_refused() -> None:
    model = build("attn gdn")
    with pytest.raises(ValueError, match="sleep first"):
        ragged.read(model, ragged.begin(model, 2), make(2 * WINDOW, []).ids, torch.tensor([1, WINDOW + 1]))
