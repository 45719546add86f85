"""Tiny random models, built by transformers from its own config classes, and our import of them."""

import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import sys
from importlib import import_module

import torch
import transformers
from torch import Tensor

VOCAB = 62
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 3,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
KINDS = {
    "llama": (transformers.LlamaConfig, {"num_hidden_layers": 2, "head_dim": 8, "rope_parameters": ROPE}),
    "llama_tied": (transformers.LlamaConfig, {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"num_hidden_layers": 2, "rope_parameters": ROPE}),
    "qwen2_sliding": (
        transformers.Qwen2Config,
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"num_hidden_layers": 2, "head_dim": 10, "rms_norm_eps": 1e-5}),
    "qwen3_5": (
        transformers.Qwen3_5TextConfig,
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            **LINEAR,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo_hybrid": (transformers.OlmoHybridConfig, {"num_hidden_layers": 4, **LINEAR}),
    "olmo_hybrid_rope": (
        transformers.OlmoHybridConfig,
        {"num_hidden_layers": 4, **LINEAR, "linear_allow_neg_eigval": False, "rope_parameters": ROPE},
    ),
}


_fla = sys.modules.get("fla")
sys.modules["fla"] = None  # type: ignore[assignment]  # its kernels need a GPU: transformers has its own torch code
for _name in ("qwen3_5", "olmo_hybrid"):
    import_module(f"transformers.models.{_name}.modeling_{_name}")
sys.modules.pop("fla")
if _fla is not None:
    sys.modules["fla"] = _fla


def build(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model whose every part matters: norms and biases are disturbed, too."""
    config_class, own = KINDS[kind]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **own, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def random_ids(num_tokens: int, num_sequences: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(num_tokens)
    return torch.randint(VOCAB, (num_sequences, num_tokens), generator=draw)
