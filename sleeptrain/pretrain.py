"""Entry point: compose the config, freeze it, train here or start workers.
``python -m sleeptrain.pretrain experiment=quickstart``

Hydra composes the values of ``configs/`` with ``KEY=VALUE`` arguments; the same command again resumes the
run.
"""

import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sleeptrain.cluster.launch import EXIT_FAILED, launch
from sleeptrain.config import Config, GSMInfiniteConfig, Rule110Config, TaskConfig, TextConfig
from sleeptrain.engine.resilience import EXIT_CONFIG
from sleeptrain.schema import ConfigError, RunError, describe, flatten, from_dict, to_dict, unknown

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

USAGE = """\
usage: python -m sleeptrain.pretrain [experiment=NAME] [baseline=NAME] [KEY=VALUE ...]

Trains a model that sleeps, and resumes when the run folder already holds a checkpoint.

  python -m sleeptrain.pretrain experiment=quickstart
  python -m sleeptrain.pretrain experiment=quickstart sleep.num_passes=4 run.id=n4
  python -m sleeptrain.pretrain experiment=rule110_paper dry_run=true
  torchrun --nproc-per-node 8 -m sleeptrain.pretrain experiment=quickstart parallel=tp2_pp2_dp2
  python -m sleeptrain.pretrain experiment=quickstart cluster=local_procs parallel=dp2

launchers/README.md has the same for Ray and Slurm.
"""


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a setting is wrong, 75 stopped by a signal and saved, 1 training
    failed."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    try:
        config = compose_config(arguments)
        if config.dry_run:
            from sleeptrain.data.corpus import open_task
            from sleeptrain.data.mixture import open_mixture
            from sleeptrain.engine.evaluation import check_difficulties
            from sleeptrain.engine.plan_report import plan_report
            from sleeptrain.engine.retrofit import check_budget

            config = with_tokenizer_or_bytes(config)
            task = open_task(config.task)
            check_budget(config, config.model.rounded_vocab(task.vocab_size))
            check_difficulties(task, config.eval.difficulties)
            print(plan_report(config, task, open_mixture(config, task)))
            return 0
    except ConfigError as error:
        from sleeptrain.parallel.speaker import say

        say(f"error: {error}")
        return EXIT_CONFIG
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return launch(config, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), arguments)


def with_tokenizer_or_bytes(config: Config) -> Config:
    """For a plan: a tokenizer that is not here yet makes no difference where the model says how many rows its
    vocabulary has."""
    task, rows = config.task, config.model.vocab_multiple
    if not isinstance(task, (TextConfig, GSMInfiniteConfig)) or task.tokenizer in ("bytes", "words"):
        return config
    if Path(task.tokenizer).exists() or rows <= 256:
        return config
    print(f"{task.tokenizer} is not here yet: planned with bytes as tokens, and a vocabulary of {rows}\n")
    return replace(config, task=replace(task, tokenizer="bytes", end_token=""))


def compose_config(arguments: list[str]) -> Config:
    """``configs/config.yaml`` with its groups and ``KEY=VALUE`` arguments, checked; raises ConfigError."""
    if not CONFIGS.is_dir():
        raise ConfigError(f"the folder {CONFIGS} is missing; run from a checkout of sleeptrain")
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is no setting; write KEY=VALUE, and see --help for the keys")
    defaults: dict[str, Any] = to_dict(Config())
    del defaults["task"]  # its keys depend on which task it is: they come from configs/task
    ConfigStore.instance().store(name="defaults", node=OmegaConf.create(defaults))
    _check_names(arguments, set(flatten(defaults)))
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            composed = OmegaConf.to_container(compose("config", overrides=arguments), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return from_dict(Config, composed)  # type: ignore[arg-type]


def _check_names(arguments: list[str], settings: set[str]) -> None:
    """A sentence with the nearest name, where Hydra would print a page."""
    groups = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in _groups()}
    of_tasks = {f"task.{field.name}" for task in get_args(TaskConfig) for field in fields(task)}
    has_experiment = any(argument.startswith("experiment=") for argument in arguments)
    for argument in arguments:
        key, value = argument.split("=", 1)
        key = key.lstrip("+~")
        if key == "task" and value in groups["task"] and value != Rule110Config.name and not has_experiment:
            fitting = " or ".join(f"experiment={n}" for n in groups["experiment"] if n.startswith(value))
            raise ConfigError(f"task={value} needs the sizes of an experiment of that task; use {fitting}")
        if key in groups:
            for name in value.strip("[]").split(","):
                if name not in groups[key]:
                    raise ConfigError(unknown(key, name, groups[key]))
        elif key not in settings | of_tasks:
            raise ConfigError(unknown("setting", key, settings | of_tasks | groups.keys()))


def _groups() -> list[Path]:
    """Folders of choices; those of studies are not for a single run."""
    return sorted(path for path in CONFIGS.iterdir() if path.is_dir() and path.name != "study")


def help_text() -> str:
    """Every group with its choices, every setting with its default and meaning."""
    lines = [USAGE, "choices (GROUP=NAME):"]
    for folder in _groups():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        lines.append(
            textwrap.fill(names, 100, initial_indent=f"  {folder.name + '=':<14}", subsequent_indent=" " * 16)
        )
    lines.append("\nsettings (KEY=VALUE), with the defaults that an experiment may change:")
    for name, default, text in describe(Config):
        lines.append(
            textwrap.fill(
                text, 100, initial_indent=f"  {name + '=' + default:<42} ", subsequent_indent=" " * 45
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
