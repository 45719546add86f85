"""Fewer passes for sequences that need no more: in the forward over a batch as in a session."""

import math

import pytest
import torch
from plain import WINDOW, build, make
from test_session import EVERY_KIND, MODES, label
from test_window_state import PADDED, real_tokens

from sleeptrain.data.batch import Batch
from sleeptrain.model import SleepModel, session
from sleeptrain.model.halting import Stop
from sleeptrain.model.state import map_tensors
from sleeptrain.schema import ConfigError

TOLERANCES = (1e-30, 0.05, 0.1, 0.15, 0.2, 0.3, math.inf)
MODES_OF_BOTH = [m for m in MODES if m.get("sliding_kv") != "per_pass"]


def assert_same_rows(model: SleepModel, batch: Batch, num_passes: int, stop: Stop) -> torch.Tensor:
    """Each row of the forward gives the losses of a session of its own; returns the passes made."""
    output = model(batch, num_passes, stop=stop)
    real = torch.ones_like(batch.ids) if batch.valid is None else batch.valid
    for row, (ids, targets) in enumerate(zip(batch.ids, batch.targets)):
        now, made = session.begin(model, 1), []
        for w, has_loss in enumerate(batch.windows_with_loss):
            span = slice(w * WINDOW, (w + 1) * WINDOW)
            here = real[row, span].bool()
            logits, now = session.read(model, now, ids[None, span][:, here])
            nll = torch.nn.functional.cross_entropy(logits[0], targets[span][here], reduction="none")
            if has_loss:
                torch.testing.assert_close(output.nll[row, span][here], nll, rtol=1e-9, atol=1e-9)
            if not has_loss or model.sleep.schedule == "predict_then_consolidate":
                now, used = session.sleep_until_settled(model, now, num_passes, stop)
                made.append(int(used) if here.any() else 0)
        assert output.passes[row].tolist() == made[: output.passes.shape[1]]
    return output.passes


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES_OF_BOTH, ids=label)
@pytest.mark.parametrize("schedule", ["predict_then_consolidate", "consolidate_or_predict"])
def test_rows_that_settle_are_those_of_sessions(mode: dict, schedule: str) -> None:
    model = build(EVERY_KIND, schedule=schedule, **mode)
    batch = make(3 * WINDOW, [0, 1, 2] if schedule == "predict_then_consolidate" else [2])
    seen = torch.cat([assert_same_rows(model, batch, 6, Stop(tolerance)) for tolerance in TOLERANCES])
    assert seen.unique().tolist()[:: len(seen.unique()) - 1] == [2, 6]
    assert (seen[0::2] != seen[1::2]).any()  # rows of one batch differ


@torch.no_grad()
@pytest.mark.parametrize("mode", [m for m in MODES if m.get("sliding_kv") == "per_pass"], ids=label)
def test_every_pass_of_the_window_before_may_be_read(mode: dict) -> None:
    model = build(EVERY_KIND, schedule="predict_then_consolidate", **mode)
    for tolerance in TOLERANCES:
        assert_same_rows(model, make(3 * WINDOW, [0, 1, 2]), 6, Stop(tolerance))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES_OF_BOTH, ids=label)
def test_pads_neither_settle_nor_hold_up(mode: dict) -> None:
    model = build(EVERY_KIND, **mode)
    batch = make(3 * WINDOW, [2], len(PADDED), valid=real_tokens())
    for tolerance in TOLERANCES:
        assert_same_rows(model, batch, 4, Stop(tolerance))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES, ids=label)
def test_without_tolerance_all_passes_are_made_bit_for_bit(mode: dict) -> None:
    model = build(EVERY_KIND, torch.float32, schedule="predict_then_consolidate", **mode)
    for valid in (None, real_tokens()):
        batch = make(3 * WINDOW, [0, 1, 2], len(PADDED), valid=valid)
        expected, output = model(batch, 3), model(batch, 3, stop=Stop())
        here = slice(None) if valid is None else valid
        assert torch.equal(output.nll[here], expected.nll[here])
        assert torch.equal(output.predictions[here], expected.predictions[here])
        reads = torch.ones(len(PADDED), 2) if valid is None else valid.view(-1, 3, WINDOW).any(2)[:, :2]
        assert torch.equal(output.passes, 3 * reads.long())
        assert expected.passes is None


@torch.no_grad()
def test_passes_that_nobody_makes_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, calls = build(coda_blocks=1), make(3 * WINDOW, [2]), []
    run = SleepModel.run
    monkeypatch.setattr(SleepModel, "run", lambda *args: calls.append(args[-1]) or run(*args))
    output = model(batch, 6, stop=Stop(math.inf))
    assert output.passes.tolist() == [[2, 2]] * 2
    here = [(v.window, v.pass_number, v.segment) for v in calls if v.window < 2]
    assert here == [(w, n, s) for w in (0, 1) for n, s in ((1, "core"), (2, "core"), (6, "coda"))]


@torch.no_grad()
def test_one_window_alone_has_no_sleep_to_shorten() -> None:
    model, batch = build(), make(WINDOW, [0])
    output = model(batch, 4, stop=Stop(0.1))
    assert output.passes.shape == (2, 0)
    assert torch.equal(output.nll, model(batch, 4).nll)


@torch.no_grad()
def test_what_a_batch_leaves_is_what_it_left_in_a_row_alone() -> None:
    model, batch = build("attn gdn gdn", eviction="sliding"), make(3 * WINDOW, [1], 4)
    whole = model(batch, 5, is_continued=True, stop=Stop(0.25))
    assert len(whole.passes.unique()) > 1
    for row in range(4):
        alone = model(batch.rows(slice(row, row + 1)), 5, is_continued=True, stop=Stop(0.25))
        expected = map_tensors(lambda x, row=row: x[row : row + 1], whole.state)
        torch.testing.assert_close(alone.state, expected, rtol=1e-9, atol=1e-9)


def test_a_rule_is_for_inference() -> None:
    with pytest.raises(ValueError, match="without gradients"):
        build()(make(2 * WINDOW, [1]), 2, stop=Stop())


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_below_zero_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance="):
        Stop(tolerance).check()
