"""The same backend on NCCL, one process: losses equal to plain torch on the same GPU. ``pytest -m gpu``."""

import os
from dataclasses import replace

import pytest
import torch

from sleeptrain.config import Config, ModelConfig, OptimConfig, ParallelConfig, RunConfig, SleepConfig
from sleeptrain.data.stream import TrainStream
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.parallel.place import make_backend, open_place
from sleeptrain.tasks import make_task

pytestmark = pytest.mark.gpu
BFLOAT16_TOLERANCE = 2e-2  # of a loss near 2 nats, after steps in bfloat16 with sums in another order


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", BFLOAT16_TOLERANCE)])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_process_on_nccl_equals_local(precision: str, tolerance: float, zero_stage: int) -> None:
    local = Config(
        run=RunConfig(device="cuda", precision=precision),
        model=ModelConfig(embedding_init_std=1.0, init_std=0.1),
        sleep=SleepConfig(window_tokens=12, num_passes=2),
        optim=OptimConfig(num_steps=5),
    )
    parallel = ParallelConfig(backend="megatron_deepspeed", zero_stage=zero_stage)
    task = make_task(local.task)
    expected = losses(LocalBackend(local, task.vocab_size), local)
    os.environ.setdefault("MASTER_PORT", "29511")
    with open_place(replace(local, parallel=parallel), task.vocab_size, task.sequence_tokens) as place:
        backend = make_backend(replace(local, parallel=parallel), task.vocab_size, place)
        assert torch.distributed.get_backend(place.data) == "nccl"
        assert losses(backend, local) == pytest.approx(expected, rel=0, abs=tolerance)


def losses(backend, config: Config) -> list[float]:
    stream = TrainStream(make_task(config.task), 0, 32, config.sleep.window_tokens)
    results = []
    for step in range(5):
        result = backend.forward_backward(stream.batch(step), 2)
        results.append(backend.step(0.5, result.loss).loss)
    return results
