"""Dropout: its share, and that nothing but example, visit, block, token and channel decides."""

from dataclasses import replace

import pytest
import torch
from plain import WINDOW, assert_same, build, gradients, make

from sleeptrain.config import ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.dropout import Dropout, token_keys
from sleeptrain.model.sleep import SleepModel
from sleeptrain.schema import ConfigError


def dropout(rate: float, examples: torch.Tensor, visit: int = 0, part: tuple[int, int] = (0, 1)) -> Dropout:
    return Dropout(rate, token_keys(examples, visit, 48, first_token=24), part)


def with_keys(batch: Batch) -> Batch:
    return replace(batch, example_keys=torch.arange(len(batch.ids)) + 40)


def model(**settings) -> SleepModel:
    return build("attn jet gdn", dropout=0.4, prelude_blocks=1, **settings)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(rate: float) -> None:
    ones = torch.ones(100, 48, 200)
    for seed in (0, 1, 7 << 40):
        dropped = dropout(rate, torch.arange(100) + seed).apply(ones, place=3)
        share = (dropped == 0).float()
        assert abs(share.mean() - rate) < 4 * (rate * (1 - rate) / ones.numel()) ** 0.5
        assert dropped.max() == pytest.approx(1 / (1 - rate))
        for dims in ((0, 1), (1, 2), (0, 2)):  # no channel, example or token is favoured
            assert share.mean(dims).sub(rate).abs().max() < 0.1


def test_each_example_visit_and_place_drops_on_its_own() -> None:
    ones, examples = torch.ones(4, 48, 100), torch.arange(4)
    first = dropout(0.5, examples).apply(ones, 0) > 0
    others = [
        dropout(0.5, examples + 4).apply(ones, 0),
        dropout(0.5, examples + (1 << 40)).apply(ones, 0),
        dropout(0.5, examples, visit=1).apply(ones, 0),
        dropout(0.5, examples).apply(ones, 1),
    ]
    for other in others:
        assert abs(((other > 0) == first).float().mean() - 0.5) < 0.02


def test_parts_of_the_tokens_drop_what_the_whole_does() -> None:
    h, examples = torch.randn(3, 48, 10), torch.arange(3)
    parts = [dropout(0.3, examples, part=(i, 4)).apply(h.chunk(4, dim=1)[i], 2) for i in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), dropout(0.3, examples).apply(h, 2))


def test_a_batch_in_parts_gives_the_gradients_of_the_whole() -> None:
    whole, batch = model(), with_keys(make(3 * WINDOW, [2], 4))
    expected = gradients(whole(batch, 2).loss_sum, whole)
    parts = sum(whole(batch.rows(slice(i, i + 1)), 2).loss_sum for i in range(4))
    assert_same(gradients(parts, whole), expected)


@pytest.mark.parametrize("policy", ["pass", "block", "both"])
def test_recomputed_passes_drop_the_same(policy: str) -> None:
    kept, recomputed = model(), model(activation_checkpointing=policy)
    batch = with_keys(make(3 * WINDOW, [0, 2]))
    expected = gradients(kept(batch, 3).loss_sum, kept)
    assert_same(gradients(recomputed(batch, 3).loss_sum, recomputed), expected)


def test_only_training_drops() -> None:
    batch = make(3 * WINDOW, [2])
    without = build("attn jet gdn", prelude_blocks=1)
    assert torch.equal(model()(batch, 2).nll, without(batch, 2).nll)
    assert not torch.equal(model()(with_keys(batch), 2).nll, without(batch, 2).nll)


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.dropout=1 must be at least 0 and below 1"):
        ModelConfig(dropout=1)
