"""A small model of text that has learned nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config import Config, ModelConfig, RunConfig, SleepConfig, TextConfig
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import to_dict

WINDOW = 8
TEXT = Config(
    model=ModelConfig(
        d_model=16,
        num_heads=2,
        memory_heads=2,
        memory_key_dim=8,
        memory_value_dim=8,
        pattern="attn gdn jet gdn",
    ),
    run=RunConfig(id="tiny"),
    task=TextConfig(sequence_tokens=4 * WINDOW),
    sleep=SleepConfig(window_tokens=WINDOW, num_passes=3, schedule="predict_then_consolidate"),
)

Saved = Callable[..., Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``saved(vocab_size, task=...)``: a run folder with such a model."""

    def save(vocab_size: int = 257, **changes: object) -> Path:
        config = replace(TEXT, **changes)  # type: ignore[arg-type]
        folder = tmp_path_factory.mktemp("runs") / "tiny"
        backend = LocalBackend(config, vocab_size)
        saver = Saver(folder / "checkpoints", 1, 0)
        saver.save(3, backend.slices(), {"config": to_dict(config), "trainer": {"step": 3}})
        assert saver.wait() is None
        return folder

    return save


@pytest.fixture(scope="session")
def run(saved: Saved) -> Path:
    return saved()
