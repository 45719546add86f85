"""What a study is: one YAML of ``configs/study``, its dial for the scale, the settings of the command line.

``python -m sleeptrain.study study=rule110_n study.scale=gpu_hours study.seeds=[0,1] optim.num_steps=500``
"""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from sleeptrain.pretrain import CONFIGS
from sleeptrain.schema import ConfigError, from_dict, setting, to_dict, unknown

STUDIES = CONFIGS / "study"
NUM_PASSES = "sleep.num_passes"
Budget = Literal["tokens", "flops", "seconds"]
Control = Literal["deeper", "wider_state", "full_attention", "cleared_cache"]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A figure: a metric against a column of the data, a line for each value of another."""

    title: str = setting("", "what it shows")
    metric: str = setting("", "empty: the main one")
    x: str = setting(NUM_PASSES, "column across")
    lines: str = setting("difficulty", "column that makes the lines")
    panels: str = setting("budget", "column that makes the panels")
    only: dict[str, Any] = setting({}, "columns that must have these values")
    log_x: bool = setting(False, "powers of two are equally far apart")
    note: str = setting("", "a sentence or two below it")


@dataclass(frozen=True)
class Study:
    """The runs, what is asked of them, and what is drawn."""

    title: str = setting("", "heading of the report")
    question: str = setting("", "what the study asks, for somebody who has not seen the code")
    notes: str = setting("", "what a reader must know beside; goes into the report as it is")
    choices: tuple[str, ...] = setting(("experiment=quickstart",), "GROUP=NAME that every run is composed of")
    settings: Settings = setting({}, "settings of every run")
    grid: dict[str, list[Any]] = setting(
        {NUM_PASSES: [1, 2, 3, 4]}, "settings and their values, all combined"
    )
    arms: dict[str, Settings] = setting({"": {}}, "named settings, each combined with the whole grid")
    controls: tuple[Control, ...] = setting((), "models that never sleep, at the FLOPs of the largest N")
    budgets: tuple[Budget, ...] = setting(("tokens",), "what is equal between the N of a comparison")
    seeds: tuple[int, ...] = setting((0, 1, 2), "run.seed")
    best_of: dict[str, list[Any]] = setting(
        {}, "settings of which each point takes the best, on validation data"
    )
    eval_passes: tuple[int, ...] = setting((), "N in evaluation; empty: the N of the training")
    difficulties: tuple[int, ...] = setting((), "in evaluation; empty: those of the task")
    eval_task: Settings = setting({}, "settings of the task that differ in evaluation, such as its length")
    metric: str = setting("exact_accuracy", "the main one, of those that the task scores by")
    num_examples: int = setting(1024, "held-out examples per difficulty")
    tolerances: tuple[float, ...] = setting((), "also: sleep until the fast weights change by less")
    halt_thresholds: tuple[float, ...] = setting((), "also: sleep until the learned halting reaches this")
    probes: tuple[Literal["gradient_cosine"], ...] = setting((), "further measurements on each trained model")
    trains: bool = setting(True, "false: only the costs are measured")
    chance: float | None = setting(None, "value of the main metric for guessing; null: not drawn")
    curves: tuple[Curve, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name in ("grid", "best_of"):
            for key, values in getattr(self, name).items():
                if not isinstance(values, list) or not values:
                    raise ConfigError(f"study.{name}.{key}={values!r} is no list of values; write [A, B]")
        for name in ("seeds", "budgets", "arms"):
            if not getattr(self, name):
                raise ConfigError(f"study.{name} is empty; give at least one")
        if self.num_examples < 1:
            raise ConfigError(f"study.num_examples={self.num_examples} must be at least 1")


@dataclass(frozen=True)
class Execution:
    """Where and how the runs of a study are made. No result depends on it."""

    dir: str = setting("", "folder of the study; empty: runs/studies/NAME_SCALE")
    report_dir: str = setting("", "folder of the report; empty: report/ in that of the study")
    where: Literal["local", "process", "ray"] = setting(
        "local", "local: processes of this machine; process: this one, in a row; ray: tasks of a Ray cluster"
    )
    slots: int | None = setting(None, "local: runs at a time; null: as many as the cores allow")
    watch: bool = setting(False, "status: show it again every few seconds until all is done")

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ConfigError(f"study.slots={self.slots} must be at least 1")


@dataclass(frozen=True)
class Asked:
    """A study as the command line asks for it. ``command`` makes it again."""

    name: str
    scale: str
    study: Study
    execution: Execution
    command: str

    @property
    def folder(self) -> Path:
        default = f"runs/studies/{self.name}" + (f"_{self.scale}" if self.scale else "")
        return Path(self.execution.dir or default)

    @property
    def report_folder(self) -> Path:
        return Path(self.execution.report_dir) if self.execution.report_dir else self.folder / "report"


def names() -> list[str]:
    """The studies that there are."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def ask(arguments: list[str]) -> Asked:
    """``study=NAME``, ``study.KEY=VALUE`` and settings of every run; raises ConfigError."""
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is no setting; write KEY=VALUE, and see --help for the keys")
    try:
        given: Settings = {
            key: OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index,call-overload]
            for key, _, value in (argument.partition("=") for argument in arguments)
        }
    except Exception as error:  # of YAML's, and several of OmegaConf's
        reason = " ".join(str(error).split())
        raise ConfigError(f"an argument cannot be read ({reason}); write KEY=VALUE or KEY=[1,2]") from error
    name = given.pop("study", None)
    if name not in names():
        raise ConfigError(
            unknown("study", name, names()) if name else f"give study=NAME: {', '.join(names())}"
        )
    own = {key.removeprefix("study."): given.pop(key) for key in list(given) if key.startswith("study.")}
    execution = {f.name: own.pop(f.name) for f in fields(Execution) if f.name in own}
    written: Settings = OmegaConf.to_container(OmegaConf.load(STUDIES / f"{name}.yaml"))  # type: ignore[assignment]
    scale = str(own.pop("scale", written.pop("scale", "")))
    merged = _merge(_at_scale(name, written, scale), own)
    merged["settings"] = merged.get("settings", {}) | given
    return Asked(
        name,
        scale,
        from_dict(Study, merged, "study."),
        from_dict(Execution, execution, "study."),
        f"python -m sleeptrain.study {shlex.join(a for a in arguments if not _is_execution(a))}",
    )


def to_yaml(asked: Asked) -> str:
    """For a look at what was asked: the study with its scale and its settings."""
    return OmegaConf.to_yaml(
        OmegaConf.create({"study": asked.name, "scale": asked.scale} | to_dict(asked.study))
    )


def _at_scale(name: str, written: Settings, scale: str) -> Settings:
    """A scale changes keys of the study; its settings are added to the others, all else is replaced."""
    scales: dict[str, Settings] = written.pop("scales", {})
    if scale not in scales and (scale or scales):
        raise ConfigError(unknown(f"study.scale of {name}:", scale, scales or ("none",)))
    return _merge(written, scales.get(scale) or {})


def _merge(written: Settings, changes: Settings) -> Settings:
    merged = written | changes
    if "settings" in changes:
        merged["settings"] = written.get("settings", {}) | changes["settings"]
    return merged


def _is_execution(argument: str) -> bool:
    return argument.partition("=")[0].removeprefix("study.") in {f.name for f in fields(Execution)}
