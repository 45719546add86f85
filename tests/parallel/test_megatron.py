"""What both backends say of a run."""

import torch

from sleeptrain.model.sleep import PassTrace
from sleeptrain.parallel.backend import mean_norms


def test_norms_of_fast_weights_are_means_over_blocks() -> None:
    """As ``MegatronDeepspeedBackend`` reports them: three blocks, one of them in the prelude."""
    prelude = PassTrace(0, 1, torch.full((1, 2), 16.0), torch.full((1, 2), 1.0))
    core = PassTrace(0, 1, torch.full((2, 2), 1.0), torch.full((2, 2), 1.0))
    assert mean_norms([prelude, core]) == {1: (2.0, 1.0)}
