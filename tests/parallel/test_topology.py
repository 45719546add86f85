"""Degrees that do not fit are refused in one sentence: the setting, its value, the remedy."""

import re
from dataclasses import fields
from typing import Any

import pytest

from sleeptrain.config import Config, DataConfig, ModelConfig, ParallelConfig, SleepConfig
from sleeptrain.parallel.check import check_degrees
from sleeptrain.parallel.topology import check_world
from sleeptrain.schema import ConfigError

SEQUENCE_TOKENS = 26


def config_of(**settings: Any) -> Config:
    sections = {"model": ModelConfig, "sleep": SleepConfig, "data": DataConfig, "parallel": ParallelConfig}
    left = {"batch_sequences": 8, "window_tokens": 12} | settings
    kinds = {
        name: {f.name: left[f.name] for f in fields(kind) if f.name in left}
        for name, kind in sections.items()
    }
    return Config(**{name: sections[name](**own) for name, own in kinds.items()})


@pytest.mark.parametrize(
    ("degrees", "world_size", "replicas"),
    [((1, 1, None), 1, 1), ((1, 1, None), 4, 4), ((2, 2, None), 8, 2), ((2, 2, 2), 8, 2), ((4, 1, 1), 4, 1)],
)
def test_replicas_fill_the_world(degrees: tuple, world_size: int, replicas: int) -> None:
    config = config_of(tensor_size=degrees[0], pipeline_size=degrees[1], data_size=degrees[2])
    assert check_world(config.parallel, world_size) == replicas
    assert check_degrees(config, 12, SEQUENCE_TOKENS, world_size) == replicas


@pytest.mark.parametrize(
    ("settings", "world_size", "sentence"),
    [
        (
            {"tensor_size": 2, "pipeline_size": 2, "data_size": 2},
            4,
            "parallel.tensor_size=2 x parallel.pipeline_size=2 x parallel.data_size=2 needs 8 processes and "
            "there are 4; start that many (torchrun --nproc-per-node), or change the degrees",
        ),
        (
            {"tensor_size": 2, "pipeline_size": 2},
            6,
            "parallel.tensor_size=2 x parallel.pipeline_size=2 makes replicas of 4 processes, which do not "
            "divide the 6 that run; start a multiple of 4, or change the degrees",
        ),
        (
            {"batch_sequences": 9},
            2,
            "data.batch_sequences=9 does not divide among 2 data-parallel replicas; choose a multiple of 2",
        ),
        (
            {"batch_sequences": 12, "micro_batch_sequences": 4},
            2,
            "data.micro_batch_sequences=4 does not divide the 6 rows of each of 2 replicas; choose a divisor "
            "of 6",
        ),
        (
            {"pipeline_size": 4, "micro_batch_sequences": 4},
            4,
            "parallel.pipeline_size=4 needs a multiple of 4 microbatches and has 2 (8 rows by "
            "data.micro_batch_sequences=4); lower data.micro_batch_sequences or leave it out",
        ),
        (
            {"tensor_size": 4, "num_kv_heads": 2},
            4,
            "parallel.tensor_size=4 does not divide model.num_kv_heads=2; change one of them",
        ),
        (
            {"tensor_size": 4, "memory_qk_heads": 2},
            4,
            "parallel.tensor_size=4 does not divide model.memory_qk_heads=2; change one of them",
        ),
        (
            {"tensor_size": 2, "mlp_dim": 9},
            2,
            "parallel.tensor_size=2 does not divide the MLP's width (model.mlp_dim)=9; change one of them",
        ),
        (
            {"tensor_size": 2, "vocab_size": 13},
            2,
            "parallel.tensor_size=2 does not divide the vocabulary=13; set model.vocab_multiple to round it "
            "up",
        ),
        (
            {"pipeline_size": 2, "pattern": "attn gdn gdn"},
            2,
            "parallel.pipeline_size=2 does not divide the 3 looped blocks of model.pattern; choose a "
            "divisor, or move blocks to model.prelude_blocks or model.coda_blocks",
        ),
        (
            {"tensor_size": 4, "sequence_parallel": True},
            4,
            "parallel.sequence_parallel=true splits windows over parallel.tensor_size=4 ranks, and one has 2 "
            "tokens; leave sequence_parallel out, or change sleep.window_tokens",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused(settings: dict, world_size: int, sentence: str) -> None:
    vocab_size = settings.pop("vocab_size", 12)
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        check_degrees(config_of(**settings), vocab_size, SEQUENCE_TOKENS, world_size)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_sequences": 2, "pipeline_size": 4},
        {"batch_sequences": 6, "pipeline_size": 4},
        {"batch_sequences": 10, "pipeline_size": 4},
    ],
    ids=["fewer rows than stages", "six rows", "ten rows"],
)
def test_too_few_rows_for_the_stages_name_the_batch_size(settings: dict) -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.pipeline_size=4.*data\.batch_sequences=\d+.*multiple of 4"
    ):
        check_degrees(config_of(**settings), 12, SEQUENCE_TOKENS, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"zero_stage": 3, "pipeline_size": 2},
            r"zero_stage=3 .*pipeline_size=2: .*; use zero_stage=1 or 2",
        ),
        ({"sequence_parallel": True}, r"sequence_parallel=true needs parallel\.tensor_size above 1; set it"),
        ({"backend": "local", "data_size": 2}, r"backend=local .*; use parallel\.backend=auto"),
        ({"tensor_size": 0}, r"parallel\.tensor_size=0 must be at least 1"),
        ({"data_size": 0}, r"parallel\.data_size=0 must be at least 1"),
        (
            {"offload_optimizer": True, "zero_stage": 3},
            r"offload_optimizer=true needs ZeRO stage 1 or 2.*set it",
        ),
        (
            {"offload_optimizer": True, "zero_stage": 0},
            r"offload_optimizer=true needs ZeRO stage 1 or 2.*set it",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(**settings)
