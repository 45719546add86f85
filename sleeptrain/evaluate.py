"""Entry point: checkpoint -> held-out loss and accuracy by task, difficulty and N, as a table and as JSON.

``python -m sleeptrain.evaluate checkpoint=runs/quickstart num_passes=[1,2,4] difficulties=[2,4,8]``
"""

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from sleeptrain.schema import ConfigError, RunError, describe, from_dict, setting, to_dict

USAGE = """\
usage: python -m sleeptrain.evaluate checkpoint=FOLDER [KEY=VALUE ...] [task.KEY=VALUE ...]

Scores a checkpoint on held-out examples for every pair of difficulty and N, prints a table and writes JSON.
task.KEY=VALUE changes the task from the one it was trained on, as long as the vocabulary stays the same.

  python -m sleeptrain.evaluate checkpoint=runs/quickstart num_passes=[1,2,4] difficulties=[2,4,8]
"""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate."""

    checkpoint: str = setting("", "run folder (its newest valid checkpoint) or one checkpoint folder")
    split: Literal["validation", "test", "train"] = setting("test", "which examples, split by content")
    num_passes: tuple[int, ...] = setting((), "list of N; empty: the training N")
    difficulties: tuple[int, ...] = setting((), "list of difficulties; empty: the task's own")
    num_examples: int | None = setting(
        None, "examples per difficulty; null: the whole split where it ends (text), else 2048"
    )
    batch_sequences: int = setting(256, "sequences evaluated at once")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if there is one")
    output: str = setting("", "JSON file; empty: eval/ in the run folder")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint is not given; write checkpoint=runs/NAME")
        for name in ("num_examples", "batch_sequences", "num_passes"):
            value = getattr(self, name)
            values = [value] if isinstance(value, int) else list(value or [])
            if any(v < 1 for v in values):
                raise ConfigError(f"{name}={values} must be at least 1")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a setting or the checkpoint is wrong."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        for name, default, text in describe(EvaluateConfig):
            print(
                textwrap.fill(
                    text, 100, initial_indent=f"  {name + '=' + default:<28} ", subsequent_indent=" " * 31
                )
            )
        return 0
    try:
        for argument in arguments:
            if "=" not in argument:
                raise ConfigError(f"{argument!r} is no setting; write KEY=VALUE, and see --help for the keys")
        given = parse(arguments)
        task_changes = given.pop("task", {})
        run(from_dict(EvaluateConfig, given), task_changes)
        return 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> dict[str, Any]:
    """Nested values of ``KEY=VALUE`` arguments; raises ConfigError."""
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_cli(arguments))
    except Exception as error:  # of YAML's, and several of OmegaConf's
        reason = " ".join(str(error).split())
        raise ConfigError(f"an argument cannot be read ({reason}); write KEY=VALUE or KEY=[1,2]") from error
    if not isinstance(given.get("task", {}), dict):
        raise ConfigError(f"task={given['task']} is no setting here; write task.name={given['task']}")
    return given


def run(settings: EvaluateConfig, task_changes: dict[str, Any]) -> Path:
    """Evaluates, prints the table, and returns the JSON file it wrote."""
    from sleeptrain.checkpoint.durable import replace_file
    from sleeptrain.data.corpus import open_task
    from sleeptrain.engine import restored
    from sleeptrain.engine.evaluation import as_table, check_difficulties, evaluate
    from sleeptrain.model.visits import require_passes

    found = restored.find(Path(settings.checkpoint))
    config = restored.settings_of(found, settings.device, task_changes)
    task = open_task(config.task)
    vocab_size = found.shape("model", "embed.weight")[0]
    if config.model.rounded_vocab(task.vocab_size) != vocab_size:
        raise ConfigError(
            f"the task needs a vocabulary of {task.vocab_size} and the checkpoint has "
            f"{vocab_size}; change task.* back"
        )
    backend = restored.with_weights(found, config)
    num_passes = settings.num_passes or (config.sleep.num_passes,)
    for n in num_passes:
        require_passes(n, config.model)
    check_difficulties(task, settings.difficulties)
    num_examples = settings.num_examples or task.num_examples(settings.split) or 2048
    results = evaluate(
        backend,
        task,
        settings.split,
        num_passes,
        settings.difficulties,
        num_examples,
        settings.batch_sequences,
        config.sleep.window_tokens,
    )
    print(f"{found.path}, {settings.split} split, {results[0].num_examples} examples per difficulty\n")
    print(as_table(results, task.difficulty_name))
    is_whole = num_examples >= (task.num_examples(settings.split) or 0)
    marks = task.marks(settings.split) if is_whole else {}  # they are of the whole split
    for name, value in marks.items():
        print(f"to beat: {name} {value:.4f}\n")
    run_folder = found.path.parent.parent
    path = (
        Path(settings.output)
        if settings.output
        else run_folder / "eval" / f"{found.path.name}_{settings.split}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "checkpoint": str(found.path),
        "step": found.step,
        "split": settings.split,
        "task": to_dict(config.task),
        "trained_num_passes": config.sleep.num_passes,
        "marks": marks,
        "results": [r.summary() for r in results],
    }
    replace_file(path, json.dumps(document, indent=2).encode())
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
