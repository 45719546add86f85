"""Losses and gradients of one step, in float64: ranks give those of the single process to the last digits,
whatever the model, the batch and the sleep."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from faults import FAULTS
from ranks import run_ranks
from runs import Piece, assembled, norms_of, num_ranks, own_rows, whole
from small import VOCAB, batch_of, config_of, disturbed, held_out
from torch import Tensor

from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.sleep import CrossEntropy, PassTrace, SleepModel
from sleeptrain.parallel.layout import is_on_both_ends, split_of
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.stage import part_of
from sleeptrain.parallel.topology import Group, join

pytestmark = pytest.mark.more
EXACT = 1e-12
IN_FLOAT32 = 1e-6  # sums for the log, which are float32 whatever the model
TP2, PP2 = (2, 1, 1), (1, 2, 1)
TEXT = {"schedule": "predict_then_consolidate", "eviction": "sliding"}


class _Gather(torch.autograd.Function):
    """The logits of all words on every rank."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Group) -> Tensor:
        ctx.of_rank = slice(group.rank() * logits.shape[-1], (group.rank() + 1) * logits.shape[-1])
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor, None]:
        return d_logits[..., ctx.of_rank], None


class Float64CrossEntropy(CrossEntropy):
    """megatron-core's computes in float32, which would hide everything below 1e-7."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(_Gather.apply(logits, self.group), targets)

    def predict(self, logits: Tensor) -> Tensor:
        return super().predict(_Gather.apply(logits, self.group))


class Step(NamedTuple):
    """``loss`` is this rank's part of it."""

    loss: Tensor
    memory_norms: dict[int, tuple[float, float]]
    gradients: list[Piece]
    nll: Tensor
    predictions: Tensor


def step_of_rank(config: Config, num_passes: int, batch: Batch) -> Step:
    backend = MegatronDeepspeedBackend(config, vocab(config), join(config.parallel, torch.device("cpu")))
    backend.model.double()
    if config.parallel.tensor_size > 1:
        backend.model.cross_entropy = Float64CrossEntropy(backend.topology.tensor)
    with torch.no_grad():
        for h in backend.held:
            h.parameter.add_(part_of(disturbed(h.name, h.shape), h.box))
    loss, norms = backend.forward_backward(own_rows(backend, batch), num_passes, traced=True)
    gradients = [
        Piece(h.name, h.shape, h.box, 0, g) for h, g in zip(backend.held, backend.shards.gradients())
    ]
    output = backend.evaluate(held_out(batch), num_passes)
    return Step(loss, norms, gradients, output.nll, output.predictions)


def step_alone(config: Config, num_passes: int, batch: Batch) -> Step:
    model = SleepModel(config.model, config.sleep, vocab(config)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(disturbed(name, parameter.shape))
    trace: list[PassTrace] = []
    loss = model(batch, num_passes, trace=trace).loss_sum / batch.num_targets
    loss.backward()
    gradients = [whole(name, p.grad) for name, p in model.named_parameters()]
    with torch.no_grad():
        output = model(held_out(batch), num_passes)
    return Step(loss.detach(), norms_of(trace), gradients, output.nll, output.predictions)


def vocab(config: Config) -> int:
    return config.model.rounded_vocab(VOCAB)


def wrong(config: Config, num_passes: int, batch: Batch) -> dict[str, float]:
    """The relative error of the gradient of each parameter, of losses and norms, where there is one."""
    ranks = run_ranks(num_ranks(config), step_of_rank, config, num_passes, batch)
    alone = step_alone(config, num_passes, batch)
    truth = assembled(alone.gradients)
    found: dict[str, float] = {}

    def compare(name: str, ours: Tensor, true: Tensor, size: Tensor, limit: float = EXACT) -> None:
        error = float((ours - true).norm())
        if not error <= limit * float(size):
            found[name] = max(found.get(name, 0), error / float(size))

    norms = [torch.tensor(list(step.memory_norms.values())) for step in (*ranks, alone)]
    for rank, norm in zip(ranks, norms):
        assert torch.equal(rank.predictions, alone.predictions)
        compare("nll", rank.nll, alone.nll, alone.nll.norm())
        compare("memory norms", norm, norms[-1], norms[-1].norm(), IN_FLOAT32)
        for name, _, box, _, gradient in rank.gradients:
            compare(name, gradient, part_of(truth[name], box).flatten(), truth[name].norm())
    loss = torch.stack([rank.loss for rank in ranks]).sum()
    compare("loss", loss, alone.loss, alone.loss, IN_FLOAT32)
    if not found:
        assert assembled([piece for rank in ranks for piece in rank.gradients]).keys() == truth.keys()
    return found


def build(degrees: tuple[int, int, int], **settings: Any) -> Config:
    return config_of(*degrees, zero_stage=0, init_std=0.2, **settings)


CASES: dict[str, tuple[tuple[int, int, int], int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (TP2, 1, {}, {}),
    "tp2 with jet blocks": (
        TP2,
        3,
        {
            "pattern": "attn jet swa:4 gdn",
            "tie_embeddings": True,
            "rule": "delta",
            "micro_batch_sequences": 4,
        },
        {"padded": True},
    ),
    "tp2 with sequence parallelism": (
        TP2,
        3,
        {
            "pattern": "jet attn gdn",
            "sequence_parallel": True,
            "learned_initial_state": True,
            "norm_between_passes": True,
            "dropout": 0.3,
            "activation_checkpointing": "both",
            **TEXT,
        },
        {"loss_windows": (0, 2), "padded": True, "resets": True},
    ),
    "tp2 with gates, biases and norms of heads": (
        TP2,
        2,
        {
            "pattern": "gdn attn",
            "head_dim": 4,
            "attention_bias": True,
            "attention_gate": True,
            "qk_norm": "head",
            "rotary_fraction": 0.5,
            "zero_centred_norms": True,
            "memory_norm_eps": 1e-3,
        },
        {"padded": True},
    ),
    "tp2 with norms after attention, and over all heads": (
        TP2,
        2,
        {
            "pattern": "gdn attn",
            "norm_placement": "mixed",
            "qk_norm": "width",
            "rotary_fraction": 0.0,
            "sequence_parallel": True,
            **TEXT,
        },
        {"loss_windows": (0, 2)},
    ),
    "tp2 pp2 with sandwich norms, and blocks without an MLP": (
        (2, 2, 1),
        2,
        {
            "pattern": "attn jet",
            "norm_placement": "sandwich",
            "memory_mlp": False,
            "norm_between_passes": True,
            "activation_checkpointing": "block",
        },
        {"loss_windows": (1, 2)},
    ),
    "tp4 on a rounded vocabulary": (
        (4, 1, 1),
        3,
        {"num_kv_heads": 4, "memory_qk_heads": 4, "vocab_multiple": 4, "activation_checkpointing": "pass"},
        {"loss_windows": (1, 2)},
    ),
    "pp2, one visit": (PP2, 1, {"window_tokens": 0}, {"loss_windows": (0, 1)}),
    "pp2": (PP2, 1, {"micro_batch_sequences": 1}, {"padded": True}),
    "pp2 with a segment that loops": (
        PP2,
        3,
        {
            "pattern": "swa:3 gdn attn gdn jet gdn attn",
            "prelude_blocks": 1,
            "coda_blocks": 2,
            "sliding_kv": "per_pass",
            "tie_embeddings": True,
            "norm_between_passes": True,
            "learned_initial_state": True,
            **TEXT,
        },
        {"loss_windows": (0, 1, 2), "padded": True, "resets": True},
    ),
    "pp2 with truncated backpropagation": (
        PP2,
        4,
        {
            "pattern": "attn gdn",
            "backprop_passes": 2,
            "convolution": "carried",
            "activation_checkpointing": "block",
            "dropout": 0.3,
        },
        {"loss_windows": (1, 2)},
    ),
    "pp4": (
        (1, 4, 1),
        3,
        {
            "tie_embeddings": True,
            "activation_checkpointing": "pass",
            "micro_batch_sequences": 1,
            "eviction": "sliding",
        },
        {"loss_windows": (0, 2)},
    ),
    "dp2": ((1, 1, 2), 3, {"micro_batch_sequences": 2}, {"loss_windows": (0, 2), "padded": True}),
    "tp2 pp2": (
        (2, 2, 1),
        3,
        {"pattern": "jet attn gdn swa:4", "sequence_parallel": True, "tie_embeddings": True, **TEXT},
        {"loss_windows": (0, 1, 2), "padded": True},
    ),
    "tp2 pp2 dp2": (
        (2, 2, 2),
        3,
        {"norm_between_passes": True, "negative_eigenvalues": True, "rule": "gated_hebbian"},
        {"loss_windows": (1, 2), "resets": True},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ranks_give_losses_and_gradients_of_one_process(case: tuple) -> None:
    degrees, num_passes, settings, batch = case
    assert wrong(build(degrees, **settings), num_passes, batch_of(**batch)) == {}


@pytest.mark.parametrize(
    ("degrees", "settings"),
    [
        (TP2, {"pattern": "attn jet gdn"}),
        (TP2, {"sequence_parallel": True, "norm_between_passes": True}),
        (PP2, {"tie_embeddings": True, "norm_between_passes": True}),
        ((2, 2, 1), {"pattern": "attn gdn", "tie_embeddings": True, "sequence_parallel": True}),
    ],
    ids=["tp2", "tp2 with sequence parallelism", "pp2", "tp2 pp2"],
)
def test_without_the_sums_exactly_the_gradients_seen_in_parts_are_wrong(
    degrees: tuple[int, int, int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(degrees, **settings)
    names = [name for name, _ in SleepModel(config.model, config.sleep, VOCAB).named_parameters()]
    partial = {
        name
        for name in names
        if (degrees[0] > 1 and split_of(name, config.parallel.sequence_parallel).is_summed)
        or (degrees[1] > 1 and is_on_both_ends(name, config))
    }
    FAULTS["partial sums skipped"](monkeypatch)
    found = wrong(config, 3, batch_of())
    assert found.keys() == partial
    assert min(found.values()) > 1e-3
