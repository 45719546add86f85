"""Tokens read one by one in fixed places against tokens read as they come; on a CPU the work of the graph is
done without one."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from plain import WINDOW, build, make
from test_ragged import fed_raggedly
from test_session import EVERY_KIND, MODES, label
from torch import Tensor

from sleeptrain.model import SleepModel, ragged
from sleeptrain.model import decoder as decoder_module
from sleeptrain.model.decoder import Decoder
from sleeptrain.model.graphs import WARM_UPS
from sleeptrain.model.session import to_tensors


def decoder_of(model: SleepModel) -> Decoder:
    return Decoder(model, contextlib.nullcontext)


def read_eagerly(
    model: SleepModel, rows: ragged.Rows, ids: Tensor, num_passes: int
) -> tuple[list[Tensor], ragged.Rows]:
    logits = []
    for column in ids.T:
        out, rows = ragged.read(model, rows, column[:, None], torch.ones_like(column))
        logits.append(out[:, 0])
        rows, _ = ragged.sleep(model, rows, ragged.room_tokens(model, rows) == 0, num_passes)
    return logits, rows


def read_by(
    decoder: Decoder, rows: ragged.Rows, ids: Tensor, num_passes: int
) -> tuple[list[Tensor], ragged.Rows, int]:
    """Also how many tokens the decoder read: the first of a window may have to come otherwise. Autocast is
    around the usual reader alone, as in a session: the decoder has its own."""
    logits, number = [], 0
    for column in ids.T:
        if not decoder.holds_rows and decoder.can_enter(rows):
            decoder.enter(rows)
        if decoder.holds_rows:
            logits.append(decoder.read(column))
            number += 1
            rows = rows if decoder.room_tokens else decoder.leave()
        else:
            with decoder.autocast():
                out, rows = ragged.read(decoder.model, rows, column[:, None], torch.ones_like(column))
            logits.append(out[:, 0])
        if not decoder.holds_rows:
            full = ragged.room_tokens(decoder.model, rows) == 0
            with decoder.autocast():
                rows, _ = ragged.sleep(decoder.model, rows, full, num_passes)
    return logits, decoder.leave() if decoder.holds_rows else rows, number


def assert_rows_equal(found: ragged.Rows, expected: ragged.Rows) -> None:
    """But for pads."""
    assert found.filled.tolist() == expected.filled.tolist()
    sides = [to_tensors(rows.session) for rows in (found, expected)]
    assert sides[0].keys() == sides[1].keys()
    for name in sides[0]:
        cache, is_of_cache = f"{name.rpartition('.')[0]}.valid", "caches" in name
        pair = [side[name][side[cache]] if is_of_cache else side[name] for side in sides]
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mode", MODES, ids=label)
@pytest.mark.parametrize("before", [[(3, 3)], [(1, 3)], [(7, 7)], [(9, 2), (2, 5)]], ids=str)
@pytest.mark.parametrize("num_passes", [1, 3])
def test_it_reads_as_any_reader_does(mode: dict, before: list[tuple[int, int]], num_passes: int) -> None:
    model = build(EVERY_KIND, **mode)
    ids = make(6 * WINDOW, []).ids
    _, rows = fed_raggedly(model, ids, before, num_passes)
    tokens = ids[:, -2 * WINDOW - 2 :]
    expected, eager = read_eagerly(model, rows, tokens, num_passes)
    logits, decoded, number = read_by(decoder_of(model), rows, tokens, num_passes)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert number >= WINDOW + 2
    assert_rows_equal(decoded, eager)


def test_rows_that_enter_again_and_in_other_numbers() -> None:
    model = build(EVERY_KIND, eviction="sliding")
    ids = make(4 * WINDOW, [], num_sequences=3).ids
    decoder = decoder_of(model)
    for number, seen in ((3, 2), (2, 4), (3, 1), (1, 8)):
        _, rows = fed_raggedly(model, ids[:number], [(seen,) * number], 2)
        expected, eager = read_eagerly(model, rows, ids[:number, 10:11], 2)
        logits, decoded, _ = read_by(decoder, rows, ids[:number, 10:11], 2)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert_rows_equal(decoded, eager)


@pytest.mark.parametrize("pattern", ["attn swa:3", "gdn jet", "swa:1 gdn swa:9"])
@pytest.mark.parametrize("window", [1, 2, WINDOW])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_any_blocks_and_windows(
    pattern: str, window: int, eviction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the step is done a few times before it is recorded."""

    def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        for _ in range(1 + WARM_UPS):
            work()
        return work

    monkeypatch.setattr(decoder_module, "recorded", recorded)
    model = build(pattern, eviction=eviction, window_tokens=window)
    num_passes = 2 if "gdn" in pattern else 1
    ids = make(4 * WINDOW, []).ids
    _, rows = fed_raggedly(model, ids, [(window, 2 * window - 1)], num_passes)
    expected, eager = read_eagerly(model, rows, ids[:, 7:], num_passes)
    logits, decoded, _ = read_by(decoder_of(model), rows, ids[:, 7:], num_passes)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert_rows_equal(decoded, eager)


def test_a_step_that_was_interrupted_leaves_what_was_before() -> None:
    model = build(EVERY_KIND)
    ids = make(WINDOW, []).ids
    _, rows = fed_raggedly(model, ids, [(2, 2)], 2)
    decoder = decoder_of(model)
    decoder.enter(rows)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.stack.blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.read(ids[:, 2])
    assert_rows_equal(decoder.leave(), rows)


def test_what_left_stays_as_it_is() -> None:
    """Neither the rows that entered nor those that left, nor logits, lie where the next token is read."""
    model = build("attn gdn")
    ids = make(2 * WINDOW, []).ids
    _, entered = fed_raggedly(model, ids, [(1, 1)], 2)
    decoder = decoder_of(model)
    before = {name: value.clone() for name, value in to_tensors(entered.session).items()}
    decoder.enter(entered)
    logits = decoder.read(ids[:, 1])
    kept, left = logits.clone(), decoder.leave()
    middle = {name: value.clone() for name, value in to_tensors(left.session).items()}
    decoder.enter(left)
    decoder.read(ids[:, 2])
    assert torch.equal(logits, kept)
    for rows, values in ((entered, before), (left, middle)):
        assert all(torch.equal(value, values[name]) for name, value in to_tensors(rows.session).items())
        assert rows.filled.tolist() == [len(rows.session.hidden[0])] * 2


def test_it_refuses_what_it_cannot_do() -> None:
    model = build("attn gdn")
    decoder = decoder_of(model)
    assert not decoder.can_enter(ragged.begin(model, 2))
    with pytest.raises(ValueError, match="enter some first"):
        decoder.leave()
    ids = make(WINDOW, []).ids
    _, rows = fed_raggedly(model, ids, [(WINDOW - 1, 1)], 2)
    decoder.enter(rows)
    decoder.read(ids[:, 0])
    with pytest.raises(ValueError, match="no room"):
        decoder.read(ids[:, 0])
    assert decoder.leave().filled.tolist() == [WINDOW, 2]
