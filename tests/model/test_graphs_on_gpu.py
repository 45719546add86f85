"""Real CUDA graphs against passes that are started kernel by kernel. ``pytest -m gpu``."""

import pytest
import torch
from plain import WINDOW, assert_same, build, gradients, make

from sleeptrain.data.batch import Batch
from sleeptrain.model import SleepModel
from sleeptrain.model.graphs import PassGraphs

pytestmark = pytest.mark.gpu
SETTINGS = [
    {},
    {"schedule": "predict_then_consolidate", "eviction": "sliding", "activation_checkpointing": "both"},
    {"dropout": 0.2, "norm_between_passes": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_replayed_passes_equal_eager_ones(settings: dict, autocast_dtype: torch.dtype | None) -> None:
    """Three steps, with other tokens, another N and other weights in each."""
    settings = {"activation_checkpointing": "pass", "pattern": "attn jet gdn"} | settings
    eager, model = (build(dtype=torch.float32, **settings).cuda() for _ in range(2))
    model.graphs = PassGraphs(model.stack, autocast_dtype)
    for step, num_passes in enumerate((3, 2, 4)):
        batch = make(4 * WINDOW - 2, [1, 3], seed=step).to(torch.device("cuda"))
        expected = losses_and_gradients(eager, batch, num_passes, autocast_dtype)
        found = losses_and_gradients(model, batch, num_passes, autocast_dtype)
        low = autocast_dtype is not None
        torch.testing.assert_close(found[0], expected[0], rtol=1e-2 if low else 1e-5, atol=1e-5)
        assert_same(found[1], expected[1], tolerance=2e-2 if low else 1e-5)
        with torch.no_grad():
            for each in (eager, model):
                for parameter, gradient in zip(each.parameters(), expected[1].values()):
                    parameter -= 1e-2 * gradient


def losses_and_gradients(
    model: SleepModel, batch: Batch, num_passes: int, autocast_dtype: torch.dtype | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cuda", autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None):
        output = model(batch, num_passes)
    return output.nll, gradients(output.loss_sum, model)
