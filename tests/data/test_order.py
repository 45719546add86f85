"""The order of shards, samples and sources is arithmetic: nothing lost, nothing twice, shares kept."""

import numpy as np
import pytest

from sleeptrain.data.order import shard_at, shuffled, source_at


def test_an_order_holds_everything_once_and_differs_by_seed_purpose_and_number() -> None:
    orders = [shuffled(50, *name) for name in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(shuffled(50, 0, "a", 0), orders[0])


@pytest.mark.parametrize("num_streams", [1, 2, 3, 8])
def test_every_epoch_has_every_shard_once_whatever_the_number_of_streams(num_streams: int) -> None:
    num_shards, num_epochs = 5, 8
    per_stream = [
        [shard_at(turn * num_streams + stream, num_shards, 7, 0) for turn in range(5 * num_epochs)]
        for stream in range(num_streams)
    ]
    in_order = [per_stream[i % num_streams][i // num_streams] for i in range(num_shards * num_epochs)]
    for epoch in range(num_epochs):
        here = in_order[epoch * num_shards : (epoch + 1) * num_shards]
        assert {e for e, _ in here} == {epoch}
        assert sorted(shard for _, shard in here) == list(range(num_shards))
    orders = {tuple(shard for e, shard in in_order if e == epoch) for epoch in range(num_epochs)}
    assert len(orders) > 1  # epochs differ


def test_sources_keep_their_shares_in_every_stretch() -> None:
    shares = (0.6, 0.3, 0.1)
    drawn = np.array([source_at(n, 3, shares, 0) for n in range(3000)])
    for start in (0, 17, 1234):
        for length in (50, 1000):
            counts = np.bincount(drawn[start : start + length], minlength=3)
            assert np.abs(counts - length * np.array(shares)).max() <= 4
    first = {source_at(0, stream, shares, 0) for stream in range(30)}
    assert first == {0, 1, 2}  # streams do not go in step
