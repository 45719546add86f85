"""The arithmetic of cost against what the real model runs, saves and owns."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sleeptrain.config import ModelConfig, OptimConfig, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model import flops
from sleeptrain.model.sleep import Output, SleepModel
from sleeptrain.model.visits import Visit, Window, cut, plan
from sleeptrain.optim.optimizer import MuonAdamW

VOCAB, BATCH = 11, 2
HYBRID = ModelConfig(
    d_model=16,
    pattern="attn gdn swa:5 jet gdn attn",
    num_kv_heads=2,
    head_dim=6,
    memory_qk_heads=2,
    memory_key_dim=4,
    memory_value_dim=6,
)
GATED = replace(
    HYBRID, attention_bias=True, attention_gate=True, qk_norm="head", norm_placement="mixed", memory_mlp=False
)
SANDWICH = replace(HYBRID, norm_placement="sandwich", qk_norm="width", memory_mlp=False)
RANGES = replace(HYBRID, prelude_blocks=1, coda_blocks=2)
SLEEP = SleepConfig(window_tokens=8, num_passes=3)
LAST_ONLY = (False, False, False, True)
EVERY = (True, True, True, True)
CARRY = replace(SLEEP, carry_between_batches=True, schedule="predict_then_consolidate", eviction="sliding")

SETTINGS = [
    pytest.param(HYBRID, SLEEP, LAST_ONLY, id="hard"),
    pytest.param(HYBRID, replace(SLEEP, eviction="sliding"), LAST_ONLY, id="sliding"),
    pytest.param(HYBRID, replace(SLEEP, convolution="carried"), LAST_ONLY, id="carried"),
    pytest.param(RANGES, SLEEP, LAST_ONLY, id="ranges"),
    pytest.param(GATED, SLEEP, LAST_ONLY, id="gated"),
    pytest.param(SANDWICH, replace(SLEEP, eviction="sliding"), LAST_ONLY, id="sandwich"),
    pytest.param(RANGES, replace(SLEEP, schedule="predict_then_consolidate"), EVERY, id="predict-first"),
    pytest.param(replace(HYBRID, rule="delta"), SLEEP, LAST_ONLY, id="delta"),
    pytest.param(RANGES, replace(SLEEP, carry_between_batches=True), (True, False, True, False), id="carry"),
    pytest.param(RANGES, CARRY, EVERY, id="carry-predict-first-sliding"),
]


def batch_of(has_loss: tuple[bool, ...], num_tokens: int = 29) -> Batch:
    ids = torch.randint(VOCAB, (BATCH, num_tokens))
    loss_mask = torch.tensor(has_loss).repeat_interleave(SLEEP.window_tokens)[:num_tokens].expand(BATCH, -1)
    return Batch(ids, ids, loss_mask, None, None, torch.zeros(BATCH), has_loss, int(loss_mask.sum()))


def planned(
    config: ModelConfig, sleep: SleepConfig, has_loss: tuple[bool, ...], num_passes: int = 3
) -> tuple[list[Window], list[Visit]]:
    windows = cut(29, sleep.window_tokens, has_loss)
    return windows, plan(windows, num_passes, config, sleep)


def forward_of(model: SleepModel, batch: Batch) -> Callable[[], Output]:
    """With three passes, as in training; with the state of a batch before where it is carried."""
    if not model.sleep.carry_between_batches:
        return lambda: model(batch, 3)
    with torch.no_grad():
        state = model(batch, 3, is_continued=True).state
    return lambda: model(batch, 3, state, is_continued=True)


def counted_linear(run: Callable[[], object]) -> float:
    """FLOPs per sequence of plain matrix products: linear maps and head (all else uses batched ones)."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(by_operator.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) / BATCH


@pytest.mark.parametrize(("config", "sleep", "has_loss"), SETTINGS)
def test_linear_flops_are_those_of_a_forward_pass(config, sleep, has_loss) -> None:
    model = SleepModel(config, sleep, VOCAB)
    expected = flops.forward_flops(config, sleep, *planned(config, sleep, has_loss), VOCAB)
    batch = batch_of(has_loss)
    assert expected.linear + expected.head == counted_linear(forward_of(model, batch))


@pytest.mark.parametrize(
    ("mode", "backprop_passes"), [("none", 0), ("pass", 0), ("block", 0), ("both", 0), ("pass", 1)]
)
@pytest.mark.parametrize("carry", [False, True])
def test_training_flops_are_those_of_forward_backward_and_recomputation(mode, backprop_passes, carry) -> None:
    # Without attention, convolutions and a rule to speak of, linear maps are the whole cost.
    config = ModelConfig(d_model=64, memory_key_dim=2, memory_value_dim=2, pattern="attn gdn")
    sleep = replace(SLEEP, activation_checkpointing=mode, backprop_passes=backprop_passes)
    has_loss = (False, True, False, False) if carry else LAST_ONLY  # what follows the loss learns nothing
    sleep = replace(sleep, carry_between_batches=carry)
    cost = flops.training_flops(config, sleep, *planned(config, sleep, has_loss), VOCAB)
    model, batch = SleepModel(config, sleep, VOCAB), batch_of(has_loss)
    forward = forward_of(model, batch)
    measured = counted_linear(lambda: forward().loss_sum.backward())
    assert measured == pytest.approx(cost.hardware, rel=0.02)
    assert cost.model <= cost.hardware
    assert (cost.model == cost.hardware) == (mode == "none")
    assert (cost.model < 3 * cost.forward) == (backprop_passes == 1 or carry)


@pytest.mark.parametrize(
    ("config", "sleep"),
    [
        pytest.param(HYBRID, SLEEP, id="hard"),
        pytest.param(HYBRID, replace(SLEEP, eviction="sliding"), id="sliding"),
        pytest.param(HYBRID, replace(SLEEP, eviction="sliding", sliding_kv="per_pass"), id="per-pass"),
        pytest.param(HYBRID, CARRY, id="carry"),
    ],
)
def test_attention_flops_count_the_pairs_of_the_real_masks(monkeypatch, config, sleep) -> None:
    pairs, attend = [], torch.nn.functional.scaled_dot_product_attention

    def counting(q, k, v, attn_mask=None, **options):
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        pairs.append(int((causal if attn_mask is None else attn_mask[0]).sum()))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    forward = forward_of(SleepModel(config, sleep, VOCAB), batch_of(LAST_ONLY))
    pairs.clear()
    forward()
    expected = flops.forward_flops(config, sleep, *planned(config, sleep, LAST_ONLY), VOCAB).attention
    assert expected == 4 * sum(pairs) * config.num_heads * config.attention_head_dim


def test_attention_pairs_by_hand() -> None:
    attention, narrow = HYBRID.blocks[0], HYBRID.blocks[2]
    sliding = replace(SLEEP, eviction="sliding")
    assert flops.attention_pairs(Window(8, 16, False), attention, SLEEP) == 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8
    assert flops.attention_pairs(Window(8, 16, False), narrow, SLEEP) == 1 + 2 + 3 + 4 + 5 * 4
    assert flops.attention_pairs(Window(8, 16, False), attention, sliding) == 8 * 8
    assert flops.attention_pairs(Window(24, 29, False), narrow, sliding) == 5 * 5


def test_memory_flops_by_hand() -> None:
    config = ModelConfig(d_model=16, pattern="attn gdn", memory_key_dim=4, memory_value_dim=6)  # 4 heads
    windows, visits = planned(config, SLEEP, LAST_ONLY, num_passes=2)
    read_tokens, write_tokens = 24 + 5, 24  # pass 1 of 3 windows and the last window; pass 2 of 3 windows
    convolution = 2 * 4  # taps
    read = 8 * 4 * 6 * 4 + convolution * 4 * (4 + 4 + 6)
    write = 6 * 4 * 6 * 4 + convolution * 4 * (4 + 6)
    assert (
        flops.forward_flops(config, SLEEP, windows, visits, VOCAB).memory
        == read_tokens * read + write_tokens * write
    )
    hebbian = flops.forward_flops(replace(config, rule="gated_hebbian"), SLEEP, windows, visits, VOCAB)
    erasing = 4 * 4 * 6 * 4
    assert hebbian.memory == read_tokens * (read - erasing) + write_tokens * (write - erasing)


@pytest.mark.parametrize(
    ("config", "sleep"),
    [
        (HYBRID, SLEEP),
        (replace(HYBRID, tie_embeddings=True, rule="delta"), SLEEP),
        (GATED, SLEEP),
        (SANDWICH, SLEEP),
        (HYBRID, replace(SLEEP, halting="learned", num_passes=2)),
        (replace(HYBRID, rule="gated_hebbian", mlp_dim=20), replace(SLEEP, learned_initial_state=True)),
    ],
)
def test_parameters_and_optimizer_bytes_are_those_of_the_model(config, sleep) -> None:
    model = SleepModel(config, sleep, VOCAB)
    parts = flops.count_parameters(config, sleep, VOCAB)
    assert sum(parts) == sum(p.numel() for p in model.parameters())
    assert parts.embedding == model.embed.weight.numel()
    assert parts.mlp == sum(p.numel() for name, p in model.named_parameters() if ".mlp" in name)
    assert parts.head - model.final_norm.weight.numel() == (0 if config.tie_embeddings else VOCAB * 16)
    attention = [b for b in model.stack.blocks if hasattr(b.mixer, "k_proj") and not hasattr(b.mixer, "rule")]
    assert parts.attention == sum(
        p.numel()
        for b in attention
        for m in (b.mixer, b.mixer_norm, b.mixer_out_norm)
        for p in m.parameters()
    )

    fixed = flops.fixed_bytes(config, sleep, VOCAB)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = MuonAdamW(model, OptimConfig())
    optimizer.step(1.0)
    moments = [value.nbytes for name, value in optimizer.state().items() if name != "num_updates"]
    assert fixed == (4 * sum(parts), 4 * sum(parts), sum(moments))
    assert flops.state_bytes(config) == sum(
        state.memory.nbytes for state in model.initial_state(1) if state.memory is not None
    )


def test_ratio_of_passes_is_nearly_the_formula_of_equal_windows() -> None:
    config = ModelConfig(d_model=64, pattern="attn gdn " * 8)
    windows = cut(96, 24, LAST_ONLY)
    for num_passes in (2, 4, 8):
        ratio = flops.pass_ratio(config, SLEEP, windows, VOCAB, num_passes)
        assert ratio == pytest.approx((3 * num_passes + 1) / 4, rel=0.05)  # dead tail


def test_ratio_rises_with_passes_and_falls_with_blocks_that_do_not_loop() -> None:
    windows = cut(29, SLEEP.window_tokens, LAST_ONLY)
    for config in (HYBRID, RANGES):
        ratios = [flops.pass_ratio(config, SLEEP, windows, VOCAB, n) for n in range(1, 6)]
        assert ratios[0] == 1
        assert ratios == sorted(set(ratios))
    assert flops.pass_ratio(RANGES, SLEEP, windows, VOCAB, 4) < flops.pass_ratio(
        HYBRID, SLEEP, windows, VOCAB, 4
    )


def saved_bytes(model: SleepModel, batch: Batch) -> float:
    """Bytes per sequence saved for the backward pass, weights aside, each storage once."""
    forward = forward_of(model, batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, alive = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # keeps its address from being used again
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values()) / BATCH


@pytest.mark.parametrize(("config", "sleep", "has_loss"), SETTINGS)
def test_activation_bytes_are_those_really_saved(config, sleep, has_loss) -> None:
    wide = replace(config, d_model=64, memory_key_dim=16, memory_value_dim=24, head_dim=None)
    windows, visits = planned(wide, sleep, has_loss)
    expected = flops.activation_bytes(wide, sleep, windows, visits, VOCAB, per_pass=False)
    assert expected == pytest.approx(saved_bytes(SleepModel(wide, sleep, VOCAB), batch_of(has_loss)), rel=0.1)


def test_checkpointed_passes_keep_h_and_fast_weights_only() -> None:
    config = ModelConfig(d_model=16, pattern="attn gdn", memory_key_dim=4, memory_value_dim=6)  # 4 heads

    def held(num_passes: int, per_pass: bool) -> int:
        return flops.activation_bytes(
            config, SLEEP, *planned(config, SLEEP, LAST_ONLY, num_passes), VOCAB, per_pass
        )

    sleeping_windows = 3
    assert held(5, True) - held(4, True) == 4 * sleeping_windows * (8 * 16 + 4 * 4 * 6)
    assert held(4, True) < held(4, False) / 4
    one_window = flops.activation_bytes(
        config, SLEEP, *planned(config, SLEEP, (True,), 1), VOCAB, per_pass=True
    )
    assert one_window == flops.activation_bytes(
        config, SLEEP, *planned(config, SLEEP, (True,), 1), VOCAB, per_pass=False
    )


def test_truncated_backpropagation_bounds_activations() -> None:
    sleep = replace(SLEEP, backprop_passes=1)
    held = [
        flops.activation_bytes(HYBRID, sleep, *planned(HYBRID, sleep, LAST_ONLY, n), VOCAB, per_pass=False)
        for n in (2, 6)
    ]
    assert held[0] == held[1]


def test_peaks_of_known_devices() -> None:
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == flops.peak_flops("NVIDIA H200") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA B200") == 2250e12
    assert flops.peak_flops("NVIDIA GeForce RTX 4090") is None
