"""The arithmetic of layouts against real stages: what each rank holds, and what it saves on the way."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from ranks import run_ranks

from sleeptrain.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SleepConfig,
    TextConfig,
)
from sleeptrain.data.batch import Batch
from sleeptrain.model.flops import activation_bytes, count_parameters
from sleeptrain.model.visits import cut, plan
from sleeptrain.parallel.layout import (
    blocks_of_stage,
    logical_shapes,
    model_of_rank,
    shares_of_stage,
    split_of,
)
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.rank_memory import fixed_bytes, live_bytes, most_alive, rank_bytes, visit_bytes
from sleeptrain.parallel.topology import join
from sleeptrain.schema import ConfigError

VOCAB, WINDOW = 26, 16
LOSSES = (False, False, True)
WINDOWS = cut(3 * WINDOW, WINDOW, LOSSES)
MODEL = ModelConfig(
    d_model=24,
    pattern="attn jet gdn attn gdn jet",
    prelude_blocks=1,
    coda_blocks=1,
    num_heads=4,
    num_kv_heads=2,
    memory_qk_heads=2,
    memory_key_dim=6,
    memory_value_dim=6,
    jet_reduction=4,
)


def spread(tensor: int = 1, pipeline: int = 1, data: int = 1, zero: int = 1, **model: Any) -> Config:
    return Config(
        model=replace(MODEL, **model),
        sleep=SleepConfig(window_tokens=WINDOW),
        task=TextConfig(sequence_tokens=3 * WINDOW),
        data=DataConfig(batch_sequences=8),
        parallel=ParallelConfig("megatron_deepspeed", tensor, pipeline, data, zero_stage=zero),  # type: ignore[arg-type]
    )


def in_bfloat16(config: Config) -> Config:
    parallel = replace(config.parallel, weights="bfloat16")
    return replace(config, run=RunConfig(precision="bfloat16"), parallel=parallel)


def batch_of(config: Config, num_sequences: int) -> Batch:
    ids = torch.randint(VOCAB, (num_sequences, config.task.sequence_tokens))
    loss_mask = torch.tensor(LOSSES).repeat_interleave(config.sleep.window_tokens).expand(num_sequences, -1)
    no_labels = torch.zeros(num_sequences)
    return Batch(ids, ids, loss_mask, None, None, no_labels, LOSSES, int(loss_mask.sum()))


def measured_fixed_bytes(config: Config) -> tuple[int, int, tuple[int, int, int, int]]:
    """As a rank: its stage, its replica, and the bytes of its real tensors in the middle of a step."""
    topology = join(config.parallel, torch.device("cpu"))
    backend = MegatronDeepspeedBackend(config, VOCAB, topology)
    parameters, gradients = list(backend.model.parameters()), []
    sum_partial = backend._sum_partial_gradients

    def at_the_end_of_backward() -> None:
        sum_partial()
        gradients.extend(p.grad.nbytes for p in parameters if p.grad is not None)

    backend._sum_partial_gradients = at_the_end_of_backward  # type: ignore[method-assign]
    rows = config.data.batch_sequences // topology.data.size()
    result = backend.forward_backward(batch_of(config, rows), 2)
    assert backend.step(1.0, result.loss).applied
    shards: Any = backend.shards
    stage = config.parallel.zero_stage
    masters: list[torch.Tensor] = []
    if stage == 0:
        weights = parameters
    elif stage == 3:
        weights = [p.ds_tensor for p in parameters]  # type: ignore[attr-defined]
        masters = shards.sharder.fp32_partitioned_groups_flat
    else:
        weights = shards.sharder.bit16_groups_flat
        masters = shards.sharder.single_partition_of_fp32_groups
    moments = [x for state in shards.optimizer.state.values() for k, x in state.items() if k != "step"]
    moments += backend.update.momenta.values()
    sizes = [sum(x.nbytes for x in of_kind) for of_kind in (weights, masters, moments)]
    return topology.pipeline.rank(), topology.data.rank(), (sizes[0], sizes[1], sum(gradients), sizes[2])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(spread(data=2, zero=0), id="dp2 zero0"),
        pytest.param(spread(data=2, zero=2), id="dp2 zero2"),
        pytest.param(spread(data=2, zero=3), id="dp2 zero3"),
        pytest.param(in_bfloat16(spread(data=2)), id="dp2 zero1 bfloat16"),
        pytest.param(spread(tensor=2, pipeline=2), id="tp2 pp2"),
        pytest.param(spread(pipeline=2, data=2, tie_embeddings=True), id="pp2 dp2 tied"),
    ],
)
def test_bytes_of_weights_gradients_and_optimizer_are_those_of_real_stages(config) -> None:
    parallel = config.parallel
    replicas = parallel.data_size
    for stage, replica, measured in run_ranks(
        parallel.tensor_size * parallel.pipeline_size * replicas, measured_fixed_bytes, config
    ):
        expected = fixed_bytes(config, shares_of_stage(config, VOCAB, stage), replicas)
        print(stage, replica, measured, expected)
        if replica == 0:
            assert measured == expected
        else:
            assert measured[:3] == expected[:3]


def peak_bytes(run: Any) -> int:
    """Most that is allocated at once beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measured_peaks(configs: list[Config]) -> tuple[int, list[int]]:
    """As a rank: its stage, and the peaks of forward and backward, less the gradients of the weights."""
    topology, peaks = join(configs[0].parallel, torch.device("cpu")), []
    for config in configs:
        backend = MegatronDeepspeedBackend(config, VOCAB, topology)
        batch, num_passes = batch_of(config, config.data.batch_sequences), config.sleep.num_passes
        step = partial(backend.forward_backward, batch, num_passes)
        step()
        backend.shards.discard()
        peaks.append(peak_bytes(step) - sum(p.nbytes for p in backend.model.parameters()))
    return topology.pipeline.rank(), peaks


@pytest.mark.parametrize(
    ("mode", "degrees"),
    [
        ("none", {"pipeline": 2}),
        pytest.param("pass", {"pipeline": 2}, marks=pytest.mark.more),
        pytest.param("block", {"pipeline": 2}, marks=pytest.mark.more),
        pytest.param("both", {"tensor": 2, "pipeline": 2}, marks=pytest.mark.more),
        pytest.param("none", {"tensor": 2}, marks=pytest.mark.more),
        pytest.param("pass", {"tensor": 2}, marks=pytest.mark.more),
    ],
)
def test_activations_and_messages_are_those_of_a_measured_run(mode, degrees) -> None:
    wide = {"d_model": 64, "memory_key_dim": 16, "memory_value_dim": 16, "num_kv_heads": 4}
    base = replace(spread(zero=0, **degrees, **wide), task=TextConfig(sequence_tokens=192))
    sleeps = [SleepConfig(64, num_passes=n, activation_checkpointing=mode) for n in (1, 3)]
    configs, windows = [replace(base, sleep=sleep) for sleep in sleeps], cut(192, 64, LOSSES)
    num_ranks = base.parallel.tensor_size * base.parallel.pipeline_size
    for stage, measured in run_ranks(num_ranks, measured_peaks, configs):
        expected = [sum(live_bytes(config, VOCAB, windows, 1, stage)) for config in configs]
        tolerance = 0.1 if mode == "none" else 0.25  # of little, the parts not counted weigh more
        assert expected == pytest.approx(measured, rel=tolerance)
        if mode == "none":
            assert expected[1] - expected[0] == pytest.approx(measured[1] - measured[0], rel=0.06)


def test_stages_and_tensor_ranks_together_hold_every_weight_once() -> None:
    config = spread(tensor=2, pipeline=2)
    whole = logical_shapes(config, VOCAB)
    held: dict[str, int] = {}
    for stage in range(2):
        for share in shares_of_stage(config, VOCAB, stage):
            copies = 1 if split_of(share.name).dim is None else 2
            held[share.name] = held.get(share.name, 0) + copies * share.num_elements
    assert held == {name: shape.numel() for name, shape in whole.items()}


@pytest.mark.parametrize(("setting", "shared"), [("tied", "embed.weight"), ("looped", "final_norm.weight")])
def test_both_ends_hold_what_they_share(setting, shared) -> None:
    config = spread(pipeline=4, tie_embeddings=setting == "tied")
    config = replace(config, sleep=replace(config.sleep, norm_between_passes=setting == "looped"))
    holders = [
        stage for stage in range(4) if shared in {x.name for x in shares_of_stage(config, VOCAB, stage)}
    ]
    assert holders == [0, 3]


def test_every_stage_has_its_part_of_each_segment() -> None:
    assert [blocks_of_stage(MODEL, stage, 2) for stage in range(2)] == [
        {"prelude": range(0, 0), "core": range(1, 3), "coda": range(5, 5)},
        {"prelude": range(0, 1), "core": range(3, 5), "coda": range(5, 6)},
    ]
    with pytest.raises(ConfigError, match=r"parallel.pipeline_size=3 does not divide the 4 looped blocks"):
        blocks_of_stage(MODEL, 0, 3)


def test_a_rank_alone_computes_the_whole_model() -> None:
    config = spread()
    visits = plan(WINDOWS, config.sleep.num_passes, MODEL, config.sleep)
    everything = activation_bytes(MODEL, config.sleep, WINDOWS, visits, VOCAB, per_pass=False)
    assert sum(held for held, _ in visit_bytes(config, VOCAB, WINDOWS, 0)) == everything
    assert model_of_rank(config, 0).blocks == MODEL.blocks


def test_what_is_alive_by_hand() -> None:
    one, two = (1, 0), (1, 10)
    assert most_alive([one] * 5, 1, 1, 0) == 5  # no pipeline: all visits of the one microbatch
    assert most_alive([two, one, one], 1, 1, 0) == 11  # computed again when the other two are gone
    assert [most_alive([one], 8, 4, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [most_alive([one] * 3, 8, 4, stage) for stage in range(4)] == [
        15,
        13,
        11,
        9,
    ]  # (V - 1) p + 2 (p - 1) + 1
    assert most_alive([one] * 3, 4, 4, 0) == 12  # all there are


def test_plain_torch_has_no_masters_and_offloading_none_on_the_device() -> None:
    local = replace(spread(), parallel=ParallelConfig())
    shares = shares_of_stage(local, VOCAB, 0)
    assert fixed_bytes(local, shares, 1)[1] == 0
    parallel = ParallelConfig(data_size=2, offload_optimizer=True)
    assert fixed_bytes(replace(local, parallel=parallel), shares, 2)[1::2] == (0, 0)


def test_the_weights_of_learned_halting_count() -> None:
    config = replace(spread(), parallel=ParallelConfig())
    sizes = []
    for halting in ("none", "learned"):
        sleep = replace(config.sleep, halting=halting)
        shares = shares_of_stage(replace(config, sleep=sleep), VOCAB, 0)
        sizes.append(sum(share.num_elements for share in shares))
        assert sizes[-1] == sum(count_parameters(config.model, sleep, VOCAB))
    assert sizes[1] == sizes[0] + config.model.d_model + 1


def test_the_fullest_moment_is_backward_or_update() -> None:
    config = spread(data=2)
    found = rank_bytes(config, VOCAB, WINDOWS, 2, 0)
    lasting = found.weights + found.masters + found.gradients + found.optimizer
    assert found.total == lasting + max(found.activations, found.update)
    assert found.messages == 0
