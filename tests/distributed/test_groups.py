"""Who is where among eight processes, and what they tell each other."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from sleeptrain.config import ParallelConfig
from sleeptrain.parallel.topology import all_reduce_flat, join
from sleeptrain.schema import ConfigError

pytestmark = pytest.mark.more


class Place(NamedTuple):
    tensor: list[int]
    pipeline: list[int]
    data: list[int]
    model: list[int]
    ends: list[int] | None
    first_and_last: tuple[bool, bool]
    replica: tuple[int, int]
    told: tuple[bool, bool, str]
    sums: list[torch.Tensor]


def look(config: ParallelConfig) -> Place:
    topology = join(config, torch.device("cpu"))
    groups = (topology.tensor, topology.pipeline, topology.data, topology.model)
    values = [torch.full((2, 2), float(topology.rank)), torch.tensor([topology.rank])]
    values.append(torch.ones(3).double())
    all_reduce_flat(values, topology.data)
    topology.barrier()
    return Place(
        *(dist.get_process_group_ranks(group) for group in groups),
        ends=None if topology.ends is None else dist.get_process_group_ranks(topology.ends),
        first_and_last=(topology.is_first_stage, topology.is_last_stage),
        replica=(topology.replica, topology.num_replicas),
        told=(topology.any(topology.rank == 3), topology.any(False), topology.from_first(f"{topology.rank}")),
        sums=values,
    )


def test_tensor_ranks_are_neighbours_then_replicas_then_stages() -> None:
    places = run_ranks(8, look, ParallelConfig(tensor_size=2, pipeline_size=2))
    assert [place.tensor for place in places] == [[r - r % 2, r - r % 2 + 1] for r in range(8)]
    assert [place.data for place in places] == [[r - r % 4 + r % 2, r - r % 4 + r % 2 + 2] for r in range(8)]
    assert [place.pipeline for place in places] == [[r % 4, r % 4 + 4] for r in range(8)]
    assert places[0].model == places[5].model == [0, 1, 4, 5]
    assert [place.replica for place in places] == [(r // 2 % 2, 2) for r in range(8)]
    assert {place.told for place in places} == {(True, False, "0")}
    for place in places:
        whole, ints, doubles = place.sums
        assert torch.equal(whole, torch.full((2, 2), float(sum(place.data))))
        assert ints.tolist() == [sum(place.data)]
        assert torch.equal(doubles, torch.full((3,), 2.0).double())


def test_ends_are_the_first_and_the_last_of_four_stages() -> None:
    places = run_ranks(4, look, ParallelConfig(pipeline_size=4))
    assert [place.ends for place in places] == [[0, 3], None, None, [0, 3]]
    assert [place.first_and_last for place in places] == [(True, False), *[(False, False)] * 2, (False, True)]


def test_degrees_that_do_not_fit_are_refused_by_every_process() -> None:
    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            join(ParallelConfig(tensor_size=2), torch.device("cpu"))
        return str(error.value)

    assert all("which do not divide the 3 that run" in text for text in run_ranks(3, refused))
