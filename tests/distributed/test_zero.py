"""``parallel/zero.py`` reads inside DeepSpeed; a new version is to be looked at before it is let in."""

import tomllib
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from ranks import run_ranks
from small import VOCAB, batch_of, config_of
from torch import Tensor

from sleeptrain.config import Config
from sleeptrain.parallel.megatron import MegatronDeepspeedBackend
from sleeptrain.parallel.topology import join

pytestmark = pytest.mark.more


def test_deepspeed_is_the_version_that_zero_was_written_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert deepspeed.__version__.split("+")[0] == "0.19.8"
    assert "deepspeed==0.19.8" in project["dependencies"]


def look_inside(config: Config) -> dict[str, Any]:
    """What is there when a gradient waits for its update."""
    backend = MegatronDeepspeedBackend(config, VOCAB, join(config.parallel, torch.device("cpu")))
    backend.forward_backward(batch_of(), 2)
    sharder, held = backend.shards.engine.optimizer, backend.held[0]
    parameter = held.parameter
    if config.parallel.zero_stage == 3:
        position = sharder.grad_position[sharder.get_param_id(parameter)]
        return {
            "sizes": (parameter.ds_numel, parameter.ds_tensor.ds_numel, position[2]),
            "groups": len(sharder.fp16_groups) == len(sharder.fp32_partitioned_groups_flat),
            "gradient": sharder._get_fp32_grad_state_partition(parameter, False)[0].dtype,
            "methods": [callable(getattr(sharder, name)) for name in THREE],
            "persistent": isinstance(sharder.persistent_parameters, list),
        }
    mapping = parameter._hp_mapping
    flat = sharder.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.hp_fragment_address
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    return {
        "sizes": (parameter.numel(), mapping.lp_fragment_address.numel, address.numel),
        "gradient": (gradient.dtype, gradient.numel()),
        "master": torch.equal(flat.narrow(0, address.start, address.numel), mapping.hp_fragment),
        "offload": sharder.cpu_offload,
        "norms": all(isinstance(x, Tensor) for x in getattr(sharder, "norm_for_param_grads", {}).values()),
        "methods": callable(sharder.update_lp_params),
    }


THREE = ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_the_insides_of_stages_1_and_2_are_as_they_are_read(zero_stage: int, offload: bool) -> None:
    (found,) = run_ranks(1, look_inside, config_of(zero_stage=zero_stage, offload_optimizer=offload))
    size = VOCAB * config_of().model.d_model
    assert found == {
        "sizes": (size, size, size),
        "gradient": (torch.float32, size),
        "master": True,
        "offload": offload,
        "norms": True,
        "methods": True,
    }


def test_the_insides_of_stage_3_are_as_they_are_read() -> None:
    (found,) = run_ranks(1, look_inside, config_of(zero_stage=3))
    size = VOCAB * config_of().model.d_model
    assert found == {
        "sizes": (size, size, size),
        "groups": True,
        "gradient": torch.float32,
        "methods": [True, True],
        "persistent": True,
    }
