"""Fewer passes for sequences that need no more, in the forward over a batch as in a session; and how a model
learns when."""

import itertools
import math

import pytest
import torch
from plain import WINDOW, assert_same, build, gradients, make, plain_nll, spans
from test_session import EVERY_KIND, MODES, label
from test_window_state import PADDED, real_tokens
from torch import Tensor

from sleeptrain.data.batch import Batch
from sleeptrain.model import SleepModel, session
from sleeptrain.model.halting import Stop
from sleeptrain.model.state import map_tensors
from sleeptrain.schema import ConfigError

TOLERANCES = (1e-30, 0.05, 0.1, 0.15, 0.2, 0.3, math.inf)
MODES_OF_BOTH = [m for m in MODES if m.get("sliding_kv") != "per_pass"]


def assert_same_rows(model: SleepModel, batch: Batch, num_passes: int, stop: Stop) -> Tensor:
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
    monkeypatch.setattr(SleepModel, "run", lambda *args: calls.append(args[4]) or run(*args))
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


@pytest.mark.parametrize("stop", [Stop(-0.1), Stop(math.nan), Stop(halt_threshold=0.5)])
def test_a_rule_that_the_model_cannot_follow_is_refused(stop: Stop) -> None:
    with pytest.raises(ConfigError, match=r"tolerance=|sleep\.halting=none"), torch.no_grad():
        build()(make(2 * WINDOW, [1]), 2, stop=stop)


def learned(pattern: str = EVERY_KIND, **settings) -> SleepModel:
    """With a head that tells sequences and passes apart."""
    model = build(pattern, halting="learned", num_passes=3, **settings)
    with torch.no_grad():
        model.halting_head.weight.mul_(10)
    return model


SEGMENTS = [{}, {"prelude_blocks": 1, "coda_blocks": 1}, {"coda_blocks": 2, "norm_between_passes": True}]


def losses_of(schedule: str) -> list[int]:
    return [0, 1, 2] if schedule == "predict_then_consolidate" else [2]


@pytest.mark.parametrize("segments", SEGMENTS, ids=label)
@pytest.mark.parametrize("schedule", ["predict_then_consolidate", "consolidate_or_predict"])
def test_the_mixture_and_its_cost_equal_the_plain_model(schedule: str, segments: dict) -> None:
    model, batch = learned(schedule=schedule, **segments), make(3 * WINDOW, losses_of(schedule))
    output, means = model(batch, 4), []
    nll = plain_nll(model, batch.ids, batch.targets, spans(batch), 4, means)
    passes = torch.stack(means[:2], dim=1)
    torch.testing.assert_close(output.nll, nll.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.passes, passes, rtol=1e-10, atol=1e-10)
    found = gradients(output.loss_sum + 0.3 * output.passes.sum(), model)
    assert_same(found, gradients(nll.sum() + 0.3 * passes.sum(), model))
    assert (found["halting_head.weight"] != 0).all()
    assert (gradients(model(batch, 4).loss_sum, model)["halting_head.bias"] != 0).all()


def test_gradcheck_of_the_mixture() -> None:
    model = build("attn gdn", d_model=4, mlp_dim=4, window_tokens=3, halting="learned", num_passes=3)
    batch = make(8, [2], 1, window=3)
    names = ["halting_head.weight", "halting_head.bias", "embed.weight", "stack.blocks.1.mixer.v_proj.weight"]

    def loss(*weights: Tensor) -> Tensor:
        output = torch.func.functional_call(model, dict(zip(names, weights)), (batch, 3))
        return output.loss_sum + output.passes.sum()

    values = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_pads_are_no_ops_of_learned_halting() -> None:
    model = learned()
    batch = make(3 * WINDOW, [2], len(PADDED), valid=real_tokens())
    output, expected = model(batch, 3), torch.zeros((), dtype=torch.float64)
    for row, real in enumerate(batch.valid):
        counts = [int(part.sum()) for part in real.split(WINDOW)]
        borders = itertools.pairwise([0, *itertools.accumulate(counts)])
        windows = [(start, stop, w == 2) for w, (start, stop) in enumerate(borders) if start < stop]
        means: list[Tensor] = []
        nll = plain_nll(
            model, batch.ids[row : row + 1, real], batch.targets[row : row + 1, real], windows, 3, means
        )
        torch.testing.assert_close(output.nll[row, real], nll[0].detach(), rtol=1e-10, atol=1e-10)
        passes = [float(means.pop(0)) if count else 0.0 for count in counts[:2]]
        torch.testing.assert_close(output.passes[row], torch.tensor(passes, dtype=torch.float64))
        expected = expected + nll.sum()
    assert_same(gradients(output.loss_sum, model), gradients(expected, model))


@pytest.mark.parametrize("mode", ["pass", "both"])
def test_checkpointing_changes_no_gradient_of_learned_halting(mode: str) -> None:
    results = []
    for policy in ("none", mode):
        output = (model := learned(activation_checkpointing=policy))(make(14, [2]), 3)
        results.append(gradients(output.loss_sum + output.passes.sum(), model))
    assert [n for n, g in results[0].items() if not torch.equal(g, results[1][n])] == []


@torch.no_grad()
@pytest.mark.parametrize("segments", SEGMENTS, ids=label)
def test_at_threshold_one_nothing_stops_and_the_mixture_is_that_of_training(segments: dict) -> None:
    model, batch = learned(**segments), make(3 * WINDOW, [2], len(PADDED), valid=real_tokens())
    expected, output = model(batch, 4), model(batch, 4, stop=Stop(halt_threshold=1.0))
    torch.testing.assert_close(output.nll, expected.nll, rtol=1e-12, atol=1e-12)
    assert output.passes.unique().tolist() == [0, 4]  # 0: nothing to read
    assert ((expected.passes > 1) & (expected.passes < 4)).any()


@torch.no_grad()
@pytest.mark.parametrize("segments", SEGMENTS, ids=label)
@pytest.mark.parametrize("schedule", ["predict_then_consolidate", "consolidate_or_predict"])
def test_rows_that_halt_are_those_of_sessions(schedule: str, segments: dict) -> None:
    model, seen = learned(schedule=schedule, **segments), []
    for valid in (None, real_tokens()):
        batch = make(3 * WINDOW, losses_of(schedule), len(PADDED), valid=valid)
        if valid is not None and schedule == "predict_then_consolidate":
            continue  # rows with no token in a window with a loss
        for stop in (Stop(0.0, 1.0), Stop(0.0, 0.8), Stop(0.0, 0.5), Stop(0.0, 1e-9), Stop(0.25, 1.0)):
            seen.append(assert_same_rows(model, batch, 4, stop))
        assert torch.equal(model(batch, 4, stop=Stop()).passes, seen[-3])  # 0.5
    assert {1, 2, 4} <= set(torch.cat(seen).unique().tolist())


@torch.no_grad()
def test_a_sleep_of_fixed_length_leaves_the_mixture() -> None:
    model, batch = learned(schedule="predict_then_consolidate"), make(3 * WINDOW, [0, 1, 2])
    logits, _ = session.feed(model, session.begin(model, 2), batch.ids, 3)
    nll = torch.nn.functional.cross_entropy(logits.mT, batch.targets, reduction="none")
    torch.testing.assert_close(nll, model(batch, 3).nll, rtol=1e-9, atol=1e-9)


def test_a_batch_goes_on_from_the_mixture() -> None:
    model, whole = learned(), make(3 * WINDOW, [2])
    first, second = make(2 * WINDOW, []), make(WINDOW, [0])
    for part, span in ((first, slice(0, 2 * WINDOW)), (second, slice(2 * WINDOW, None))):
        part.ids.copy_(whole.ids[:, span])
        part.targets.copy_(whole.targets[:, span])
    state = model(first, 3, is_continued=True).state
    torch.testing.assert_close(model(second, 3, state).nll, model(whole, 3).nll[:, 2 * WINDOW :])


def test_one_pass_has_nothing_to_halt() -> None:
    model, batch = learned(), make(3 * WINDOW, [2])
    output, plain = model(batch, 1), build(EVERY_KIND)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert output.passes.shape == (2, 0)
    assert torch.equal(output.nll, plain(batch, 1).nll)


def test_halting_is_learned_in_float32_under_autocast() -> None:
    model, batch = learned().float(), make(3 * WINDOW, [2])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, 3)
    assert output.passes.dtype == torch.float32
    assert {s.memory.dtype for s in output.state if s.memory is not None} == {torch.float32}
