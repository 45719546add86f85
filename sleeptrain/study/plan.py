"""The runs of a study and what each stands for, from its grid, arms, controls, budgets and seeds.

The id of a run is a hash of all settings that shape its result, so that the same run asked for twice, in one
study or in two with one folder, is made once.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from sleeptrain.config import Config
from sleeptrain.engine.evaluation import check_difficulties
from sleeptrain.engine.resume import is_free
from sleeptrain.model.visits import require_passes
from sleeptrain.pretrain import compose_config
from sleeptrain.schema import ConfigError, flatten, to_dict, with_changes
from sleeptrain.study.controls import changes_of
from sleeptrain.study.cost import cost_of, task_of
from sleeptrain.study.spec import NUM_PASSES, Asked, Budget, Settings, Study

SAME_STEPS = 0.05  # budgets whose steps differ by less share a run: training time is not known any better
SMALL_RUN: Settings = {"checkpoint.keep_last": 1, "eval.num_passes": [], "run.num_threads": 1}

SecondsPerStep = Callable[[Config], float]


class Point(NamedTuple):
    """What a run stands for: one value of each axis, at one budget. A run may be several points.

    ``role``: ``grid`` or ``control``; ``arm``: of the grid, or the name of the control.
    """

    trial: str
    role: str
    arm: str
    budget: str
    seed: int
    axes: dict[str, Any]
    tried: dict[str, Any]


class Plan(NamedTuple):
    """``trials`` by id, in the order in which they are to be made."""

    trials: dict[str, Config]
    points: list[Point]


def plan(asked: Asked, seconds_per_step: SecondsPerStep) -> Plan:
    """Raises ConfigError where any of the runs would be refused: before the first one starts."""
    study, trials, points = asked.study, dict[str, Config](), list[Point]()
    for role, arm, budget, config, axes, tried in _expand(study, seconds_per_step):
        trial = trial_id(config)
        trials.setdefault(trial, config)
        points.append(Point(trial, role, arm, budget, config.run.seed, axes, tried))
    for config in trials.values():
        _check_evaluation(study, config)
    # Seed by seed: whoever stops early has a whole study of fewer seeds. Long ones first: none is left alone.
    order = sorted(trials, key=lambda trial: (trials[trial].run.seed, -cost_of(trials[trial]).flops))
    return Plan({trial: trials[trial] for trial in order}, points)


def _check_evaluation(study: Study, config: Config) -> None:
    """Raises ConfigError where a trained model could not be evaluated as asked."""
    changed = with_changes(config, {f"task.{name}": value for name, value in study.eval_task.items()})
    trained, evaluated = task_of(config.task), task_of(changed.task)
    if trained.vocab_size != evaluated.vocab_size:
        raise ConfigError(
            f"study.eval_task={study.eval_task} has a vocabulary of {evaluated.vocab_size}, and the training "
            f"one of {trained.vocab_size}; change them so that they agree"
        )
    check_difficulties(evaluated, study.difficulties)


def shapes(study: Study) -> list[Config]:
    """A run for each different step that the study makes: what there is to time."""
    found = {shape_id(config): config for *_, config, _, _ in _expand(study, lambda config: 1.0)}
    return list(found.values())


def trial_id(config: Config) -> str:
    """Of the settings that shape the result, as far as they differ from the defaults: a setting that is new
    in a later version changes no id."""
    chosen = {key: v for key, v in _chosen(config).items() if key == "data.shards" or not is_free(key)}
    return f"n{config.sleep.num_passes}_seed{config.run.seed}_{_digest(chosen)}"


def shape_id(config: Config) -> str:
    """Of what makes a step as long as it is."""
    chosen = {key: v for key, v in _chosen(config).items() if key.startswith(("model.", "sleep."))}
    sizes = [config.task.sequence_tokens, config.data.batch_sequences, task_of(config.task).vocab_size]
    return _digest(chosen | {"sizes": sizes})


def _chosen(config: Config) -> Settings:
    """The settings that are not the defaults."""
    defaults = flatten(to_dict(Config()) | {"task": to_dict(type(config.task)())})
    return {key: v for key, v in flatten(to_dict(config)).items() if v != defaults[key] or key == "task.name"}


def eval_passes(study: Study, config: Config) -> tuple[int, ...]:
    """The N with which a run is evaluated: a model without fast weights has but one."""
    asked = sorted({config.sleep.num_passes, *study.eval_passes})
    try:
        require_passes(max(asked), config.model)
    except ConfigError:
        return (config.sleep.num_passes,)
    return tuple(asked)


Expanded = tuple[str, str, str, Config, Settings, Settings]


def _expand(study: Study, seconds_per_step: SecondsPerStep) -> Iterator[Expanded]:
    """(role, arm, budget, config, axes, tried) of every point."""
    base = compose_config(list(study.choices))
    others = {key: values for key, values in study.grid.items() if key != NUM_PASSES}
    for arm, of_arm in study.arms.items():
        for axes, tried, seed in product(_combined(others), _combined(study.best_of), study.seeds):
            changes = SMALL_RUN | study.settings | of_arm | axes | tried | {"run.seed": seed}
            cell = with_changes(base, changes)
            passes = study.grid.get(NUM_PASSES, [cell.sleep.num_passes])
            by_passes = {n: with_changes(cell, {NUM_PASSES: n}) for n in passes}
            for budget, n in product(study.budgets, passes):
                config = _at_budget(by_passes[n], by_passes[max(passes)], budget, seconds_per_step)
                yield "grid", arm, budget, config, axes | {NUM_PASSES: n}, tried
            if arm == next(iter(study.arms)):
                for control in study.controls:
                    config = _control(control, by_passes, seconds_per_step)
                    yield "control", control, "flops", config, axes | {NUM_PASSES: 1}, tried


def _control(control: Any, by_passes: dict[int, Config], seconds_per_step: SecondsPerStep) -> Config:
    """At the FLOPs of the largest N, but with no more tokens than N = 1 has there."""
    largest = by_passes[max(by_passes)]
    plain = with_changes(largest, {NUM_PASSES: 1, "sleep.min_passes": 1, "sleep.passes_schedule": "fixed"})
    ratio = cost_of(largest).flops / cost_of(plain).flops
    config = _at_budget(
        with_changes(largest, changes_of(control, largest, ratio)), largest, "flops", seconds_per_step
    )
    most = round(plain.optim.num_steps * ratio)
    return config if config.optim.num_steps <= most else with_changes(config, {"optim.num_steps": most})


def _at_budget(config: Config, reference: Config, budget: Budget, seconds_per_step: SecondsPerStep) -> Config:
    """With the optimizer steps that cost what ``reference`` costs."""
    if budget == "tokens":
        return config
    by_flops = cost_of(reference).flops / cost_of(config).flops
    ratio = by_flops
    if budget == "seconds":
        by_seconds = seconds_per_step(reference) / seconds_per_step(config)
        ratio = by_flops if abs(by_seconds / by_flops - 1) < SAME_STEPS else by_seconds
    return with_changes(config, {"optim.num_steps": max(1, round(config.optim.num_steps * ratio))})


def _combined(axes: dict[str, list[Any]]) -> list[Settings]:
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
