"""Models, sleeps, batches and degrees at random, in float64: ``pytest -m slow tests/distributed``."""

import random
from typing import Any, NamedTuple

import pytest
import test_flush
import test_gradients
from small import WINDOW, batch_of

pytestmark = pytest.mark.slow
KINDS = ("attn", "swa:3", "swa:9", "gdn", "gdn", "jet")
LIMIT = 1e-10  # of badly conditioned ones, too


class Drawn(NamedTuple):
    num_stages: int
    num_passes: int
    settings: dict[str, Any]
    batch: dict[str, Any]


def draw(seed: int) -> Drawn:
    """A model that divides over its stages, and a batch with a loss somewhere."""
    of = random.Random(seed)
    num_stages = of.choice([2, 2, 3, 4])
    prelude, core, coda = of.randint(0, 2), num_stages * of.choice([1, 1, 2]), of.randint(0, 3)
    blocks = [of.choice(KINDS) for _ in range(prelude + core + coda)]
    blocks[prelude + of.randrange(core)] = of.choice(["gdn", "jet"])
    num_windows = of.randint(1, 4)
    last_tokens = of.choice([2, 4, WINDOW])
    settings = {
        "pattern": " ".join(blocks),
        "prelude_blocks": prelude,
        "coda_blocks": coda,
        "schedule": of.choice(["consolidate_or_predict", "predict_then_consolidate"]),
        "eviction": of.choice(["hard", "sliding"]),
        "sliding_kv": of.choice(["last_pass", "per_pass"]),
        "convolution": of.choice(["auto", "reset", "carried"]),
        "norm_between_passes": of.random() < 0.4,
        "backprop_passes": of.choice([0, 0, 1, 2]),
        "learned_initial_state": of.random() < 0.4,
        "activation_checkpointing": of.choice(["none", "pass", "block", "both"]),
        "tie_embeddings": of.random() < 0.5,
        "rule": of.choice(["gated_delta", "gated_delta", "delta", "gated_hebbian"]),
        "negative_eigenvalues": of.random() < 0.3,
        "dropout": of.choice([0.0, 0.0, 0.3]),
    }
    batch = {
        "loss_windows": sorted(of.sample(range(num_windows), of.randint(1, num_windows))),
        "num_tokens": (num_windows - 1) * WINDOW + last_tokens,
        "padded": num_windows > 2 and of.random() < 0.5,
        "resets": of.random() < 0.4,
        "seed": seed,
    }
    return Drawn(num_stages, of.randint(1, 4), settings, batch)


@pytest.mark.parametrize("seed", range(60))
def test_stages_in_one_process(seed: int) -> None:
    num_stages, num_passes, settings, batch = draw(seed)
    config = test_flush.config_of(pipeline=num_stages, init_std=0.2, **settings)
    assert test_flush.error_of(config, batch_of(**batch, num_rows=4), num_passes) < LIMIT


@pytest.mark.parametrize("seed", range(100, 130))
def test_ranks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gradients, "EXACT", LIMIT)
    num_stages, num_passes, settings, batch = draw(seed)
    of = random.Random(seed)
    pipeline = of.choice([1, num_stages if num_stages != 3 else 1])
    tensor, data = of.choice([(2, 1), (1, 2), (2, 2)] if pipeline < 4 else [(2, 1), (1, 1)])
    settings["sequence_parallel"] = tensor == 2 and of.random() < 0.5
    config = test_gradients.build((tensor, pipeline, data), **settings)
    assert test_gradients.wrong(config, num_passes, batch_of(**batch)) == {}
