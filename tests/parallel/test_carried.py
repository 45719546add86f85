"""Rows that go on: what the local backend carries from batch to batch, when it lets go of it, and its way
through a checkpoint. Over ranks: ``tests/distributed/test_carry.py``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, SleepConfig, TextConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.state import State, map_tensors
from sleeptrain.parallel.backend import LocalBackend

VOCAB, WINDOW, TOKENS, ROWS, PASSES = 11, 5, 10, 4, 3
KINDS = [
    {"eviction": "hard"},
    {"eviction": "sliding"},
    {"eviction": "sliding", "sliding_kv": "per_pass"},
]


def build(
    micro: int = 2, carry: bool = True, rows: int = ROWS, precision: str = "float32", **sleep: Any
) -> LocalBackend:
    config = Config(
        run=RunConfig(device="cpu", precision=precision),
        model=ModelConfig(
            d_model=16,
            pattern="attn jet swa:7 gdn",
            num_heads=2,
            memory_heads=2,
            memory_key_dim=4,
            memory_value_dim=4,
            init_std=0.2,
            embedding_init_std=1.0,
        ),
        sleep=SleepConfig(
            window_tokens=WINDOW,
            num_passes=PASSES,
            schedule="predict_then_consolidate",
            carry_between_batches=carry,
            **sleep,
        ),
        task=TextConfig(sequence_tokens=TOKENS),
        data=DataConfig(batch_sequences=rows, micro_batch_sequences=micro, shards=("documents",)),
        optim=OptimConfig(warmup_steps=0),
    )
    return LocalBackend(config, VOCAB)


def batch(step: int) -> Batch:
    """Two documents that go on; one that starts with batch 1, and one with the last window of each batch."""
    ids, targets = torch.randint(VOCAB, (2, ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    valid = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    valid[1, :2] = False
    reset = torch.zeros(ROWS, TOKENS // WINDOW, dtype=torch.bool)
    reset[2, 0] = step == 1
    reset[3, -1] = True
    has_loss = (True,) * (TOKENS // WINDOW)
    difficulty = torch.zeros(ROWS, dtype=torch.long)
    return Batch(
        ids, targets, valid, valid, reset, difficulty, has_loss, int(valid.sum()), torch.arange(ROWS)
    )


def train(
    backend: LocalBackend, steps: range, lr_factor: float = 0.5, num_passes: int = PASSES
) -> list[float]:
    losses = []
    for step in steps:
        loss = backend.forward_backward(batch(step), num_passes).loss
        update = backend.step(lr_factor, loss)
        assert update.applied
        losses.append(update.loss)
    return losses


def copy_of(state: State | None) -> State:
    assert state is not None
    return map_tensors(Tensor.clone, state)


def are_equal(a: State | None, b: State | None) -> bool:
    found: list[bool] = []
    map_tensors(lambda x, y: found.append(x.shape == y.shape and torch.equal(x, y)), a, b)
    return bool(found) and all(found)


def by_hand(model: SleepModel, steps: range) -> list[float]:
    """The losses of a model that does not change."""
    losses, state = [], None
    for step in steps:
        output = model(batch(step), PASSES, state, is_continued=True)
        losses.append(float(output.loss_sum.detach()) / batch(step).num_targets)
        state = map_tensors(Tensor.detach, output.state)
    return losses


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_microbatches_go_on_row_by_row(kind: dict[str, Any]) -> None:
    losses = [train(build(micro, **kind), range(4), lr_factor=0.0) for micro in (1, 2, 4)]
    for found in losses:
        assert found == pytest.approx(by_hand(build(**kind).model, range(4)), abs=1e-5)
    alone = train(build(carry=False, **kind), range(4), lr_factor=0.0)
    assert alone[0] == pytest.approx(losses[0][0], abs=1e-6)
    assert min(abs(a - b) for a, b in zip(alone[1:], losses[0][1:])) > 1e-3  # else nothing was carried


def test_what_is_carried_holds_no_graph() -> None:
    """The only pass over the last window has one."""
    backend = build(eviction="sliding")
    train(backend, range(2), num_passes=1)
    map_tensors(lambda x: pytest.fail("it has a graph") if x.requires_grad else None, backend.carried.state)


def test_an_evaluation_starts_fresh_and_leaves_what_is_carried() -> None:
    backend, alone = build(eviction="sliding"), build(carry=False, eviction="sliding")
    train(backend, range(2), lr_factor=0.0)
    before = copy_of(backend.carried.state)
    assert torch.equal(backend.evaluate(batch(7), PASSES).nll, alone.evaluate(batch(7), PASSES).nll)
    assert are_equal(backend.carried.state, before)


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_after_a_skipped_update_the_state_before_it_goes_on(what: str) -> None:
    """R10."""
    backend, spared = build(eviction="sliding"), build(eviction="sliding")
    train(backend, range(2))
    before = copy_of(backend.carried.state)
    loss = backend.forward_backward(batch(2), PASSES).loss
    if what == "loss":
        assert not backend.step(0.5, torch.full_like(loss, torch.nan)).applied
    else:
        assert not backend.step(0.5, loss, max_norm=1e-9).applied
    assert are_equal(backend.carried.state, before)
    train(spared, range(2))
    assert train(backend, range(3, 5)) == train(spared, range(3, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_skipped_although_loss_and_gradient_are(value: float) -> None:
    """R10. It is spoilt in the last pass over the last window, which no loss sees."""
    backend = build()
    train(backend, range(2))
    before = copy_of(backend.carried.state)
    mixer = backend.model.stack.blocks[3].mixer
    calls = 0

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != PASSES * TOKENS // WINDOW:
            return output
        memory = output[1].memory.clone()
        memory[0, 0, 0, 0] = value
        return output[0], output[1]._replace(memory=memory)

    handle = mixer.register_forward_hook(spoil)
    loss = backend.forward_backward(batch(2), PASSES).loss
    handle.remove()
    gradients = [p.grad for p in backend.model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert not backend.step(0.5, loss).applied
    assert are_equal(backend.carried.state, before)
    train(backend, range(3, 4))


def saved(folder: Path, backend: LocalBackend) -> Checkpoint:
    saver = Saver(folder, keep_last=1, keep_every_steps=0)
    saver.save(1, backend.slices(), {})
    assert saver.wait() is None
    return Checkpoint(folder / "step_00000001")


@pytest.mark.parametrize("mode", ["pass", "block", "both"])
def test_checkpointed_activations_change_nothing(mode: str) -> None:
    kept, again = build(eviction="sliding"), build(eviction="sliding", activation_checkpointing=mode)
    assert train(again, range(3)) == train(kept, range(3))
    assert are_equal(again.carried.state, kept.carried.state)


@pytest.mark.parametrize(
    "kind",
    [*KINDS, {"eviction": "sliding", "precision": "bfloat16"}],
    ids=lambda kind: "-".join(kind.values()),
)
def test_a_saved_run_goes_on_bit_for_bit(kind: dict[str, Any], tmp_path: Path) -> None:
    """R1. Other microbatches go on, too."""
    whole, first = build(**kind), build(**kind)
    expected = train(whole, range(5))[3:]
    train(first, range(3))
    checkpoint = saved(tmp_path, first)
    assert {checkpoint.shape("carried", name)[0] for name in checkpoint.names("carried")} == {ROWS}
    resumed = build(**kind)
    resumed.load(checkpoint)
    assert are_equal(resumed.carried.state, first.carried.state)
    assert train(resumed, range(3, 5)) == expected
    assert are_equal(resumed.carried.state, whole.carried.state)
    other = build(micro=4, **kind)
    other.load(checkpoint)
    apart = 1e-2 if "precision" in kind else 1e-5
    assert train(other, range(3, 5)) == pytest.approx(expected, abs=apart)


def test_without_its_state_a_run_does_not_go_on_as_it_did(tmp_path: Path) -> None:
    """The control of the test above."""
    whole, first, resumed = build(), build(), build()
    expected = train(whole, range(4))[3:]
    train(first, range(3))
    first.carried.state = None
    resumed.load(saved(tmp_path, first))
    assert train(resumed, range(3, 4)) != expected


def test_going_back_to_the_start_forgets_what_was_carried(tmp_path: Path) -> None:
    backend = build()
    checkpoint = saved(tmp_path, backend)
    expected = train(backend, range(2))
    backend.load(checkpoint)
    assert backend.carried.state is None
    assert train(backend, range(2)) == expected


def test_a_run_that_does_not_carry_saves_nothing_of_it(tmp_path: Path) -> None:
    backend = build(carry=False)
    train(backend, range(2))
    assert saved(tmp_path, backend).groups == ["model", "optimizer"]
    assert backend.carried.state is None


def test_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    backend = build()
    train(backend, range(1))
    with pytest.raises(ValueError, match=r"carries 4 rows, and data\.batch_sequences=6"):
        build(rows=6).load(saved(tmp_path, backend))


def test_rows_of_a_document_that_starts_are_reset_on_the_way() -> None:
    """Row 2 of batch 1 starts anew: as if batch 0 had not been."""
    backend, late = build(), build()
    train(backend, range(2), lr_factor=0.0)
    train(late, range(1, 2), lr_factor=0.0)
    rows = [map_tensors(lambda x: x[2], b.carried.state) for b in (backend, late)]
    map_tensors(lambda x, y: torch.testing.assert_close(x, y), *rows)
    others = [b.carried.state[3].memory[0] for b in (backend, late)]
    assert not torch.allclose(*others)
