"""The table of splits: it knows every weight of every kind of block, and its parts tile each weight."""

from dataclasses import replace

import pytest
import torch

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.model.sleep import SleepModel
from sleeptrain.parallel.layout import REPLICATED, SUMMED, box_of, check_tensor_size, split_of
from sleeptrain.schema import ConfigError

VOCAB = 16
MODEL = ModelConfig(
    d_model=16,
    pattern="attn swa:4 gdn jet",
    num_heads=8,
    num_kv_heads=4,
    memory_heads=8,
    memory_qk_heads=4,
    memory_key_dim=4,
    memory_value_dim=3,
    mlp_dim=8,
)

PRETRAINED = {"attention_bias": True, "attention_gate": True, "qk_norm": "head", "norm_placement": "sandwich"}


def shapes(model: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        whole = SleepModel(model, SleepConfig(learned_initial_state=True), VOCAB)
    return {name: p.shape for name, p in whole.named_parameters()}


@pytest.mark.parametrize("rule", ["gated_delta", "delta", "gated_hebbian"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [{}, PRETRAINED, {"qk_norm": "width"}])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_tile_every_weight(rule: str, tied: bool, kind: dict, size: int) -> None:
    for name, shape in shapes(replace(MODEL, rule=rule, tie_embeddings=tied, **kind)).items():
        times_held = torch.zeros(shape, dtype=torch.int)
        for rank in range(size):
            times_held[tuple(slice(a, b) for a, b in box_of(name, shape, rank, size))] += 1
        copies = 1 if split_of(name).dim is not None else size
        assert (times_held == copies).all(), name


def test_what_a_rank_sees_in_part_is_summed() -> None:
    names = shapes(MODEL)
    summed = {name for name in names if split_of(name) == SUMMED}
    assert summed == {
        "stack.blocks.2.mixer.o_norm.weight",
        "stack.blocks.3.mixer.o_norm.weight",
        "stack.blocks.3.mixer.kernel_in.weight",
    }
    whole = {name for name in names if split_of(name) == REPLICATED}
    assert whole == {name for name in names if name.endswith("norm.weight")} - summed
    assert {name for name in names if split_of(name, sequence_parallel=True).is_summed} == summed | whole


def test_norms_of_heads_are_summed_and_those_over_all_heads_are_split() -> None:
    assert split_of("stack.blocks.0.mixer.q_norm.weight") == SUMMED
    assert split_of("stack.blocks.0.mixer.k_width_norm.weight").dim == 0
    assert split_of("stack.blocks.0.mixer_out_norm.weight") == REPLICATED


@pytest.mark.parametrize(
    "name", ["stack.blocks.0.mixer.z_proj.weight", "stack.blocks.0.mlp.bias", "embed.bias"]
)
def test_a_weight_that_the_table_does_not_know_is_no_guess(name: str) -> None:
    with pytest.raises(KeyError, match=rf"no split for the weight {name}; add it to TABLE"):
        split_of(name)


def test_only_heads_of_blocks_that_are_there_must_divide() -> None:
    without_memory = replace(MODEL, pattern="attn", memory_heads=3, memory_qk_heads=3)
    without_attention = replace(MODEL, pattern="gdn", num_heads=1, num_kv_heads=1)
    for model in (MODEL, without_memory, without_attention):
        check_tensor_size(model, VOCAB, 4)
    with pytest.raises(ConfigError, match=r"tensor_size=4 does not divide model\.num_heads=1; change one"):
        check_tensor_size(replace(without_attention, pattern="gdn swa:2"), VOCAB, 4)
    with pytest.raises(ConfigError, match=r"tensor_size=4 does not divide model\.memory_heads=3; change one"):
        check_tensor_size(replace(without_memory, pattern="attn jet"), VOCAB, 4)
