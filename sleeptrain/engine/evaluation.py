"""Held-out loss and accuracy by difficulty and by N."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sleeptrain.data.batch import make_batch
from sleeptrain.model.halting import Stop
from sleeptrain.parallel.backend import Backend
from sleeptrain.tasks.base import Split, Task

EVAL_SEED = 0  # the held-out examples are the same for every run, whatever its own seed


class EvalResult(NamedTuple):
    """Means over ``num_examples`` examples of one difficulty, with N passes over each window slept on.

    ``metrics`` holds ``loss`` (nats per target) and the task's own metrics; ``scores`` the same of each
    example, float64 ``[num_examples]``.
    """

    num_passes: int
    difficulty: int
    num_examples: int
    metrics: dict[str, float]
    scores: dict[str, np.ndarray]

    def summary(self) -> dict[str, Any]:
        """All but the single examples, as plain values."""
        return {name: value for name, value in self._asdict().items() if name != "scores"}


class StoppedError(Exception):
    """A stop was asked for before an evaluation was over."""


def evaluate(
    backend: Backend,
    task: Task,
    split: Split,
    num_passes: Sequence[int],
    difficulties: Sequence[int],
    num_examples: int,
    batch_sequences: int,
    window_tokens: int,
    is_stopped: Callable[[], bool] = lambda: False,
    stop: Stop | None = None,
) -> list[EvalResult]:
    """Every pair of N and difficulty on the same examples; a split that ends gives at most all of its own,
    spread evenly. With a rule to ``stop`` N is the most, and the metric ``passes`` is what sequences made on
    average over a window. Raises StoppedError once ``is_stopped``, which is asked before each batch."""
    total = task.num_examples(split) or num_examples
    count = min(num_examples, total)
    indices = np.arange(count) * total // count
    results = []
    for difficulty in difficulties or task.difficulties:
        batches = [
            task.examples(EVAL_SEED, indices[start : start + batch_sequences], split, difficulty)
            for start in range(0, count, batch_sequences)
        ]
        for n in num_passes:
            scores: dict[str, list[np.ndarray]] = {}
            loss_sum, num_targets = 0.0, 0
            for examples in batches:
                if is_stopped():
                    raise StoppedError
                batch = make_batch(examples, window_tokens)
                output = backend.evaluate(batch, n, stop)
                loss_sum += float(output.loss_sum)
                num_targets += batch.num_targets
                nll = output.nll.double().cpu().numpy()
                of_examples = {"loss": nll.sum(1) / np.maximum(1, examples.loss_mask.sum(1))}
                of_examples |= task.score(output.predictions.cpu().numpy(), nll, examples)
                if output.passes is not None:
                    of_examples["passes"] = _mean_passes(output.passes)
                for name, values in of_examples.items():
                    scores.setdefault(name, []).append(values)
            joined = {name: np.concatenate(values) for name, values in scores.items()}
            metrics = {name: float(values.mean()) for name, values in joined.items()}
            metrics["loss"] = loss_sum / num_targets  # of all targets, however many an example has
            results.append(EvalResult(n, difficulty, count, metrics, joined))
    return results


def _mean_passes(passes: Tensor) -> np.ndarray:
    """Of each sequence over the windows that hold any of it ``[B]``, from ``[B, windows slept on]``."""
    made = passes.double()
    return (made.sum(1) / (made > 0).sum(1).clamp_min(1)).cpu().numpy()


def check_difficulties(task: Task, difficulties: Sequence[int]) -> None:
    """Raises ConfigError for a difficulty that the task does not know: before training, not at its first
    evaluation."""
    for difficulty in difficulties:
        task.example(EVAL_SEED, 0, "validation", difficulty)


def as_row(results: list[EvalResult], difficulty_name: str, trained_passes: int) -> dict[str, float]:
    """Flat metrics: ``eval/METRIC`` at the training N over all difficulties, and one for each difficulty and
    N."""
    row: dict[str, float] = {}
    trained = [r for r in results if r.num_passes == trained_passes]
    for name in results[0].metrics:
        row[f"eval/{name}"] = sum(r.metrics[name] for r in trained) / len(trained)
    for r in results:
        for name, value in r.metrics.items():
            row[f"eval/{name}/{difficulty_name}_{r.difficulty}/passes_{r.num_passes}"] = value
    return row


def as_table(results: list[EvalResult], difficulty_name: str) -> str:
    """One block per metric: difficulties down, N across."""
    passes = sorted({r.num_passes for r in results})
    by_place = {(r.difficulty, r.num_passes): r for r in results}
    lines = []
    for name in results[0].metrics:
        lines.append(f"{name:<20}" + "".join(f"{f'N={n}':>10}" for n in passes))
        for difficulty in dict.fromkeys(r.difficulty for r in results):
            values = (by_place[difficulty, n].metrics[name] for n in passes)
            lines.append(
                f"  {difficulty_name} {difficulty:<{17 - len(difficulty_name)}}"
                + "".join(f"{v:>10.4f}" for v in values)
            )
        lines.append("")
    return "\n".join(lines)
