"""The visits over p stages, all in this process and in float64: every microbatch forward, then every one
backward. It tells faults of the stages from faults of megatron-core's schedule and of messages."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from faults import FAULTS
from small import VOCAB, batch_of, config_of, disturbed
from torch import Tensor

from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import SleepModel
from sleeptrain.parallel.pipeline import _Trips
from sleeptrain.parallel.stage import Held, build_stage
from sleeptrain.parallel.topology import Topology

SLIDING = {"eviction": "sliding", "schedule": "predict_then_consolidate"}


class Ranks(NamedTuple):
    """A process group of which only rank and size are asked."""

    of_rank: int
    of_size: int

    def rank(self) -> int:
        return self.of_rank

    def size(self) -> int:
        return self.of_size


def build(config: Config, stage: int) -> tuple[SleepModel, list[Held]]:
    alone: Any = Ranks(0, 1)
    pipeline: Any = Ranks(stage, config.parallel.pipeline_size)
    topology = Topology(torch.device("cpu"), alone, pipeline, alone, pipeline, None, alone, alone)
    model, held = build_stage(config, VOCAB, topology)
    model.double()
    with torch.no_grad():
        for h in held:
            h.parameter.add_(disturbed(h.name, h.shape))
    return model, held


def flush(config: Config, batch: Batch, num_passes: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses per token and gradients by name, summed over the stages that hold a weight."""
    num_stages = config.parallel.pipeline_size
    models, held = zip(*(build(config, stage) for stage in range(num_stages)))
    parts = [batch.rows(slice(i, i + 2)) for i in range(0, len(batch.ids), 2)]
    trips = [_Trips(model, parts, num_passes, 1.0, nullcontext, None, None) for model in models]
    longest = max(window.stop - window.start for window in trips[0].windows)
    for of_stage in trips:
        of_stage.message_tokens = longest
    steps = list(product(range(len(parts)), range(len(trips[0].visits)), range(num_stages)))
    sent: list[Tensor] = []
    received: list[Tensor | None] = []
    for m, visit, stage in steps:
        is_first = visit == stage == 0
        received.append(None if is_first else sent[-1].detach().requires_grad_())
        chunk: Any = SimpleNamespace(index=visit, received=received[-1])
        sent.append(trips[stage].step(iter([m]), chunk)[0])
    received.append(None)
    for i in reversed(range(len(steps))):
        if sent[i].requires_grad:
            read_by = received[i + 1]
            assert read_by is None or read_by.grad is not None, "the stage before waits for a gradient"
            sent[i].backward(None if read_by is None else read_by.grad)
    gradients: dict[str, Tensor] = {}
    for h in (h for of_stage in held for h in of_stage):
        if h.parameter.grad is not None:
            gradients[h.name] = gradients.get(h.name, 0) + h.parameter.grad
    return torch.cat([walk.nll for walk in trips[-1].walks]), gradients


def in_one_piece(config: Config, batch: Batch, num_passes: int) -> tuple[Tensor, dict[str, Tensor]]:
    model = SleepModel(config.model, config.sleep, VOCAB).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += disturbed(name, parameter.shape)
    output = model(batch, num_passes)
    output.loss_sum.backward()
    return output.nll, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error_of(config: Config, batch: Batch, num_passes: int) -> float:
    """Relative, of the losses and of the worst gradient."""
    (nll, gradients), (true_nll, truth) = (f(config, batch, num_passes) for f in (flush, in_one_piece))
    unused = gradients.keys() - truth.keys()
    assert not truth.keys() - gradients.keys()
    assert not any(gradients[name].any() for name in unused)
    pairs = [(nll, true_nll), *((gradients[name], truth[name]) for name in truth)]
    return max(float((ours - true).norm() / true.norm()) for ours, true in pairs)


CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {  # stages, N, settings, batch
    "plain": (2, 1, {}, {}),
    "sleep": (2, 3, {"tie_embeddings": True}, {}),
    "text": (4, 3, SLIDING, {"loss_windows": (0, 1, 2)}),
    "segments": (
        2,
        4,
        {
            "pattern": "swa:3 gdn attn gdn attn gdn jet",
            "prelude_blocks": 2,
            "coda_blocks": 1,
            "backprop_passes": 2,
            "norm_between_passes": True,
        },
        {"padded": True, "resets": True},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stages_give_losses_and_gradients_of_the_whole(case: tuple) -> None:
    num_stages, num_passes, settings, batch = case
    config = config_of(pipeline=num_stages, init_std=0.2, **settings)
    assert error_of(config, batch_of(**batch), num_passes) < 1e-12


@pytest.mark.more
@pytest.mark.parametrize("what", ["memory", "caches", "tail", "core_left", "losses"])
def test_it_notices_what_does_not_come_back(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SLIDING | {"pattern": "gdn attn gdn attn gdn", "coda_blocks": 1, "sliding_kv": "per_pass"}
    config = config_of(pipeline=2, init_std=0.2, **settings)
    batch = batch_of(loss_windows=(0, 1, 2))
    assert error_of(config, batch, 3) < 1e-12
    FAULTS[f"no gradient of {what}"](monkeypatch)
    assert error_of(config, batch, 3) > 1e-3
