"""Weights in bfloat16 with float32 masters: which ones, what is trained, what is saved."""

import pytest
import torch
from ranks import run_ranks

from sleeptrain.config import Config, ModelConfig, OptimConfig, ParallelConfig, RunConfig, SleepConfig
from sleeptrain.data.stream import TrainStream
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.topology import join
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

TINY_RATE = 1e-6  # of the learning rates: steps that bfloat16 could not hold


def config_of(**parallel) -> Config:
    return Config(
        run=RunConfig(device="cpu", precision="bfloat16"),
        model=ModelConfig(
            d_model=16, memory_key_dim=4, memory_value_dim=4, embedding_init_std=1.0, init_std=0.1
        ),
        sleep=SleepConfig(window_tokens=12, num_passes=2),
        optim=OptimConfig(weight_decay=0.0),
        parallel=ParallelConfig(**parallel),
    )


def train(config: Config, lr_factor: float, num_steps: int) -> dict:
    topology = join(config.parallel, torch.device("cpu"))
    task = make_task(config.task)
    backend = MegatronDeepspeedBackend(config, task.vocab_size, topology)
    stream = TrainStream(task, 0, 8, 12, topology.replica, topology.num_replicas)
    losses = []
    for step in range(num_steps):
        result = backend.forward_backward(stream.batch(step), 2)
        assert all(f.weight.dtype == torch.float32 for f in backend.shards.fragments)
        losses.append(backend.step(lr_factor, result.loss).loss)
    return {
        "losses": losses,
        "dtypes": {h.name: h.parameter.dtype for h in backend.held},
        "weights": {h.name: h.parameter.detach().float() for h in backend.held},
        "saved": {s.name: s.values.clone() for s in backend.slices()["model"]},
    }


@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.more)])
@pytest.mark.more
def test_losses_stay_near_those_of_float32_weights(zero_stage: int) -> None:
    degrees = {"tensor_size": 2, "data_size": 2, "zero_stage": zero_stage}
    small = run_ranks(4, train, config_of(weights="bfloat16", **degrees), 0.5, 5)
    full = run_ranks(4, train, config_of(**degrees), 0.5, 5)
    assert small[0]["losses"] == pytest.approx(full[0]["losses"], abs=2e-2)
    assert small[0]["losses"] != full[0]["losses"]


def test_masters_take_steps_that_the_weights_cannot_hold() -> None:
    config = config_of(weights="bfloat16", data_size=2)
    before, after = (run_ranks(2, train, config, TINY_RATE, n)[0] for n in (0, 3))
    for name, dtype in after["dtypes"].items():
        exempt = "norm" in name or name.endswith(("A_log", "dt_bias"))
        assert dtype == (torch.float32 if exempt else torch.bfloat16), name
    name = "stack.blocks.1.mixer.q_proj.weight"
    assert torch.equal(before["weights"][name], after["weights"][name])
    for saved in (before, after):  # a rank holds a part
        whole = saved["weights"][name].flatten()[: len(saved["saved"][name])]
        assert torch.equal(saved["saved"][name].bfloat16().float(), whole)
    assert not torch.equal(before["saved"][name], after["saved"][name])
    assert not torch.equal(before["saved"][name], before["saved"][name].bfloat16().float())


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_without_masters_it_is_refused(zero_stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"needs ZeRO stage 1 or 2, and parallel.zero_stage={zero_stage}"):
        config_of(weights="bfloat16", zero_stage=zero_stage)
