"""A model that sleeps as a Hugging Face folder: our settings as its config.json, our names, and a modelling
file that is copied beside them.

``modeling_sleeptrain.py`` belongs to the folder: transformers runs it, nothing here imports it.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.huggingface.families import SLEEPING
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.schema import ConfigError, from_dict, to_dict
from sleeptrain.tasks.tokenizer import make_tokenizer

MODELLING_FILE = Path(__file__).with_name("modeling_sleeptrain.py")
# What of config.sleep shapes a prediction; the rest is about training.
_AT_INFERENCE = (
    *("window_tokens", "num_passes", "schedule", "eviction", "sliding_kv", "convolution"),
    *("norm_between_passes", "learned_initial_state"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def sleeping_config(checkpoint: Checkpoint, origin: dict[str, Any] | None) -> dict[str, Any]:
    """The config.json. Raises ConfigError for a model that has learned when to halt: the file beside it makes
    N passes."""
    config = checkpoint.documents["config"]
    sleep = from_dict(SleepConfig, config["sleep"], "sleep.")
    if sleep.halting == "learned":
        raise ConfigError(
            "sleep.halting=learned is not known to the modelling file of an export, which makes the same "
            "number of passes for every sequence; keep the checkpoint, or train with sleep.halting=none"
        )
    vocab_size = checkpoint.shape("model", "embed.weight")[0]
    model = _resolved(from_dict(ModelConfig, config["model"], "model."), vocab_size)
    sleep = replace(sleep, convolution="carried" if sleep.carries_convolution else "reset")
    dtypes = Counter(checkpoint.dtype("model", name) for name in checkpoint.names("model"))
    module = MODELLING_FILE.stem
    return {
        "architectures": ["SleeptrainForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SleeptrainConfig",
            "AutoModelForCausalLM": f"{module}.SleeptrainForCausalLM",
        },
        "model_type": SLEEPING,
        "dtype": dtypes.most_common(1)[0][0],
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.blocks),
        "tie_word_embeddings": model.tie_embeddings,
        **_special_tokens(config["task"], origin),
        "model": to_dict(model),
        "sleep": {name: value for name, value in to_dict(sleep).items() if name in _AT_INFERENCE},
    }


def _resolved(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """The same with every default that depends on other settings written out."""
    return replace(
        model,
        pattern=" ".join(model.pattern.split() * model.pattern_repeats),
        pattern_repeats=1,
        num_kv_heads=model.kv_heads,
        head_dim=model.attention_head_dim,
        memory_qk_heads=model.qk_heads,
        mlp_dim=model.mlp_hidden,
        memory_norm_eps=model.norm_eps if model.memory_norm_eps is None else model.memory_norm_eps,
        vocab_multiple=vocab_size,
    )


def _special_tokens(task: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
    """Those of the model that it stems from, else the one with which a text ends."""
    if origin is not None:
        said = origin["config"].get("text_config", {}) | origin["config"]
        return {name: said[name] for name in _TOKENS if said.get(name) is not None}
    if task["name"] != "text":
        return {}
    return {"eos_token_id": make_tokenizer(task["tokenizer"], task["end_token"]).end_id}
