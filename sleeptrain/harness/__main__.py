"""Entry point: lm-eval with the model ``sleeptrain``.

``python -m sleeptrain.harness --model sleeptrain --model_args checkpoint=runs/text,num_passes=4 --tasks X``
"""

import sys
import textwrap

from sleeptrain.harness.settings import HarnessConfig
from sleeptrain.schema import ConfigError, RunError, describe

USAGE = """\
usage: python -m sleeptrain.harness --model sleeptrain --model_args checkpoint=FOLDER[,KEY=VALUE] --tasks NAME

Scores a checkpoint with lm-eval (EleutherAI's lm-evaluation-harness); every option of its own command line is
one of this, too: run --help lists them, ls tasks the tasks.

  python -m sleeptrain.harness --model sleeptrain --model_args checkpoint=runs/gsm,num_passes=4 --tasks gsm8k
  python -m sleeptrain.harness --model sleeptrain --model_args checkpoint=runs/text --include_path my_tasks \\
      --tasks my_task --batch_size 16 --output_path results

keys of --model_args:
"""


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a setting or the checkpoint is wrong, or lm-eval is not installed."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(USAGE)
        for name, default, text in describe(HarnessConfig):
            first = f"  {name + '=' + default:<28} "
            print(textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * 31))
        return 0
    try:
        run(arguments)
        return 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: list[str]) -> None:
    """Hands the arguments to lm-eval, once it knows the model."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ConfigError(
            f'lm_eval is not installed ({error}); where sleeptrain is: pip install --editable ".[lm-eval]"'
        ) from error
    import sleeptrain.harness.model  # noqa: F401  # registers it

    sys.argv[1:] = arguments  # where lm-eval reads them
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
