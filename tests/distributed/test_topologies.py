"""Five steps on every topology give the losses, gradients, norms, weights and evaluation of the single
process, in float32 as in a real run."""

from typing import Any

import pytest
from faults import FAULTS
from runs import Distance, compared
from small import batch_of, config_of

from sleeptrain.config import Config
from sleeptrain.data.batch import Batch

TEXT = {"schedule": "predict_then_consolidate", "eviction": "sliding"}
SEGMENTS = {"pattern": "swa:4 gdn attn jet gdn attn gdn", "prelude_blocks": 1, "coda_blocks": 2}
Case = tuple[dict[str, int], int, dict[str, Any], dict[str, Any]]  # degrees, N, settings, batch

TP2, PP2, PP4, DP2 = {"tensor": 2}, {"pipeline": 2}, {"pipeline": 4}, {"data": 2}

CORE: dict[str, Case] = {
    "tp2": (TP2, 3, {"pattern": "attn jet attn gdn", "zero_stage": 1}, {"padded": True}),
    "pp2": (PP2, 3, SEGMENTS | TEXT | {"tie_embeddings": True}, {"loss_windows": (0, 3)}),
    "pp4": (PP4, 3, {"activation_checkpointing": "pass"}, {}),
    "dp2 zero0": (DP2, 3, {"zero_stage": 0}, {"loss_windows": (1, 3), "padded": True}),
    "dp2 zero1": (DP2, 3, {"zero_stage": 1, "tie_embeddings": True}, {"loss_windows": (1, 3), "resets": True}),
    "dp2 zero2": (DP2, 3, {"zero_stage": 2, "micro_batch_sequences": 2, **TEXT}, {"loss_windows": (0, 3)}),
    "dp2 zero3": (DP2, 1, {"zero_stage": 3}, {"padded": True}),
    "tp2 dp2": (TP2 | DP2, 3, {"zero_stage": 2, "sequence_parallel": True}, {"loss_windows": (0, 2)}),
    "tp2 pp2": (TP2 | PP2, 3, {"tie_embeddings": True, "eviction": "sliding"}, {"loss_windows": (0, 3)}),
    "tp2 pp2 dp2": (TP2 | PP2 | DP2, 3, {"zero_stage": 1}, {"loss_windows": (1, 3), "padded": True}),
}
MORE: dict[str, Case] = {
    "one rank": ({}, 3, {"zero_stage": 2}, {}),
    "tp2, N=1": (TP2, 1, {"sequence_parallel": True, "tie_embeddings": True, "zero_stage": 0, **TEXT}, {}),
    "pp2, N=1": (PP2, 1, SEGMENTS | {"learned_initial_state": True, "zero_stage": 0}, {"padded": True}),
    "pp2, one visit": (PP2, 1, {"window_tokens": 0}, {"loss_windows": (0, 1, 2, 3)}),
    "pp2, ends that share": (
        PP2,
        3,
        {"norm_between_passes": True, "tie_embeddings": True, "micro_batch_sequences": 1, "zero_stage": 2},
        {"resets": True},
    ),
    "pp4, N=1": (PP4, 1, {"activation_checkpointing": "both", "zero_stage": 2, **TEXT}, {"loss_windows": (0, 3)}),
    "dp2 zero0, N=1": (DP2, 1, {"zero_stage": 0, "pattern": "attn jet gdn"}, {}),
    "dp2 zero1, N=1": (DP2, 1, {"zero_stage": 1, "activation_checkpointing": "block"}, {"padded": True}),
    "dp2 zero2, N=1": (DP2, 1, {"zero_stage": 2, "eviction": "sliding", "sliding_kv": "per_pass"}, {}),
    "dp2 zero3, N=3": (
        DP2,
        3,
        {
            "zero_stage": 3,
            "pattern": "jet attn gdn",
            "activation_checkpointing": "pass",
            "tie_embeddings": True,
            "learned_initial_state": True,
        },
        {"loss_windows": (1, 3), "padded": True},
    ),
    "dp2 zero1 offload": (DP2, 3, {"zero_stage": 1, "offload_optimizer": True}, {"loss_windows": (1, 3)}),
    "dp2 zero2 offload": (DP2, 1, {"zero_stage": 2, "offload_optimizer": True}, {}),
    "dp3 zero1": ({"data": 3}, 3, {"zero_stage": 1, "batch_sequences": 9}, {"num_rows": 9}),
    "tp2 dp2, N=1": (TP2 | DP2, 1, {"zero_stage": 1, "pattern": "gdn swa:4 jet"}, {"padded": True}),
    "tp2 dp2 zero3": (
        TP2 | DP2,
        3,
        {"zero_stage": 3, "sequence_parallel": True, "activation_checkpointing": "both"},
        {},
    ),
    "tp2 pp2, N=1": (TP2 | PP2, 1, SEGMENTS | {"sequence_parallel": True, "zero_stage": 2}, {}),
    "tp2 pp2 dp2, N=1": (TP2 | PP2 | DP2, 1, {"zero_stage": 2, "tie_embeddings": True, **TEXT}, {"resets": True}),
    "dropout": (TP2 | PP2, 3, {"dropout": 0.2, "activation_checkpointing": "pass"}, {}),
    "muon scale": (TP2 | DP2, 3, {"muon_scale": "original", "clip_norm": 0.0, "zero_stage": 1}, {}),
}


def distance_of(case: Case) -> Distance:
    degrees, num_passes, settings, batch = case
    config = config_of(**degrees, **settings)
    return compared(config, num_passes, [batch_of(**batch, seed=seed) for seed in range(5)])


def wrong(found: Distance) -> dict[str, Any]:
    """What is further apart than float32 explains."""
    limits = Distance(1e-5, 1e-4, 1e-5, 1e-5, 1e-6, 1e-4, 1e-4)
    pairs = {name: (getattr(found, name), limit) for name, limit in limits._asdict().items()}
    return {name: x for name, (x, limit) in pairs.items() if not (x[0] if isinstance(x, tuple) else x) <= limit}


@pytest.mark.parametrize("case", CORE.values(), ids=CORE)
def test_ranks_train_as_one_process(case: Case) -> None:
    assert wrong(distance_of(case)) == {}


@pytest.mark.more
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_ranks_train_as_one_process_with_other_settings(case: Case) -> None:
    assert wrong(distance_of(case)) == {}
