"""Optimizer, evaluation, checkpoints and logs."""

from dataclasses import dataclass
from typing import Literal

from sleeptrain.config.checks import require_in, require_positive
from sleeptrain.schema import ConfigError, setting


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the matrices of the blocks, AdamW for everything else; warm-up, stable, linear decay."""

    num_steps: int = setting(1000, "optimizer steps of the run")
    muon_lr: float = setting(0.01, "peak learning rate of Muon")
    muon_scale: Literal["original", "match_rms"] = setting(
        "match_rms", "update scale: sqrt(max(1, out/in)), or 0.2 sqrt(max(out, in)) to match AdamW's"
    )
    muon_momentum: float = setting(0.95, "Muon's Nesterov momentum")
    muon_steps: int = setting(5, "Newton-Schulz iterations")
    muon_precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "type of their products; auto: float32 on cpu, bfloat16 on cuda"
    )
    adamw_lr: float = setting(3e-3, "peak learning rate of AdamW")
    adamw_beta1: float = setting(0.9, "AdamW's decay of the first moment")
    adamw_beta2: float = setting(0.95, "AdamW's decay of the second moment")
    weight_decay: float = setting(1e-4, "decoupled decay of both; none on norms, A_log and dt_bias")
    frozen: tuple[str, ...] = setting(
        (),
        "patterns of weights that stay as they are, the last that fits decides; !PATTERN trains: "
        "['*','!stack.blocks.4.*'] trains one block",
    )
    scaled: tuple[str, ...] = setting(
        (), "patterns, as those of frozen, of weights whose learning rates are multiplied by scaled_factor"
    )
    scaled_factor: float = setting(0.1, "what the learning rates of scaled weights are multiplied by")
    warmup_steps: int = setting(50, "steps over which the learning rate rises from 0")
    decay_fraction: float = setting(0.3, "last part of the run over which it falls linearly to 0")
    clip_norm: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    spike_factor: float = setting(
        50.0,
        "skip an update whose gradient norm is above this many times the usual one: the median of the last "
        "100, or clip_norm where that is larger; 0: never",
    )
    max_skipped_steps: int = setting(
        10, "stop after this many skipped updates in a row: their loss or gradient not finite, or a spike"
    )

    def __post_init__(self) -> None:
        require_positive("optim", self, ("num_steps", "max_skipped_steps"))
        rates = ("muon_lr", "adamw_lr", "weight_decay", "warmup_steps", "clip_norm", "muon_steps")
        require_in("optim", self, (*rates, "spike_factor", "scaled_factor"), 0)
        require_in("optim", self, ("muon_momentum", "adamw_beta1", "adamw_beta2", "decay_fraction"), 0, 1)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on the validation split."""

    every_steps: int = setting(100, "evaluate each so many steps, and at the end; 0: at the end only")
    num_examples: int = setting(512, "held-out examples per difficulty")
    batch_sequences: int = setting(256, "sequences evaluated at once")
    num_passes: tuple[int, ...] = setting((), "also evaluate with these N beside the training N")
    difficulties: tuple[int, ...] = setting((), "difficulties to evaluate; empty: the task's own list")

    def __post_init__(self) -> None:
        require_positive("eval", self, ("num_examples", "batch_sequences"))
        require_in("eval", self, ("every_steps",), 0)
        if any(n < 1 for n in self.num_passes):
            raise ConfigError(f"eval.num_passes={list(self.num_passes)} holds a value below 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it keeps."""

    every_steps: int = setting(200, "save each so many steps, and at the end; 0: at the end only")
    keep_last: int = setting(2, "newest checkpoints to keep")
    keep_every_steps: int = setting(0, "keep checkpoints at multiples of this for ever; 0: none")
    bucket: str = setting(
        "", "URL for copies of them, in a folder of the run's id: a run whose disk is gone goes on from there"
    )

    def __post_init__(self) -> None:
        require_positive("checkpoint", self, ("keep_last",))
        require_in("checkpoint", self, ("every_steps", "keep_every_steps"), 0)


@dataclass(frozen=True)
class LogConfig:
    """Metrics always go to metrics.jsonl; Weights & Biases when asked."""

    every_steps: int = setting(10, "write a row of training metrics each so many steps")
    wandb: Literal["off", "offline", "online"] = setting("off", "Weights & Biases")
    wandb_project: str = setting("sleeptrain", "its project")

    def __post_init__(self) -> None:
        require_positive("log", self, ("every_steps",))
