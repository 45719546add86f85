"""The sleep loop and its options against the plain model of ``plain.py`` and loops without loop code."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from plain import (
    VOCAB,
    WINDOW,
    assert_model_is_plain,
    assert_same,
    build,
    gradients,
    initial,
    make,
    plain_nll,
    run_block,
    spans,
)
from torch import Tensor

from sleeptrain.model import sizes
from sleeptrain.model.layers import rotary_table
from sleeptrain.model.state import Tokens

EVERY_KIND = "attn jet gdn swa:3 gdn"
CROSSINGS = [
    {"eviction": "hard"},
    {"eviction": "hard", "convolution": "carried"},
    {"eviction": "sliding"},
    {"eviction": "sliding", "convolution": "reset"},
    {"eviction": "sliding", "sliding_kv": "per_pass"},
]
SEGMENTS = [{}, {"prelude_blocks": 1}, {"coda_blocks": 1}, {"prelude_blocks": 2, "coda_blocks": 2}]


def label(settings: dict | str) -> str:
    return settings if isinstance(settings, str) else "-".join(map(str, settings.values())) or "plain"


@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
@pytest.mark.parametrize("schedule", ["consolidate_or_predict", "predict_then_consolidate"])
def test_three_passes_equal_the_plain_model(crossing: dict, schedule: str) -> None:
    """Dead work is dropped by the model and done by the plain one: no loss nor gradient differs."""
    model = build(EVERY_KIND, schedule=schedule, prelude_blocks=1, coda_blocks=1, **crossing)
    losses = [1, 3] if schedule == "consolidate_or_predict" else [0, 1, 2, 3]
    assert_model_is_plain(model, make(4 * WINDOW - 2, losses), 3)


@pytest.mark.more
@pytest.mark.parametrize("segments", SEGMENTS, ids=label)
@pytest.mark.parametrize("crossing", CROSSINGS, ids=label)
@pytest.mark.parametrize("schedule", ["consolidate_or_predict", "predict_then_consolidate"])
def test_every_mode_equals_the_plain_model(crossing: dict, schedule: str, segments: dict) -> None:
    model = build(EVERY_KIND, schedule=schedule, **segments, **crossing)
    for num_passes, losses in itertools.product((1, 2, 4), ([2], [0, 2], [0, 1])):
        assert_model_is_plain(model, make(3 * WINDOW, losses), num_passes)


@pytest.mark.parametrize("pattern", ["attn gdn", "gdn attn", "jet swa:2", "swa:4 jet"])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_coda_or_prelude_of_any_kind_equals_the_plain_model(pattern: str, eviction: str) -> None:
    for ends in ({"coda_blocks": 2}, {"prelude_blocks": 2}):
        assert_model_is_plain(
            build(f"{pattern} gdn {pattern}", eviction=eviction, **ends), make(13, [1, 2]), 2
        )


@pytest.mark.parametrize("rule", ["delta", "gated_hebbian"])
def test_the_other_rules_equal_the_plain_model(rule: str) -> None:
    model = build("attn gdn jet", rule=rule, negative_eigenvalues=True, memory_qk_heads=2)
    assert_model_is_plain(model, make(12, [2]), 2)


@pytest.mark.parametrize("num_tokens", [1, 3, WINDOW - 1])
def test_logits_in_pieces_equal_the_plain_model(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make(4 * WINDOW - 2, [0, 1, 2, 3])
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", num_tokens * len(batch.ids) * VOCAB)
    assert_model_is_plain(build("attn gdn", schedule="predict_then_consolidate"), batch, 2)


@torch.no_grad()
def test_predictions_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("attn gdn"), make(2 * WINDOW - 1, [0, 1])
    whole = model(batch, 1)
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", 2 * len(batch.ids) * VOCAB)
    pieces = model(batch, 1)
    assert torch.equal(pieces.predictions, whole.predictions)
    assert len(whole.predictions.unique()) > 1
    torch.testing.assert_close(pieces.nll, whole.nll)


@pytest.mark.parametrize("is_cut", [False, True])
def test_pieces_leave_no_logits_for_the_backward_pass(is_cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, kept = build("attn gdn"), make(2 * WINDOW, [0, 1]), []
    if is_cut:
        monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", 2 * len(batch.ids) * VOCAB)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        model(batch, 1)
    assert any(shape[-1:] == (VOCAB,) for shape in kept) != is_cut


def plain_loop_over_windows(model, batch) -> Tensor:
    """The hybrid with block-local attention, from its blocks alone."""
    loss, state = torch.zeros((), dtype=model.embed.weight.dtype), model.initial_state(len(batch.ids))
    for start, stop, has_loss in spans(batch):
        positions = torch.arange(stop - start)[None]
        table = rotary_table(
            positions, model.config.attention_head_dim, model.config.rope_theta, torch.float32
        )
        tokens = Tokens(positions, None, table, WINDOW, keeps_cache=False, keeps_tail=False)
        h, state = model.embed(batch.ids[:, start:stop]), list(state)
        for i, block in enumerate(model.stack.blocks):
            h, after = block(h, state[i], tokens)
            state[i] = after._replace(tail=None, caches=())
        if has_loss:
            logits, targets = model.head(model.final_norm(h)), batch.targets[:, start:stop]
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = loss + (nll.view(targets.shape) * batch.loss_mask[:, start:stop]).sum()
    return loss


@pytest.mark.parametrize("losses", [[3], [0, 1, 2, 3], [1, 3]])
def test_one_pass_is_bit_equal_to_a_plain_loop(losses: list[int]) -> None:
    model, batch = build("attn gdn swa:3 jet", torch.float32), make(4 * WINDOW - 1, losses)
    loss, expected = model(batch, 1).loss_sum, plain_loop_over_windows(model, batch)
    assert torch.equal(loss, expected)
    grads, expected_grads = gradients(loss, model), gradients(expected, model)
    assert [n for n in grads if not torch.equal(grads[n], expected_grads[n])] == []


@pytest.mark.parametrize("pattern", ["attn gdn", "gdn swa:3 jet attn", "swa:3 gdn"])
@pytest.mark.parametrize("ragged", [0, 2])
def test_sliding_one_pass_is_the_full_sequence_under_a_band_mask(pattern: str, ragged: int) -> None:
    model, batch = build(pattern, eviction="sliding"), make(4 * WINDOW - ragged, [0, 1, 2, 3])
    h, state = model.embed(batch.ids), initial(model, 2)
    for i, block in enumerate(state):
        h = run_block(model, i, h, torch.arange(h.shape[1]), 1, True, block, block)
    logits = model.head(model.final_norm(h))
    expected = F.cross_entropy(logits.mT, batch.targets, reduction="none")
    output = model(batch, 1)
    assert (output.nll - expected).norm() <= 1e-10 * expected.norm()
    with torch.no_grad():
        assert torch.equal(model(batch, 1).predictions, logits.argmax(-1))
    assert_same(gradients(output.loss_sum, model), gradients(expected.sum(), model))


@pytest.mark.parametrize("schedule", ["consolidate_or_predict", "predict_then_consolidate"])
def test_gradcheck_through_two_sleeping_windows_and_three_passes(schedule: str) -> None:
    model = build("attn gdn", d_model=4, mlp_dim=4, window_tokens=3, schedule=schedule, eviction="sliding")
    batch = make(8, [2] if schedule == "consolidate_or_predict" else [0, 1, 2], 1, window=3)
    names = ["embed.weight", "stack.blocks.0.mixer.k_proj.weight", "stack.blocks.1.mixer.v_proj.weight"]
    names += ["stack.blocks.1.mixer.A_log", "stack.blocks.1.mixer.k_conv"]

    def loss(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights)), (batch, 3)).loss_sum

    values = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("mode", ["pass", "block", "both"])
@pytest.mark.parametrize("schedule", ["consolidate_or_predict", "predict_then_consolidate"])
def test_activation_checkpointing_changes_no_gradient(mode: str, schedule: str) -> None:
    settings = {"eviction": "sliding", "sliding_kv": "per_pass", "prelude_blocks": 1, "coda_blocks": 1}
    batch = make(14, [2] if schedule == "consolidate_or_predict" else [0, 1, 2])
    results = []
    for policy in ("none", mode):
        model = build(EVERY_KIND, schedule=schedule, activation_checkpointing=policy, **settings)
        loss = model(batch, 3).loss_sum
        results.append({"loss": loss.detach()} | gradients(loss, model))
    assert [n for n, g in results[0].items() if not torch.equal(g, results[1][n])] == []


def test_num_passes_is_an_argument() -> None:
    model, batch = build(), make(3 * WINDOW, [2])
    two, four = model(batch, 2).loss_sum, model(batch, 4).loss_sum
    assert not torch.equal(two, four)
    assert torch.equal(model(batch, 2).loss_sum, two)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"num_passes={wrong} "):
            model(batch, wrong)


def test_norm_between_passes() -> None:
    assert_model_is_plain(build(norm_between_passes=True, coda_blocks=1), make(3 * WINDOW, [2]), 3)
    batch = make(3 * WINDOW, [2])
    with_norm, without = (build(norm_between_passes=x)(batch, 1).loss_sum for x in (True, False))
    assert torch.equal(with_norm, without)  # one pass has nothing between


TRUNCATED = [("consolidate_or_predict", crossing) for crossing in CROSSINGS]
TRUNCATED += [
    ("predict_then_consolidate", crossing) for crossing in (CROSSINGS[0], CROSSINGS[1], CROSSINGS[4])
]


@pytest.mark.parametrize(("schedule", "crossing"), TRUNCATED, ids=label)
@pytest.mark.parametrize("passes", [1, 2])
def test_truncated_backpropagation(schedule: str, crossing: dict, passes: int) -> None:
    """The cut passes get no gradient through anything they leave: fast weights, tails, keys and values."""
    settings = {"schedule": schedule, "prelude_blocks": 1, "coda_blocks": 1, "norm_between_passes": True}
    model = build(EVERY_KIND, backprop_passes=passes, **settings, **crossing)
    losses = [2] if schedule == "consolidate_or_predict" else [0, 1, 2]
    assert_model_is_plain(model, make(3 * WINDOW, losses), 3)


@pytest.mark.parametrize("passes", [3, 5])
def test_truncation_beyond_n_is_full_backpropagation(passes: int) -> None:
    batch, grads = make(3 * WINDOW, [2]), []
    for k in (0, passes):
        model = build(EVERY_KIND, backprop_passes=k)
        grads.append(gradients(model(batch, 3).loss_sum, model))
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_truncation_still_teaches_earlier_windows_through_the_fast_weights() -> None:
    batch = make(3 * WINDOW, [2], 1)
    batch.ids.copy_(torch.arange(3 * WINDOW)[None] // WINDOW)  # window w holds the token w alone
    grads = {}
    for k in (0, 1):
        model = build("gdn attn gdn", backprop_passes=k)
        grads[k] = gradients(model(batch, 3).loss_sum, model)["embed.weight"]
    assert (grads[1][2] != 0).all()
    assert not torch.allclose(grads[1][1], grads[0][1])
    # Every last pass starts from a detached h: no token of a sleeping window is reached, but weights are.
    assert (grads[1][:2] == 0).all()
    one = build("gdn attn gdn", backprop_passes=1, learned_initial_state=True)
    assert all((g != 0).any() for n, g in gradients(one(batch, 3).loss_sum, one).items() if "memory" in n)


def test_detach_state() -> None:
    batch = make(3 * WINDOW, [2], 1)
    assert_model_is_plain(build(EVERY_KIND, detach_state=True, eviction="sliding"), batch, 2)
    batch.ids.copy_(torch.arange(3 * WINDOW)[None] // WINDOW)
    model = build(detach_state=True)
    reached = gradients(model(batch, 2).loss_sum, model)["embed.weight"].abs().sum(1) > 0
    assert reached.tolist() == [False, False, True] + [False] * (VOCAB - 3)


def test_learned_initial_state() -> None:
    model = build("attn gdn jet", learned_initial_state=True)
    batch = make(3 * WINDOW, [2])
    assert_model_is_plain(model, batch, 2)
    grads = gradients(model(batch, 2).loss_sum, model)
    assert {n for n in grads if "initial" in n} == {"initial_memory.1", "initial_memory.2"}
    assert all((g != 0).any() for n, g in grads.items() if "initial" in n)
    plain = build("attn gdn jet")
    with torch.no_grad():
        for parameter in model.initial_memory.values():
            parameter.zero_()
        plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain(batch, 2).loss_sum, model(batch, 2).loss_sum)


def test_one_single_window_is_one_awake_pass() -> None:
    model = build(window_tokens=0)
    batch = make(12, [0], window=12)
    expected = plain_nll(build(window_tokens=12), batch.ids, batch.targets, [(0, 12, True)], 1)
    torch.testing.assert_close(model(batch, 4).nll, expected.detach())


def test_trace_has_the_norms_of_each_pass() -> None:
    model, batch, trace = build("attn gdn"), make(2 * WINDOW, [1]), []
    state = model(batch, 3, trace=trace).state
    assert [(t.window, t.pass_number) for t in trace] == [(0, 1), (0, 2), (0, 3), (1, 1)]
    torch.testing.assert_close(trace[-1].norm.sqrt(), state[1].memory.flatten(1).norm(dim=1)[None])
    torch.testing.assert_close(trace[0].norm, trace[0].update)  # from zero
    assert all((t.update > 0).all() for t in trace)


def test_bf16_autocast_keeps_the_fast_weights_float32() -> None:
    model, batch = build(EVERY_KIND, torch.float32, eviction="sliding"), make(3 * WINDOW, [2])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, 2)
    assert {s.memory.dtype for s in output.state if s.memory is not None} == {torch.float32}
    assert output.loss_sum.dtype == torch.float32
    full = model(batch, 2)
    assert abs(output.loss_sum - full.loss_sum) < 0.02 * full.loss_sum
    assert not torch.equal(output.loss_sum, full.loss_sum)
