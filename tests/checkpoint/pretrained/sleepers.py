"""Checkpoints of tiny models that sleep, as a run from scratch leaves them, with weights that all matter."""

from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config import Config, ModelConfig, RunConfig, SleepConfig, TextConfig
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import to_dict

VOCAB = 257
WINDOW_TOKENS = 7
SIZES = {"d_model": 24, "num_heads": 4, "memory_heads": 4, "memory_key_dim": 6, "memory_value_dim": 5}
EVERYTHING = "swa:3 gdn attn jet attn gdn"
# Of each case the settings of model and sleep.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"pattern": "attn gdn", "pattern_repeats": 2}, {}),
    "sliding": (
        {"pattern": "swa:3 jet attn gdn", "num_kv_heads": 2, "memory_qk_heads": 2, "memory_norm_eps": 1e-3},
        {"eviction": "sliding"},
    ),
    "ends": (
        {"pattern": EVERYTHING, "prelude_blocks": 2, "coda_blocks": 2},
        {"eviction": "sliding", "sliding_kv": "per_pass", "schedule": "predict_then_consolidate"},
    ),
    "ends_again": (
        {"pattern": EVERYTHING, "prelude_blocks": 2, "coda_blocks": 2},
        {"eviction": "sliding", "sliding_kv": "per_pass"},
    ),
    "sandwich": (
        {
            "pattern": "gdn attn jet attn gdn",
            **{"prelude_blocks": 1, "coda_blocks": 2, "norm_placement": "sandwich", "qk_norm": "head"},
            **{"attention_gate": True, "rotary_fraction": 0.34},
        },
        {"norm_between_passes": True, "learned_initial_state": True},
    ),
    "mixed": (
        {
            "pattern": "gdn attn jet attn gdn",
            **{"norm_placement": "mixed", "qk_norm": "width", "zero_centred_norms": True},
            **{"attention_bias": True, "tie_embeddings": True, "negative_eigenvalues": True},
            "rotary_fraction": 0.0,
        },
        {"convolution": "carried"},
    ),
    "delta": (
        {"pattern": "gdn attn jet", "rule": "delta", "memory_mlp": False},
        {"eviction": "sliding", "convolution": "reset"},
    ),
    "hebbian": ({"pattern": "gdn attn jet", "rule": "gated_hebbian", "conv_width": 1}, {"window_tokens": 0}),
}


def sleeper(case: str, run_folder: Path, dtype: torch.dtype = torch.float32, **sleep: Any) -> Checkpoint:
    """The checkpoint of step 12 of a case."""
    model, own = CASES[case]
    config = Config(
        run=RunConfig(id=case, dir=str(run_folder), device="cpu"),
        model=ModelConfig(**SIZES, **model),
        sleep=SleepConfig(**{"window_tokens": WINDOW_TOKENS, "num_passes": 3, **own, **sleep}),
        task=TextConfig(),
    )
    backend, draw = LocalBackend(config, VOCAB), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in backend.model.named_parameters():
            # Matrices stay small: what is passed over several times would make much of the last bits.
            scale = 0.1 if name.startswith(("embed", "head")) else 0.06 if "proj" in name else 0.15
            parameter += scale * torch.randn(parameter.shape, generator=draw)
    backend.model.to(dtype)
    saver = Saver(run_folder / "checkpoints", keep_last=1, keep_every_steps=0)
    saver.save(12, backend.slices(), {"config": to_dict(config)})
    assert saver.wait() is None
    return Checkpoint(run_folder / "checkpoints" / "step_00000012")
