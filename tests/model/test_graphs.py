"""Replayed passes against the plain model: on a CPU the work of a graph is done without one, with the same
fixed places, copies and sums."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from plain import WINDOW, assert_model_is_plain, assert_same, build, gradients, make

from sleeptrain.model import SleepModel
from sleeptrain.model.graphs import PassGraphs

EVERY_KIND = "attn jet gdn swa:3 gdn"


def graphed(pattern: str = "attn gdn attn gdn", **settings) -> SleepModel:
    settings = {"activation_checkpointing": "pass"} | settings
    model = build(pattern, **settings)
    model.graphs = PassGraphs(model.stack)
    return model


@pytest.mark.parametrize("checkpointing", ["pass", "both"])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("schedule", ["consolidate_or_predict", "predict_then_consolidate"])
def test_replayed_passes_equal_the_plain_model(schedule: str, eviction: str, checkpointing: str) -> None:
    model = graphed(
        EVERY_KIND,
        schedule=schedule,
        eviction=eviction,
        activation_checkpointing=checkpointing,
        prelude_blocks=1,
        coda_blocks=1,
    )
    losses = [1, 3] if schedule == "consolidate_or_predict" else [0, 1, 2, 3]
    for num_passes in (3, 1, 2):  # the same graphs again, and others
        assert_model_is_plain(model, make(4 * WINDOW - 2, losses), num_passes)


def test_a_second_batch_sees_the_weights_as_they_are_then() -> None:
    model = graphed()
    batch = make(3 * WINDOW, [2])
    assert_model_is_plain(model, batch, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_model_is_plain(model, make(3 * WINDOW, [0, 2], seed=6), 2)


def test_gradients_add_up_over_microbatches() -> None:
    """Two forward passes before the first backward pass, and a backward pass through both."""
    model, eager = graphed(), build()
    batches = [make(3 * WINDOW, [1, 2], seed=seed) for seed in (1, 2)]
    expected = gradients(sum(eager(b, 2).loss_sum for b in batches), eager)

    first, second = (model(b, 2).loss_sum for b in batches)
    first.backward()
    second.backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)
    assert_same(gradients(sum(model(b, 2).loss_sum for b in batches), model), expected)


def test_pads_documents_dropout_and_frozen_weights() -> None:
    valid = torch.ones(2, 3 * WINDOW, dtype=torch.bool)
    valid[0, :4] = False
    reset_state = torch.tensor([[True, True, False], [True, False, True]])
    batch = make(3 * WINDOW, [1, 2], valid=valid, reset_state=reset_state)
    batch = replace(batch, example_keys=torch.tensor([3, 4]))
    settings = {"learned_initial_state": True, "norm_between_passes": True, "dropout": 0.3}
    model, eager = graphed(**settings), build(**settings)
    for each in (model, eager):
        each.stack.blocks[1].requires_grad_(False)
    model.graphs = PassGraphs(model.stack)
    learned = {name for name, p in eager.named_parameters() if p.requires_grad}
    output, expected = (each(batch, 3) for each in (model, eager))
    torch.testing.assert_close(output.nll, expected.nll)
    for loss in (output.loss_sum, expected.loss_sum):
        loss.backward()
    of_model, of_eager = (
        {n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (model, eager)
    )
    assert of_model.keys() == learned
    assert_same(of_model, of_eager)


@pytest.mark.parametrize(
    "settings", [{"backprop_passes": 2}, {"detach_state": True}, {"halting": "learned", "num_passes": 4}]
)
def test_gradients_that_are_cut_or_mixed(settings: dict) -> None:
    batch = make(4 * WINDOW, [1, 3])
    found = []
    for model in (graphed(**settings), build(**settings)):
        output = model(batch, 4)
        cost = 0.0 if output.passes is None else output.passes.sum()
        found.append(gradients(output.loss_sum + cost, model))
    assert_same(*found)


def test_without_gradients_nothing_is_prepared_for_them() -> None:
    model, eager = graphed(), build()
    batch = make(3 * WINDOW, [0, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(model(batch, 3).nll, eager(batch, 3).nll)
        assert torch.equal(model(batch, 3).predictions, eager(batch, 3).predictions)
    assert all(kind.backward is None for kind in model.graphs._kinds.values())
    assert_model_is_plain(model, batch, 3)


def test_copies_in_bfloat16_multiply_as_autocast_does() -> None:
    """Losses equal those of autocast to the bit; gradients come in float32, which autocast first adds up in
    bfloat16."""
    model, eager = (build(dtype=torch.float32) for _ in range(2))
    model.graphs = PassGraphs(model.stack, torch.bfloat16)
    batch = make(3 * WINDOW, [1, 2])
    found = []
    for each in (model, eager):
        with torch.autocast("cpu", torch.bfloat16):
            output = each(batch, 3)
        found.append((output.nll, gradients(output.loss_sum, each)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1], tolerance=1e-2)
    assert {copy.dtype for copy in model.graphs.copies.values()} == {torch.float32, torch.bfloat16}


def test_as_many_graphs_as_kinds_of_passes() -> None:
    """Windows and steps do not add any: reading, sleeping, the last window and its shorter kind."""
    model = graphed()
    for _ in range(2):
        model(make(6 * WINDOW, [5]), 4).loss_sum.backward()
    number = len(model.graphs._kinds)
    model(make(9 * WINDOW, [8]), 3).loss_sum.backward()
    assert len(model.graphs._kinds) == number <= 3


def test_graphs_that_are_dropped_are_freed() -> None:
    """With their copies of the weights, after passes that were given what others left."""
    model = graphed()
    output = model(make(3 * WINDOW, [1, 2]), 3)
    output.loss_sum.backward()
    left = weakref.ref(model.graphs)
    model.graphs = None
    del output
    gc.collect()
    assert left() is None
