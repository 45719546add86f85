"""Tokens read one by one in fixed places against tokens read as they come; on a CPU the work of the graph is
done without one."""

import contextlib

import pytest
import torch
from plain import WINDOW, build, make
from test_ragged import fed_raggedly
from test_session import EVERY_KIND, MODES, label
from torch import Tensor

from sleeptrain.model import SleepModel, ragged
from sleeptrain.model.decoder import Decoder
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
    """Also how many tokens the decoder read: the first of a window may have to come otherwise."""
    logits, number = [], 0
    for column in ids.T:
        if not decoder.holds_rows and decoder.can_enter(rows):
            decoder.enter(rows)
        if decoder.holds_rows:
            logits.append(decoder.read(column))
            number += 1
            rows = rows if decoder.room_tokens else decoder.leave()
        else:
            out, rows = ragged.read(decoder.model, rows, column[:, None], torch.ones_like(column))
            logits.append(out[:, 0])
        if not decoder.holds_rows:
            rows, _ = ragged.sleep(
                decoder.model, rows, ragged.room_tokens(decoder.model, rows) == 0, num_passes
            )
    return logits, decoder.leave() if decoder.holds_rows else rows, number


def assert_rows_equal(found: ragged.Rows, expected: ragged.Rows) -> None:
    """Not only what the rows say, but how it lies there."""
    assert found.filled.tolist() == expected.filled.tolist()
    tensors = to_tensors(expected.session)
    assert to_tensors(found.session).keys() == tensors.keys()
    for name, value in to_tensors(found.session).items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-9, atol=1e-9, msg=name)


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
