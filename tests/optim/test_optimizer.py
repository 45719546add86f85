"""Which weight is trained by what; stopping and going on changes no bit."""

import pytest
import torch

from sleeptrain.config import ModelConfig, OptimConfig, SleepConfig
from sleeptrain.model import SleepModel
from sleeptrain.optim.optimizer import MuonAdamW, is_muon, takes_decay

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FAST_WEIGHT = ATTENTION | {"a_proj", "b_proj", "g_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def build(seed: int = 0, **optim: float) -> tuple[SleepModel, MuonAdamW]:
    config = ModelConfig(pattern="attn gdn jet", d_model=16, memory_key_dim=4, memory_value_dim=4)
    model = SleepModel(config, SleepConfig(learned_initial_state=True), 7, seed)
    return model, MuonAdamW(model, OptimConfig(**optim))


def names(optimizer: MuonAdamW, parameters) -> set[str]:
    return {optimizer.names[id(p)] for p in parameters}


def give_gradients(model: SleepModel, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def test_muon_trains_the_matrices_of_the_blocks() -> None:
    model, optimizer = build()
    mixers = [ATTENTION, FAST_WEIGHT, FAST_WEIGHT | {"kernel_in", "kernel_out"}]
    expected = {f"stack.blocks.{i}.mixer.{m}.weight" for i, names in enumerate(mixers) for m in names}
    expected |= {f"stack.blocks.{i}.{m}.weight" for i in range(3) for m in MLP}
    found = names(optimizer, optimizer.muon.param_groups[0]["params"])
    assert found == expected
    adamw = [names(optimizer, group["params"]) for group in optimizer.adamw.param_groups]
    assert sum(map(len, (found, *adamw))) == len(list(model.parameters()))
    assert found.union(*adamw) == {name for name, _ in model.named_parameters()}


def test_norms_gates_and_initial_state_take_no_decay() -> None:
    _, optimizer = build(weight_decay=0.5)
    with_decay, without = optimizer.adamw.param_groups
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.5, 0.0)
    assert optimizer.muon.param_groups[0]["weight_decay"] == 0.5
    convolutions = {f"stack.blocks.1.mixer.{x}_conv" for x in "qkv"}
    assert names(optimizer, with_decay["params"]) == convolutions | {
        "embed.weight",
        "head.weight",
        "stack.blocks.2.mixer.kernel_out.bias",
    }
    undecayed = {n.split(".")[-1] if "norm" not in n else "norm" for n in names(optimizer, without["params"])}
    assert undecayed == {"norm", "A_log", "dt_bias", "1", "2"}


def test_of_learned_halting_the_bias_takes_no_decay() -> None:
    assert takes_decay("halting_head.weight")
    assert not takes_decay("halting_head.bias")
    assert not is_muon("halting_head.weight", torch.Size([8]))


def test_the_first_adamw_step_and_the_factor_on_both_rates() -> None:
    """AdamW's first update is the sign of the gradient times the rate; a factor of 0 changes nothing."""
    model, optimizer = build(adamw_lr=0.1, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    give_gradients(model, 0)
    optimizer.step(0.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model, optimizer = build(adamw_lr=0.1, weight_decay=0.0)
    give_gradients(model, 0)
    optimizer.step(0.5)
    moved = before["embed.weight"] - model.embed.weight
    torch.testing.assert_close(moved, 0.05 * model.embed.weight.grad.sign(), atol=1e-4, rtol=1e-4)
    assert optimizer.num_updates == 1


def test_state_and_load_go_on_bit_equal() -> None:
    model, optimizer = build()
    for step in range(2):
        give_gradients(model, step)
        optimizer.step(1.0)
    saved = {n: t.clone() for n, t in optimizer.state().items()}
    assert [n for n, t in saved.items() if "/" not in n] == ["num_updates"]
    resumed, fresh = build(seed=1)
    resumed.load_state_dict(model.state_dict())
    fresh.load(saved)
    for step in range(2, 4):
        for m, o in ((model, optimizer), (resumed, fresh)):
            give_gradients(m, step)
            o.step(0.7)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, resumed.get_parameter(n))] == []
    again = fresh.state()
    assert all(torch.equal(t, again[n]) for n, t in optimizer.state().items())


def test_loading_a_fresh_state_forgets_what_was_there() -> None:
    (model, optimizer), (other, fresh) = build(), build()
    start = {n: t.clone() for n, t in optimizer.state().items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    give_gradients(model, 0)
    optimizer.step(1.0)
    optimizer.load(start)
    model.load_state_dict(weights)
    for m, o in ((model, optimizer), (other, fresh)):
        give_gradients(m, 1)
        o.step(1.0)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, other.get_parameter(n))] == []


def test_a_missing_tensor_is_named() -> None:
    model, optimizer = build()
    give_gradients(model, 0)
    optimizer.step(1.0)
    saved = optimizer.state()
    del saved["embed.weight/exp_avg"]
    with pytest.raises(KeyError, match=r"embed\.weight/exp_avg"):
        build()[1].load(saved)
