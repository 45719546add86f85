"""Acceptance check 2 of the method: nothing but what crosses a border carries the answer."""

import numpy as np
import pytest
import torch

from sleeptrain.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Rule110Config,
    RunConfig,
    SleepConfig,
)
from sleeptrain.data.batch import make_batch
from sleeptrain.data.stream import TrainStream
from sleeptrain.model.state import map_tensors
from sleeptrain.model.window_state import Passes
from sleeptrain.optim.schedule import lr_factor
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.tasks import make_task

pytestmark = pytest.mark.more
WIDTH = 8
CONFIG = Config(
    run=RunConfig(device="cpu"),
    model=ModelConfig(
        d_model=32,
        pattern="attn gdn attn",
        num_heads=2,
        memory_heads=2,
        memory_key_dim=16,
        memory_value_dim=16,
        init_std=0.15,
        embedding_init_std=1.0,
    ),
    sleep=SleepConfig(window_tokens=WIDTH, num_passes=2),
    task=Rule110Config(width=WIDTH, num_strings=2, steps=1),
    data=DataConfig(batch_sequences=32),
    optim=OptimConfig(num_steps=120, warmup_steps=20, muon_lr=0.01, adamw_lr=0.01),
)


def test_a_trained_model_with_zeroed_fast_weights_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(CONFIG.task)
    backend = LocalBackend(CONFIG, task.vocab_size)
    stream = TrainStream(task, 0, CONFIG.data.batch_sequences, WIDTH)
    for step in range(CONFIG.optim.num_steps):
        backend.step(lr_factor(step, CONFIG.optim), backend.forward_backward(stream.batch(step), 2).loss)
    examples = task.examples(1, np.arange(1024), "train")

    def accuracy() -> float:
        output = backend.evaluate(make_batch(examples, WIDTH), num_passes=2)
        scores = task.score(output.predictions.numpy(), output.nll.numpy(), examples)
        return float(scores["exact_accuracy"].mean())

    assert accuracy() > 0.9
    opening = Passes.opening
    monkeypatch.setattr(  # every window starts from nothing
        Passes, "opening", lambda start: opening(map_tensors(torch.zeros_like, start))
    )
    chance = max(np.mean([(examples.targets[:, -2:] == guess).all(1) for guess in guesses()], axis=1))
    assert accuracy() <= chance + 0.05


def guesses() -> list[tuple[int, int]]:
    """All answers that know nothing of the strings."""
    return [(a, b) for a in (0, 1) for b in (0, 1)]
