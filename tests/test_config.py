"""The settings of a run: each contradiction is one sentence that names the setting and its value."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from sleeptrain.config import (
    Config,
    DepoConfig,
    ModelConfig,
    SleepConfig,
    TaskConfig,
    TextConfig,
    parse_pattern,
)
from sleeptrain.schema import ConfigError, describe, flatten, from_dict, to_dict


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        here = result
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    return result


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.d_modl": 3}, ["model.d_modl", "did you mean 'model.d_model'"]),
        ({"optm.num_steps": 3}, ["optm", "did you mean 'optim'"]),
        ({"model.d_model": "wide"}, ["model.d_model='wide'", "int"]),
        ({"task.name": "rule11"}, ["task", "'rule11'", "did you mean 'rule110'", "depo", "text"]),
        ({"task.max_nodes": 3, "task.name": "rule110"}, ["task.max_nodes"]),
        ({"sleep.eviction": "soft"}, ["sleep.eviction", "'soft'", "hard", "sliding"]),
        ({"model.pattern": "attn gnd"}, ["model.pattern", "'gnd'", "did you mean 'gdn'"]),
        ({"model.pattern": ""}, ["model.pattern", "empty"]),
        ({"model.pattern": "swa gdn"}, ["model.pattern", "'swa'", "swa:WIDTH"]),
        ({"model.pattern": "gdn attn:4"}, ["model.pattern", "'attn:4'"]),
        ({"model.pattern": "gdn swa:0"}, ["model.pattern", "'swa:0'"]),
        ({"model.pattern": "gdn swa:x"}, ["model.pattern", "'swa:x'"]),
        ({"model.num_heads": 5}, ["model.num_heads=5", "model.d_model=64", "model.head_dim"]),
        ({"model.head_dim": 3}, ["3", "odd", "model.head_dim"]),
        ({"model.num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=4"]),
        ({"model.memory_qk_heads": 3}, ["model.memory_qk_heads=3", "model.memory_heads=4"]),
        ({"model.memory_key_dim": 0}, ["model.memory_key_dim=0"]),
        (
            {"model.prelude_blocks": 2, "model.coda_blocks": 2},
            ["model.prelude_blocks=2", "model.coda_blocks=2"],
        ),
        ({"model.coda_blocks": -1}, ["model.coda_blocks=-1"]),
        ({"sleep.window_tokens": 27}, ["sleep.window_tokens=27", "26"]),
        (
            {"task.name": "rule110", "task.width": 8, "sleep.window_tokens": 12},
            ["sleep.window_tokens=12", "16 tokens", "=8 or"],
        ),
        (
            {"task.name": "rule110", "task.width": 8, "sleep.window_tokens": 1},
            ["sleep.window_tokens=1 ", "2 to answer", "=2 or"],
        ),
        ({"sleep.window_tokens": -1}, ["sleep.window_tokens=-1"]),
        ({"sleep.num_passes": 0}, ["sleep.num_passes=0"]),
        ({"sleep.min_passes": 3}, ["sleep.min_passes=3", "2"]),
        ({"sleep.min_passes": 0}, ["sleep.min_passes=0"]),
        ({"sleep.backprop_passes": -1}, ["sleep.backprop_passes=-1"]),
        *(
            (
                {"model.memory_backend": backend},
                [
                    "run.deterministic=true",
                    f"model.memory_backend={backend} {why};",
                    "set model.memory_backend=auto or triton, or run.deterministic=false",
                ],
            )
            for backend, why in (
                ("fla", "chooses its tiles by timing them"),
                ("flash_qla", "does not say that it does"),
            )
        ),
        ({"run.cuda_graphs": True}, ["run.cuda_graphs=true", "sleep.activation_checkpointing=none", "both"]),
        *(
            (
                {
                    "run.cuda_graphs": True,
                    "sleep.activation_checkpointing": "pass",
                    f"parallel.{name}": value,
                },
                ["run.cuda_graphs=true", f"parallel.{name}={value}", f"set it to {most}"],
            )
            for name, value, most in (("tensor_size", 2, 1), ("pipeline_size", 2, 1), ("zero_stage", 3, 2))
        ),
        *(
            (
                {"sleep.halting": "learned", f"sleep.{name}": value},
                ["sleep.halting=learned", f"sleep.{name}={str(value).lower()}"],
            )
            for name, value in (
                ("num_passes", 1),
                ("eviction", "sliding"),
                ("convolution", "carried"),
                ("backprop_passes", 1),
                ("detach_state", True),
            )
        ),
        ({"sleep.halting_cost": -0.1}, ["sleep.halting_cost=-0.1"]),
        ({"model.pattern": "attn swa:4"}, ["N=2", "'attn swa:4'", "gdn", "sleep.num_passes=1"]),
        ({"model.prelude_blocks": 2, "model.pattern": "attn gdn attn"}, ["N=2", "'attn gdn attn'"]),
        (
            {"model.pattern": "attn", "sleep.num_passes": 1, "eval.num_passes": [3]},
            ["N=3", "eval.num_passes"],
        ),
        (
            {"model.pattern": "attn", "sleep.num_passes": 1, "sleep.learned_initial_state": True},
            ["sleep.learned_initial_state", "model.pattern"],
        ),
        (
            {"model.pattern": "attn", "sleep.num_passes": 1, "sleep.carry_between_batches": True},
            ["sleep.carry_between_batches=true", "model.pattern='attn'", "sleep.eviction=hard"],
        ),
        ({"sleep.carry_between_batches": True}, ["sleep.carry_between_batches=true", "data.shards"]),
        ({"eval.num_passes": [2, 0]}, ["eval.num_passes=[2, 0]"]),
        ({"data.micro_batch_sequences": 3}, ["data.micro_batch_sequences=3", "data.batch_sequences=64"]),
        ({"data.batch_sequences": 0}, ["data.batch_sequences=0"]),
        ({"optim.decay_fraction": 1.5}, ["optim.decay_fraction=1.5"]),
        ({"optim.num_steps": 0}, ["optim.num_steps=0"]),
        ({"task.name": "rule110", "task.width": 2}, ["task.width=2"]),
        ({"task.name": "rule110", "task.rule_number": 256}, ["task.rule_number=256"]),
        ({"task.name": "depo", "task.max_nodes": 2}, ["task.max_nodes=2"]),
        ({"task.name": "depo", "task.vocab_words": 5}, ["task.vocab_words=5", "task.max_nodes=75"]),
        (
            {"task.name": "recall", "task.num_keys": 15},
            ["task.num_keys=15 ", "task.num_windows=8", "task.pairs_per_window=2", "task.num_keys=16"],
        ),
        ({"task.name": "recall", "task.num_queries": 17}, ["task.num_queries=17", "task.num_queries=16"]),
        ({"task.name": "recall", "task.num_values": 1}, ["task.num_values=1", "2 or more"]),
        ({"task.name": "recall", "task.pairs_per_window": 0}, ["task.pairs_per_window=0"]),
        (
            {
                "task.name": "recall",
                "task.num_windows": 1,
                "task.num_keys": 8,
                "task.num_values": 5,
                "task.num_queries": 1,
            },
            ["task.num_keys=8", "task.num_values=5", "700 different", "1000"],
        ),
        ({"task.name": "text", "task.sequence_tokens": 1}, ["task.sequence_tokens=1"]),
        ({"task.name": "gsm_infinite", "task.min_ops": 9}, ["task.min_ops=9", "task.max_ops=8"]),
        ({"task.name": "gsm_infinite", "task.max_ops": 25}, ["task.max_ops=25", "24"]),
        (
            {"task.name": "gsm_infinite", "task.answer_tokens": 2048},
            ["task.answer_tokens=2048", "task.sequence_tokens=2048"],
        ),
        ({"task.name": "gsm_infinite", "task.target_tokens": 2049}, ["task.target_tokens=2049", "0..2048"]),
        (
            {"task.name": "gsm_infinite", "task.kind": "symbolic", "task.num_variables": 199},
            ["task.num_variables=199 ", "use 200 or more"],
        ),
        (
            {"task.name": "gsm_infinite", "sleep.window_tokens": 500},
            ["sleep.window_tokens=500", "leaves 48", "task.answer_tokens=128"],
        ),
        (
            {"task.name": "gsm_infinite", "task.answer_window": "own", "sleep.window_tokens": 512},
            ["sleep.window_tokens=512", "1920 tokens", "128 to answer", "=480 or"],
        ),
        ({"checkpoint.keep_last": 0}, ["checkpoint.keep_last=0"]),
        ({"log.every_steps": 0}, ["log.every_steps=0"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_one_sentence(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, nested(settings))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"model.num_kv_heads": -2},
        {"model.num_kv_heads": 0},
        {"model.head_dim": -16},
        {"model.memory_qk_heads": -2},
        {"model.mlp_dim": -8},
        {"data.micro_batch_sequences": 0},
        {"optim.warmup_steps": -1},
        {"optim.muon_lr": -0.1},
        {"optim.clip_norm": -1.0},
        {"optim.muon_momentum": 1.5},
        {"sleep.growth_fraction": -1.0},
        {"eval.every_steps": -1},
        {"checkpoint.every_steps": -1},
    ],
    ids=lambda value: "+".join(value),
)
def test_a_number_out_of_its_range_is_refused(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value}")):
        from_dict(Config, nested(settings))


def test_pattern() -> None:
    blocks = parse_pattern("attn gdn swa:12 jet")
    assert [(b.kind, b.width_tokens, b.is_fast_weight) for b in blocks] == [
        ("attn", None, False),
        ("gdn", None, True),
        ("swa", 12, False),
        ("jet", None, True),
    ]
    config = ModelConfig(pattern="attn gdn", pattern_repeats=2, prelude_blocks=1, coda_blocks=1)
    assert [b.kind for b in config.blocks] == ["attn", "gdn", "attn", "gdn"]
    assert [b.kind for b in config.core_blocks] == ["gdn", "attn"]


def test_defaults_that_follow_from_others() -> None:
    model = ModelConfig(d_model=96, num_heads=3)
    assert (model.attention_head_dim, model.kv_heads, model.qk_heads, model.mlp_hidden) == (32, 3, 4, 256)
    for eviction, setting, carried in [
        ("hard", "auto", False),
        ("sliding", "auto", True),
        ("hard", "carried", True),
        ("sliding", "reset", False),
    ]:
        assert SleepConfig(eviction=eviction, convolution=setting).carries_convolution is carried
    assert Config(sleep=SleepConfig(window_tokens=0)).window_tokens == 26
    assert DepoConfig().sequence_tokens == 360


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(task=DepoConfig(max_hops=4), sleep=SleepConfig(window_tokens=75)),
        Config(task=TextConfig(suffixes=(".c",)), dry_run=True),
    ],
)
def test_round_trip(config: Config) -> None:
    assert from_dict(Config, to_dict(config)) == config


def test_help_covers_every_setting() -> None:
    rows = describe(Config)
    tasks = {f"task.{f.name}" for task in get_args(TaskConfig) for f in fields(task)}
    assert {name for name, _, _ in rows} == {*flatten(to_dict(Config())), *tasks}
    assert all(text for _, _, text in rows)
    for section in get_type_hints(Config).values():
        for cls in filter(is_dataclass, (section, *get_args(section))):
            assert [f.name for f in fields(cls) if not f.metadata.get("help")] == []


@pytest.mark.parametrize(("answer_window", "length"), [("shared", 2048), ("shared", 900), ("own", 480)])
def test_a_window_that_holds_the_answer_of_a_long_problem_is_taken(answer_window: str, length: int) -> None:
    task = {"name": "gsm_infinite", "answer_window": answer_window}
    config = from_dict(Config, {"task": task, "sleep": {"window_tokens": length}})
    assert config.window_tokens == length


def test_settings_import_no_torch() -> None:
    code = "import sys, sleeptrain.config; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("length", [0, 2, 4, 6, 12, 24])
def test_a_window_that_divides_the_strings_leaves_the_answers_a_window(length: int) -> None:
    config = from_dict(Config, {"sleep": {"window_tokens": length}})
    assert config.task.context_tokens == 24  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
@pytest.mark.parametrize(
    "settings", [{"run.deterministic": False}, {"model.pattern": "attn", "sleep.num_passes": 1}]
)
def test_kernels_of_others_are_for_runs_that_need_not_repeat(backend: str, settings: dict[str, Any]) -> None:
    """Nor are they refused where none would run."""
    from_dict(Config, nested({"model.memory_backend": backend, "eval.num_passes": [], **settings}))
