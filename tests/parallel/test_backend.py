"""The local backend: accumulation, clipping, refusal of bad gradients, and going on from a saved state."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.slices import whole
from sleeptrain.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.data.stream import TrainStream
from sleeptrain.model.halting import Stop
from sleeptrain.model.pointwise import PLAIN, UsesPointwise
from sleeptrain.parallel.backend import LocalBackend, choose_device, memory_backend, require_graphs, speed_up
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

MODEL = ModelConfig(
    d_model=16, pattern="attn gdn", num_heads=2, memory_heads=2, memory_key_dim=4, memory_value_dim=4
)


def test_a_backend_of_the_fast_weights_that_cannot_run_here_is_refused() -> None:
    config = Config(run=RunConfig(device="cpu"), model=MODEL)
    assert memory_backend(config).backend == "chunked"
    with pytest.raises(ConfigError, match=r"model.memory_backend=triton cannot run: .* are on cpu"):
        memory_backend(replace(config, model=replace(MODEL, memory_backend="triton")))


def test_graphs_are_refused_on_a_cpu() -> None:
    sleep = SleepConfig(activation_checkpointing="pass")
    with pytest.raises(ConfigError, match="cuda_graphs=true needs a CUDA device"):
        require_graphs(Config(run=RunConfig(device="cpu", cuda_graphs=True), model=MODEL, sleep=sleep))
    require_graphs(Config(run=RunConfig(device="cpu"), model=MODEL))


@pytest.mark.more
def test_a_compiled_run_calls_compiled_functions() -> None:
    model = build().model
    speed_up(model, Config(run=RunConfig(device="cpu", compile=True), model=MODEL))
    norms = [module for module in model.modules() if isinstance(module, UsesPointwise)]
    assert norms
    assert all(module.pointwise.swiglu is not PLAIN.swiglu for module in norms)


def build(micro: int | None = None, seed: int = 0, precision: str = "auto", **optim: float) -> LocalBackend:
    config = Config(
        run=RunConfig(seed=seed, device="cpu", precision=precision),
        model=MODEL,
        sleep=SleepConfig(window_tokens=12, num_passes=2),
        data=DataConfig(batch_sequences=8, micro_batch_sequences=micro),
        optim=OptimConfig(**optim),
    )
    return LocalBackend(config, make_task(config.task).vocab_size)


def batch(backend: LocalBackend, step: int = 0) -> Batch:
    return TrainStream(make_task(backend.config.task), 0, 8, 12).batch(step)


def train(backend: LocalBackend, steps: range) -> None:
    for step in steps:
        result = backend.forward_backward(batch(backend, step), 2)
        assert backend.step(0.5, result.loss).applied


def state_of(backend: LocalBackend) -> dict[str, dict[str, Tensor]]:
    """A copy of all that a checkpoint holds."""
    groups = backend.slices().items()
    return {group: {s.name: s.values.clone().view(s.shape) for s in slices} for group, slices in groups}


def saved(folder: Path, state: dict[str, dict[str, Tensor]]) -> Checkpoint:
    saver = Saver(folder, keep_last=1, keep_every_steps=0)
    saver.save(1, {group: [whole(n, t) for n, t in tensors.items()] for group, tensors in state.items()}, {})
    assert saver.wait() is None
    return Checkpoint(folder / "step_00000001")


def assert_bit_equal(state: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for part in ("model", "optimizer"):
        assert state[part].keys() == expected[part].keys()
        assert [n for n, t in expected[part].items() if not torch.equal(state[part][n], t)] == []


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro: int) -> None:
    whole, parts = build(), build(micro)
    results = []
    for backend in (whole, parts):
        backend.model.double()
        results.append(backend.forward_backward(batch(backend), 2))
    torch.testing.assert_close(results[1].loss, results[0].loss)
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-14, msg=name)


def test_loss_is_the_mean_per_target() -> None:
    backend = build(2)
    result = backend.forward_backward(batch(backend), 2)
    output = backend.evaluate(batch(backend), 2)
    torch.testing.assert_close(result.loss, output.loss_sum / batch(backend).num_targets)
    assert not output.loss_sum.requires_grad
    assert result.memory_norms == {}
    norms = backend.forward_backward(batch(backend), 2, traced=True).memory_norms
    assert norms.keys() == {1, 2}
    assert all(norm > 0 and update > 0 for norm, update in norms.values())


def learning_to_halt(micro: int | None, cost: float, **optim: float) -> LocalBackend:
    backend = build(micro, **optim)
    sleep = replace(backend.config.sleep, halting="learned", num_passes=4, halting_cost=cost)
    return LocalBackend(replace(backend.config, sleep=sleep), make_task(backend.config.task).vocab_size)


def test_the_cost_of_halting_is_per_sequence_and_not_part_of_the_loss() -> None:
    """Whatever the microbatches and the number of targets; here each pass halts with the chance 0.12."""
    goes_on = 1 - torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64))
    slope = -(goes_on + 2 * goes_on**2 + 3 * goes_on**3) * (1 - goes_on)  # of a window's passes by the bias
    for micro in (None, 2):
        found = []
        for cost in (0.0, 0.5):
            backend = learning_to_halt(micro, cost)
            result = backend.forward_backward(batch(backend), 4)
            found.append((result.loss, backend.model.halting_head.bias.grad))
        assert torch.equal(found[0][0], found[1][0])
        two_windows = 0.5 * 2 * slope.float()
        torch.testing.assert_close(found[1][1] - found[0][1], two_windows[None], rtol=1e-4, atol=1e-6)


def test_a_cost_makes_sleep_shorter() -> None:
    means = []
    for cost in (0.0, 1.0):
        backend = learning_to_halt(None, cost, adamw_lr=0.03)
        for step in range(8):
            result = backend.forward_backward(batch(backend, step), 4)
            backend.step(1.0, result.loss)
        means.append(float(backend.evaluate(batch(backend), 4).passes.mean()))
        made = backend.evaluate(batch(backend), 4, Stop(halt_threshold=0.3)).passes
        assert 1 <= made.min() <= made.max() <= 4
    assert means[1] < means[0] - 0.1


def test_an_evaluation_may_stop_its_passes() -> None:
    backend = build()
    passes = [backend.evaluate(batch(backend), 4, Stop(t)).passes for t in (0.0, math.inf)]
    assert [p.tolist() for p in passes] == [[[4, 4]] * 8, [[2, 2]] * 8]
    assert backend.evaluate(batch(backend), 4).passes is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_non_finite_step_changes_no_bit(where: str, value: float) -> None:
    backend = build()
    train(backend, range(1))
    before = state_of(backend)
    loss = backend.forward_backward(batch(backend, 1), 2).loss
    if where == "gradient":
        backend.model.embed.weight.grad[0, 0] = value
    result = backend.step(1.0, loss if where == "gradient" else torch.tensor(value))
    assert not result.applied
    assert_bit_equal(state_of(backend), before)
    assert all(p.grad is None for p in backend.model.parameters())
    train(backend, range(1, 2))  # and it goes on


@pytest.mark.parametrize("clip", [1e-3, 1e3, 0.0])
def test_clipping_by_the_global_norm(clip: float) -> None:
    """After one step Muon's momentum is 0.05, AdamW's 0.1 times the clipped gradient."""
    backend = build(clip_norm=clip)
    loss = backend.forward_backward(batch(backend), 2).loss
    expected = torch.stack([p.grad.norm() for p in backend.model.parameters()]).norm()
    result = backend.step(1.0, loss)
    state = state_of(backend)["optimizer"]
    used = [t / 0.05 for n, t in state.items() if n.endswith("/momentum")]
    used += [t / 0.1 for n, t in state.items() if n.endswith("/exp_avg")]
    norm = torch.stack([t.norm() for t in used]).norm()
    assert result.grad_norm == pytest.approx(float(expected))
    assert result.loss == pytest.approx(float(loss))
    assert float(norm) == pytest.approx(clip if clip == 1e-3 else float(expected), rel=1e-3)


def test_a_saved_state_goes_on_bit_equal(tmp_path: Path) -> None:
    uncut, first, second = build(), build(), build(seed=1)
    train(uncut, range(4))
    train(first, range(2))
    second.load(saved(tmp_path, state_of(first)))
    train(second, range(2, 4))
    assert_bit_equal(state_of(second), state_of(uncut))


def test_the_state_of_step_0_can_be_loaded_again(tmp_path: Path) -> None:
    fresh, used = build(), build()
    start = state_of(used)
    train(used, range(2))
    used.load(saved(tmp_path, start))
    train(used, range(1))
    train(fresh, range(1))
    assert_bit_equal(state_of(used), state_of(fresh))


def test_the_checkpoint_of_another_model_is_refused_by_names(tmp_path: Path) -> None:
    backend = build()
    before = state_of(backend)
    missing, other_shape, foreign = (state_of(backend) for _ in range(3))
    del missing["model"]["head.weight"]
    other_shape["model"]["embed.weight"] = torch.zeros(2, 2)
    foreign["model"]["stack.blocks.9.gone"] = torch.zeros(2)
    for state, name in ((missing, "head.weight"), (other_shape, "embed.weight"), (foreign, "blocks.9.gone")):
        with pytest.raises(ValueError, match=name):
            backend.load(saved(tmp_path, state))
        assert_bit_equal(state_of(backend), before)


def test_bfloat16_computes_over_float32_weights() -> None:
    low, full = build(precision="bfloat16"), build()
    losses = [b.forward_backward(batch(b), 2).loss for b in (low, full)]
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in low.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"run\.device=cuda"):
        choose_device("cuda")


def test_a_weight_that_never_had_a_gradient_is_saved_and_loaded() -> None:
    backend = build()
    train(backend, range(1))
    parameter = next(p for name, p in backend.model.named_parameters() if name == "embed.weight")
    del backend.optimizer.adamw.state[parameter]
    state = backend.optimizer.state()
    assert not state["embed.weight/exp_avg"].any()
    build().optimizer.load(state)
