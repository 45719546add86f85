"""How often steps are made again."""

import pytest

from sleeptrain.engine.rerun import MAX_RERUNS, ReplicasDifferError, Reruns
from sleeptrain.schema import RunError

FOUND = ReplicasDifferError("after step 7 rank 1 holds other bits of x")


def test_each_checkpoint_is_gone_back_to_three_times() -> None:
    reruns = Reruns()
    for step in (5, 10):
        for _ in range(MAX_RERUNS):
            assert reruns.record(FOUND, step) == f"warning: {FOUND}; the steps since {step} are made again"
    with pytest.raises(RunError, match=r"after step 7 rank 1 .* the steps since 5 were made again 3 times"):
        reruns.record(FOUND, 5)


def test_without_a_checkpoint_there_is_no_way_back() -> None:
    with pytest.raises(RunError, match="no checkpoint is there to go back to"):
        Reruns().record(FOUND, None)
