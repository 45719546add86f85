"""Five steps on every topology give the losses, gradients, norms, weights and evaluation of the single
process, in float32 as in a real run."""

from typing import Any

import deepspeed
import pytest
from faults import FAULTS
from runs import Case, Distance, wrong

from sleeptrain.model import sizes
from sleeptrain.optim import muon

TEXT = {"schedule": "predict_then_consolidate", "eviction": "sliding"}
SEGMENTS = {"pattern": "swa:4 gdn attn jet gdn attn gdn", "prelude_blocks": 1, "coda_blocks": 2}
LOSSES, TP2, PP2, PP4, DP2 = "loss_windows", {"tensor": 2}, {"pipeline": 2}, {"pipeline": 4}, {"data": 2}
TWO = {"pattern": "attn gdn"}  # blocks, to be quick
GRAPHS = {"cuda_graphs": True, "activation_checkpointing": "pass"}

CORE: dict[str, Case] = {
    "tp2": (TP2, 3, {"pattern": "attn jet attn gdn"}, {"padded": True}),
    "pp2": (PP2, 3, SEGMENTS | TEXT | {"tie_embeddings": True}, {LOSSES: (0, 2)}),
    "pp4": (PP4, 3, {"activation_checkpointing": "pass"}, {}),
    "dp2 zero0": (DP2, 3, {"zero_stage": 0}, {LOSSES: (1, 2), "padded": True}),
    # In these two the border between the replicas cuts a matrix.
    "dp2 zero1": (DP2, 3, {"pattern": "gdn gdn attn", "tie_embeddings": True}, {"resets": True}),
    "dp2 zero2": (
        DP2,
        3,
        {"pattern": "attn gdn jet", "zero_stage": 2, "micro_batch_sequences": 2, **TEXT},
        {LOSSES: (0, 2)},
    ),
    "dp2 zero3": (DP2, 1, {"zero_stage": 3}, {"padded": True}),
    "tp2 dp2": (TP2 | DP2, 3, TWO | {"zero_stage": 2, "sequence_parallel": True}, {LOSSES: (0, 2)}),
    "tp2 pp2": (TP2 | PP2, 3, TWO | {"tie_embeddings": True, "eviction": "sliding"}, {LOSSES: (0, 2)}),
    "tp2 pp2 dp2": (TP2 | PP2 | DP2, 3, TWO, {LOSSES: (1, 2), "padded": True}),
}
MORE: dict[str, Case] = {
    "one rank": ({}, 3, {"zero_stage": 2}, {}),
    "tp2, N=1": (TP2, 1, {"sequence_parallel": True, "tie_embeddings": True, "zero_stage": 0, **TEXT}, {}),
    "pp2, N=1": (PP2, 1, SEGMENTS | {"learned_initial_state": True, "zero_stage": 0}, {"padded": True}),
    "pp2, one visit": (PP2, 1, {"window_tokens": 0}, {LOSSES: (0, 1, 2)}),
    "pp2, ends that share": (
        PP2,
        3,
        {"norm_between_passes": True, "tie_embeddings": True, "micro_batch_sequences": 1, "zero_stage": 2},
        {"resets": True},
    ),
    "pp4, N=1": (PP4, 1, {"activation_checkpointing": "both", "zero_stage": 2, **TEXT}, {LOSSES: (0, 2)}),
    "dp2 zero0, N=1": (DP2, 1, {"zero_stage": 0, "pattern": "attn jet gdn"}, {}),
    "dp2 zero1, N=1": (DP2, 1, {"activation_checkpointing": "block"}, {"padded": True}),
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
        {LOSSES: (1, 2), "padded": True},
    ),
    "dp2 zero1 offload": (DP2, 3, {"offload_optimizer": True}, {LOSSES: (1, 2)}),
    "dp2 zero2 offload": (DP2, 1, {"zero_stage": 2, "offload_optimizer": True}, {}),
    "dp3": ({"data": 3}, 3, {"batch_sequences": 9}, {"num_rows": 9}),
    "tp2 dp2, N=1": (TP2 | DP2, 1, {"pattern": "gdn swa:4 jet"}, {"padded": True}),
    "tp2 dp2 zero3": (
        TP2 | DP2,
        3,
        {
            **TWO,
            "zero_stage": 3,
            "sequence_parallel": True,
            "activation_checkpointing": "both",
            "eviction": "sliding",
        },
        {},
    ),
    "tp2 pp2, N=1": (TP2 | PP2, 1, SEGMENTS | {"sequence_parallel": True, "zero_stage": 2}, {}),
    "tp2 pp2 dp2, N=1": (
        TP2 | PP2 | DP2,
        1,
        {"zero_stage": 2, "tie_embeddings": True, **TEXT},
        {"resets": True},
    ),
    # On a CPU what a graph would replay is done anew.
    "dp2 zero0, replayed passes": (DP2, 3, GRAPHS | {"zero_stage": 0}, {"padded": True}),
    "dp2 zero1, replayed passes": (DP2, (2, 1, 3, 2, 4), GRAPHS | {"pattern": "attn jet gdn"}, {}),
    "dp2 zero2, replayed passes": (
        DP2,
        3,
        GRAPHS | TEXT | {"zero_stage": 2, "micro_batch_sequences": 2},
        {LOSSES: (0, 2)},
    ),
    "dropout": (TP2 | PP2, 3, {"dropout": 0.2, "activation_checkpointing": "pass"}, {}),
    "dp2 zero3, N that changes": (DP2, (1, 3, 2, 1, 4), TWO | {"zero_stage": 3}, {}),
    "pp2 dp2, N that changes": (PP2 | DP2, (1, 3, 2, 1, 4), TWO, {LOSSES: (0, 2)}),
    "no clipping": (TP2 | DP2, 3, {"muon_scale": "original", "clip_norm": 0.0}, {}),
}
IN_BFLOAT16 = Distance(  # about twice what one process differs from float32
    losses=1e-3,
    nll=1e-2,
    norms=1e-2,
    memory_norms=1e-2,
    gradients=1e-2,
    worst_gradient=(0.2, ""),
    worst_weight=(2e-2, ""),
)


@pytest.mark.parametrize("case", CORE.values(), ids=CORE)
def test_ranks_train_as_one_process(case: Case) -> None:
    assert wrong(case) == set()


@pytest.mark.more
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_ranks_train_as_one_process_with_other_settings(case: Case) -> None:
    assert wrong(case) == set()


LARGE: dict[str, Case] = {
    "zero1": (DP2, 2, {}, {}),
    "zero2": (TP2 | PP2 | DP2, 2, {"zero_stage": 2}, {}),
    "zero2 offload": (DP2, 2, {"zero_stage": 2, "offload_optimizer": True}, {}),
    "zero3": (DP2, (3, 1, 2), {"zero_stage": 3, "activation_checkpointing": "pass"}, {}),
}


@pytest.mark.more
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_what_is_done_in_one_go_for_a_small_model_but_not_for_a_large_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several buckets, weights larger than one, Muon's matrices in several batches, logits in pieces; with
    ZeRO 3 no weight so small that it stays gathered."""
    initialize = deepspeed.initialize

    def as_for_a_large_model(config: dict[str, Any], **arguments: Any) -> Any:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100}
        return initialize(config=config, **arguments)

    monkeypatch.setattr(deepspeed, "initialize", as_for_a_large_model)
    monkeypatch.setattr(muon, "MUON_ELEMENTS", 150)
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", 100)
    assert wrong(case, num_steps=3) == set()


@pytest.mark.more
@pytest.mark.parametrize("degrees", [TP2, PP2, TP2 | PP2 | DP2], ids=["tp2", "pp2", "tp2 pp2 dp2"])
def test_in_bfloat16_no_more_than_its_rounding_is_between_them(degrees: dict[str, int]) -> None:
    settings = {"precision": "bfloat16", "pattern": "attn gdn jet swa:4"}
    assert wrong((degrees, 3, settings, {"padded": True}), limits=IN_BFLOAT16) == set()


@pytest.mark.more
def test_replayed_passes_multiply_copies_in_bfloat16() -> None:
    settings = GRAPHS | {"precision": "bfloat16", "pattern": "attn gdn jet swa:4"}
    assert wrong((DP2, 3, settings, {"padded": True}), limits=IN_BFLOAT16) == set()


@pytest.mark.more
def test_a_gpu_that_the_run_does_not_use_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    case = (TP2 | PP2, 2, TWO | {"sequence_parallel": True, "zero_stage": 0}, {})
    assert wrong(case, num_steps=1) == set()
    one_visit = (PP2, 1, TWO | {"window_tokens": 0, "zero_stage": 0}, {LOSSES: (0, 1, 2)})
    assert wrong(one_visit, num_steps=1) == set()


@pytest.mark.more
@pytest.mark.parametrize(
    ("topology", "fault", "found"),
    [
        ("tp2", "Muon on parts", {"worst_weight"}),
        ("pp2", "no gradient of memory", {"gradients"}),
        ("pp2", "no gradient of losses", {"gradients"}),
        ("pp4", "no gradient of memory", {"gradients"}),
        ("dp2 zero0", "copies counted", {"norms"}),
        ("dp2 zero0", "own targets only", {"gradients"}),
        ("dp2 zero1", "engine takes a mean", {"gradients", "norms"}),
        ("dp2 zero1", "Muon on parts", {"worst_weight"}),
        ("dp2 zero2", "own targets only", {"gradients"}),
        ("dp2 zero2", "Muon on parts", {"worst_weight"}),
        ("dp2 zero3", "engine takes a mean", {"gradients", "norms"}),
        ("tp2 dp2", "copies counted", {"norms"}),
        ("tp2 pp2", "no gradient of caches", {"gradients"}),
        ("tp2 pp2 dp2", "no gradient of memory", {"gradients"}),
        ("tp2 pp2 dp2", "copies counted", {"norms"}),
    ],
)
def test_it_notices(topology: str, fault: str, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    assert wrong(CORE[topology], num_steps=2, factor=10) >= found


@pytest.mark.more
@pytest.mark.parametrize(
    ("topology", "fault"), [("dp2 zero0", "replicas apart"), ("pp2", "partial sums skipped")]
)
def test_it_notices_copies_that_differ(topology: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError, match="ranks differ in"):
        wrong(CORE[topology], num_steps=1)
