"""Initial weights: each by the seed and its own name alone, and the distributions of the method."""

import math

import pytest
import torch

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.model import SleepModel


def weights(pattern: str, seed: int = 0, sleep: dict | None = None, **settings) -> dict[str, torch.Tensor]:
    model = SleepModel(ModelConfig(pattern=pattern, **settings), SleepConfig(**sleep or {}), 97, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_weight_depends_on_the_seed_and_its_name_alone() -> None:
    two, four, swapped = weights("attn gdn"), weights("attn gdn attn jet"), weights("gdn attn")
    assert all(torch.equal(two[name], four[name]) for name in two)
    shared = {n for n in two if n in swapped and two[n].shape == swapped[n].shape and "norm" not in n}
    assert {"embed.weight", "head.weight", "stack.blocks.0.mlp.up_proj.weight"} <= shared
    assert all(torch.equal(two[name], swapped[name]) for name in shared)
    torch.manual_seed(123)
    assert all(torch.equal(two[name], again) for name, again in weights("attn gdn").items())
    other = weights("attn gdn", seed=1)
    assert [n for n in two if "norm" not in n and torch.equal(two[n], other[n])] == []
    drawn = [n for n in two if n.endswith("mlp.up_proj.weight")]
    assert not torch.equal(two[drawn[0]], two[drawn[1]])


def test_distributions() -> None:
    found = weights("gdn jet attn", d_model=64, memory_heads=64, memory_key_dim=4, memory_value_dim=4)
    for name, value in found.items():
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("A_log"):
            assert 0 < value.exp().min() < 4 < 12 < value.exp().max() <= 16
        elif name.endswith("dt_bias"):
            dt = torch.nn.functional.softplus(value)
            assert 0.99e-3 <= dt.min() < 3e-3 < 3e-2 < dt.max() <= 0.101
            assert abs(dt.log().mean() - math.log(1e-2)) < 0.6  # log-uniform
        elif value.dim() == 2 and not name.endswith(("_conv", "kernel_out.weight")):
            assert abs(value.std() - 0.02) < 0.003, name
            assert abs(value.mean()) < 0.003, name


def test_jet_starts_static_and_can_learn() -> None:
    found = weights("jet")
    assert (found["stack.blocks.0.mixer.kernel_out.weight"] == 0).all()
    assert 0.01 < found["stack.blocks.0.mixer.kernel_out.bias"].std() < 0.03
    assert 0.01 < found["stack.blocks.0.mixer.kernel_in.weight"].std() < 0.03


def test_a_learned_initial_state_starts_at_zero() -> None:
    found = weights("attn gdn", sleep={"learned_initial_state": True})
    assert (found["initial_memory.1"] == 0).all()


def test_halting_starts_rare_and_the_same_everywhere() -> None:
    found = weights("attn gdn", sleep={"halting": "learned"})
    assert (found["halting_head.weight"] == 0).all()
    assert found["halting_head.bias"].sigmoid().tolist() == pytest.approx([0.119], abs=1e-3)


def test_tied_head() -> None:
    model = SleepModel(ModelConfig(tie_embeddings=True), SleepConfig(), 97)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert abs(model.embed.weight.std() - 0.02) < 0.003
