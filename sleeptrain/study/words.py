"""What columns, values and metrics are called where people read them."""

import math
from typing import Any

from sleeptrain.study.controls import TITLES
from sleeptrain.study.spec import NUM_PASSES

COLUMNS = {
    NUM_PASSES: "N, passes over a window",
    "eval_passes": "N in evaluation",
    "passes": "passes made over a window, mean",
    "difficulty": "difficulty",
    "budget": "budget",
    "arm": "model",
    "stop": "stops",
    "num_steps": "optimizer steps",
    "tokens": "tokens",
    "sleep.window_tokens": "window, tokens",
    "sleep.backprop_passes": "passes that the gradient goes back through (0: all)",
    "sleep.passes_schedule": "N over training",
    "model.memory_value_dim": "columns of a fast weight",
    "task.steps": "automaton steps t",
}
METRICS = {
    "exact_accuracy": "exact accuracy, held out",
    "answer_accuracy": "accuracy of single answers, held out",
    "loss": "loss, held out, nats per target",
    "answer_nll": "nats per token of the answer words, held out",
    "bits_per_byte": "bits per byte, held out",
    "tokens_per_second": "tokens per second, training",
    "flops_per_second": "training FLOP per second",
    "step_seconds": "seconds per optimizer step",
    "memory_mib": "peak memory of a step, MiB",
    "state_bytes": "fast weights of a sequence, bytes",
    "flops_ratio": "training FLOPs over those of N = 1",
    "seconds_ratio": "time of a step over that of N = 1",
    "gradient_cosine": "cosine to the gradient through all passes",
}
BUDGETS = {
    "tokens": "equal tokens",
    "flops": "equal training FLOPs",
    "seconds": "equal wall-clock",
    "cost": "cost of a step",
}


def column(name: str, difficulty_name: str = "") -> str:
    if name == "difficulty" and difficulty_name:
        return difficulty_name
    return COLUMNS.get(name, name)


def metric(name: str) -> str:
    return METRICS.get(name, name.replace("_", " "))


def value(name: str, of: Any, difficulty_name: str = "") -> str:
    """``budget``, ``flops`` -> ``equal training FLOPs``; ``task.steps``, 4 -> ``automaton steps t 4``."""
    if name == "budget":
        return BUDGETS.get(of, str(of))
    if name == "arm":
        return TITLES.get(of, str(of)).partition(":")[0] or "as studied"
    if name == "metric":
        return metric(of)
    if name == NUM_PASSES:
        return f"N = {of}"
    if isinstance(of, str):
        return of
    return f"{column(name, difficulty_name).partition(',')[0]} {of}"


def number(of: float) -> str:
    """Three digits, with a decimal prefix from ten thousand on."""
    if not math.isfinite(of):
        return "-"
    for size, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(of) >= size:
            return f"{of / (1e3 if prefix == ' k' else size):.3g}{prefix}"
    return f"{of:.3g}" if of < 1000 else f"{of:.0f}"


def probability(p: float) -> str:
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
