"""The report of a study: ``index.html`` and ``report.md`` with their figures and data beside them."""

import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.pretrain import CONFIGS
from sleeptrain.study import figures, page, verdict, words
from sleeptrain.study.collect import COST, Data, Row, by_way, to_csv, values_of
from sleeptrain.study.page import Page, Part, Picture, Points, Section, Table, Text
from sleeptrain.study.plan import Plan
from sleeptrain.study.spec import NUM_PASSES, Asked, Curve, to_yaml
from sleeptrain.study.statistics import Paired, estimate

READING = (
    "Values are means over seeds with the 95 % interval of the mean (Student's t), which is wide where there "
    "are few seeds; dots are single seeds. Models are compared on the same held-out examples, none of which "
    "shares an item with the training. p is that of McNemar's sign test on the examples that only one of two "
    "models got right, over all seeds: it speaks for these trained models, the interval for the method."
)


class Reporter(NamedTuple):
    """What the sections are made of."""

    asked: Asked
    plan: Plan
    data: Data

    @property
    def axes(self) -> list[str]:
        """Of the grid, but N."""
        return [name for name in self.asked.study.grid if name != NUM_PASSES]

    def picture(self, file: str, caption: str) -> Picture:
        """With what draws it and from which commit."""
        return Picture(file, f"{caption} Drawn by `{report_command(self.asked)}` at commit {commit()}.")

    def path(self, file: str) -> Path:
        return self.asked.report_folder / file


def write_report(asked: Asked, plan: Plan, data: Data) -> Path:
    """Returns the page."""
    reporter = Reporter(asked, plan, data)
    folder = asked.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    makers = (_budgets, _controls, _curves, _matrix, _adaptive, _learning, _costs)
    sections = [_summary(reporter), *(Section(*made) for maker in makers for made in maker(reporter))]
    whole = Page(asked.study.title, asked.study.question, [*sections, _making(reporter)])
    replace_file(folder / "study.yaml", to_yaml(asked).encode())
    replace_file(folder / "data.csv", to_csv(data.rows).encode())
    replace_file(folder / "report.md", page.to_markdown(whole).encode())
    replace_file(folder / "index.html", page.to_html(whole).encode())
    return folder / "index.html"


Made = Iterator[tuple[str, list[Part]]]


def _summary(r: Reporter) -> Section:
    study = r.asked.study
    parts: list[Part] = []
    if r.data.missing and study.trains:
        done = len(r.plan.trials) - len(r.data.missing)
        parts.append(Text(f"Not finished: {done} of {len(r.plan.trials)} runs are done."))
    found = verdict.sentences(r.data, study.metric, study.budgets, r.axes)
    parts += [Points(found, is_verdict=True)] if found else []
    parts += [Text(paragraph.strip()) for paragraph in study.notes.split("\n\n") if paragraph.strip()]
    return Section("", parts)


def _budgets(r: Reporter) -> Made:
    """The main metric and the loss over N, at every budget; then as tables."""
    study = r.asked.study
    if not study.trains:
        return
    lines = "arm" if len(study.arms) > 1 else r.axes[0] if r.axes else "difficulty"
    parts: list[Part] = []
    for metric, chance in ((study.metric, study.chance), ("loss", None)):
        curve = Curve(f"{words.metric(metric)}, over N", metric, lines=lines)
        if len(values_of(rows_of(r.data, curve), NUM_PASSES)) > 1:
            file = f"{metric}_over_passes.svg"
            figures.draw_curve(rows_of(r.data, curve), curve, r.data.difficulty_name, chance, r.path(file))
            parts.append(r.picture(file, f"{_capital(metric)} by N in training and evaluation."))
    tables = [_table(r, cell) for cell in verdict.cells(r.data, study.metric, r.axes)]
    if parts:
        yield "Over N, by budget", [Text(READING), *parts, Text(_BUDGET_TEXT), *tables]


_BUDGET_TEXT = (
    "Equal tokens: every N makes the same optimizer steps. Equal training FLOPs: every N trains for the "
    "FLOPs that the largest N has there, on a learning-rate schedule as long; equal wall-clock: for "
    "its time, by steps timed on this machine (where both come to the same number of steps within 5 %, one "
    "run serves both)."
)


def _table(r: Reporter, cell: dict[str, Any]) -> Table:
    """Every N at every budget, at one place of the grid."""
    study, rows = r.asked.study, []
    for budget in study.budgets:
        for number, one in enumerate(verdict.against_one(r.data, study.metric, cell, budget)):
            named = words.BUDGETS[budget] if number == 0 else ""
            rows.append([named, str(one.num_passes), str(one.steps), str(one.value), *_gain(one.paired)])
    where = verdict.place(cell, r.data.difficulty_name, r.axes)
    headings = ["", "N", "steps", "value", "gain over N = 1", "seeds ahead", "p"]
    return Table(headings, rows, f"{_capital(study.metric)}{where}; {len(study.seeds)} seeds.")


def _gain(compared: Paired | None) -> list[str]:
    if compared is None:
        return ["", "", ""]
    sign = "+" if compared.gain.mean >= 0 else ""
    ahead = f"{compared.seeds_ahead} of {compared.gain.num_seeds}"
    return [f"{sign}{compared.gain}", ahead, words.probability(compared.p)]


def _capital(metric: str) -> str:
    name = words.metric(metric)
    return name[0].upper() + name[1:]


def _controls(r: Reporter) -> Made:
    """Every control beside the largest N, with all of its rows in a table."""
    study = r.asked.study
    parts: list[Part] = []
    for number, cell in enumerate(verdict.cells(r.data, study.metric, r.axes)):
        found = verdict.controls(r.data, study.metric, cell)
        if not found or cell["arm"] != next(iter(study.arms)):  # they stand beside the first one
            continue
        names, values = _with_asleep(r, cell)
        names += [words.TITLES[name].partition(":")[0] for name, *_ in found]
        where = verdict.place(cell, r.data.difficulty_name, r.axes)
        file = f"controls_{number}.svg"
        values += [value for _, value, *_ in found]
        figures.draw_controls(names, values, study.metric, r.path(file))
        parts.append(r.picture(file, f"{_capital(study.metric)}{where}."))
        rows = [
            [
                words.TITLES[name],
                words.number(row["num_steps"]),
                words.number(row["parameters"]),
                words.number(row["state_bytes"]),
                str(value),
                *_gain(compared),
            ]
            for name, value, row, compared in found
        ]
        headings = ["control", "steps", "parameters", "state B", "value", "gain", "seeds ahead", "p"]
        parts.append(Table(headings, rows, f"Controls{where}. Gain: of the largest N over the control."))
    if parts:
        text = (
            "Each control trains for the FLOPs of the largest N, but sees no more tokens than N = 1 trained "
            "for these FLOPs."
        )
        yield "What else the compute could buy", [Text(text), *parts]


def _with_asleep(r: Reporter, cell: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """The study's own N at equal FLOPs, for the figure of the controls."""
    budget = "flops" if "flops" in r.asked.study.budgets else r.asked.study.budgets[0]
    found = verdict.against_one(r.data, r.asked.study.metric, cell, budget)
    return [f"N = {one.num_passes}" for one in found], [one.value for one in found]


def _curves(r: Reporter) -> Made:
    """The figures that the study itself names."""
    for number, curve in enumerate(r.asked.study.curves):
        metric = curve.metric or r.asked.study.metric
        chance = r.asked.study.chance if metric == r.asked.study.metric else None
        rows = rows_of(r.data, replace(curve, metric=metric))
        file = f"curve_{number}.svg"
        if figures.draw_curve(rows, curve, r.data.difficulty_name, chance, r.path(file)):
            across = words.column(curve.x, r.data.difficulty_name)
            picture = r.picture(file, f"{_capital(metric)} against {across}.")
            yield curve.title, [picture, *([Text(curve.note)] if curve.note else [])]


def rows_of(data: Data, curve: Curve) -> list[Row]:
    """Those that a curve shows: of the grid, evaluated as trained unless that is what is varied."""
    rows = data.select({"metric": curve.metric, "role": "grid"} | curve.only)
    if not {"eval_passes", "passes", "stop"} & {curve.x, curve.lines, curve.panels, *curve.only}:
        rows = [row for row in rows if row["as_trained"]]
    is_cost = curve.only.get("budget") == COST
    return [row for row in rows if (row["budget"] == COST) == is_cost]


def _matrix(r: Reporter) -> Made:
    """On equal tokens, a figure for each arm."""
    study, parts = r.asked.study, list[Part]()
    for number, arm in enumerate(study.arms):
        shown = {"metric": study.metric, "role": "grid", "arm": arm, "budget": study.budgets[0], "stop": ""}
        rows = r.data.select(shown)
        file = f"matrix_{number}.svg"
        if figures.draw_matrix(rows, r.data.difficulty_name, study.metric, r.path(file)):
            budget = words.BUDGETS[study.budgets[0]]
            caption = f"{_capital(study.metric)}, {budget}, mean over seeds; bold: as trained."
            parts.append(r.picture(file, f"{caption} {arm}".strip()))
    if parts:
        yield "N in training against N in evaluation", parts


def _adaptive(r: Reporter) -> Made:
    """Accuracy against the passes that sequences make when each stops by itself, beside fixed N: of the
    models with the largest N."""
    study = r.asked.study
    rows = r.data.select({"metric": study.metric, "role": "grid", "budget": study.budgets[0]})
    if not any(row["stop"] for row in rows):
        return
    most = max(row[NUM_PASSES] for row in rows)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row[NUM_PASSES] == most and row["eval_passes"] <= most:
            kind = _KINDS[row["stop"].partition(" ")[0]]
            lines.setdefault(", ".join(part for part in (row["arm"], kind) if part), []).append(row)
    title = f"Trained with N = {most}"
    figures.draw_passes_made(lines, r.data.difficulty_name, r.path("adaptive.svg"), title)
    parts: list[Part] = [Text(_ADAPTIVE), r.picture("adaptive.svg", _ADAPTIVE_CAPTION)]
    headings = ["model", "stops", "passes", "value"]
    for difficulty in sorted({row["difficulty"] for row in rows}):
        where = words.value("difficulty", difficulty, r.data.difficulty_name)
        table = list(_stops(lines, difficulty))
        parts.append(Table(headings, table, f"{_capital(study.metric)} at {where}."))
    yield "Passes only as long as they help", parts


def _stops(lines: dict[str, list[Row]], difficulty: Any) -> Iterator[list[str]]:
    """A row of the table for each N and each rule of each line."""
    for label, rows in lines.items():
        for (stop, num_passes), of_one in by_way(rows, difficulty).items():
            passes, value = (estimate([row[key] for row in of_one]) for key in ("passes", "value"))
            yield [label, stop or f"after N = {num_passes}", f"{passes.mean:.2f}", str(value)]


_KINDS = {"": "fixed N", "tolerance": "until the state settles", "threshold": "learned halting"}
_ADAPTIVE = (
    "Each sequence sleeps until a pass changes its fast weights by less than a tolerance, or until the "
    "halting that it has learned reaches a threshold; the N of the training is the most. Beside it the same "
    "models with a fixed N."
)
_ADAPTIVE_CAPTION = (
    "The metric against the mean number of passes over a window; a point for each tolerance or N."
)


def _learning(r: Reporter) -> Made:
    """Of the first place of the grid."""
    study = r.asked.study
    for cell in verdict.cells(r.data, study.metric, r.axes)[-1:]:
        rows = verdict.trained_rows(r.data, study.metric, cell)
        points = list({row["trial"]: row for row in rows if row["budget"] in ("tokens", "flops")}.values())
        if figures.draw_learning_curves(r.data, points, study.metric, r.path("learning_curves.svg")):
            where = verdict.place(cell, r.data.difficulty_name, r.axes)
            caption = f"Runs at equal tokens and at equal FLOPs{where}; held-out: the validation split."
            yield "Learning curves", [r.picture("learning_curves.svg", caption)]


def _costs(r: Reporter) -> Made:
    """Time, memory and state against the formula."""
    rows = r.data.select({"budget": COST})
    if not rows:
        return
    parts: list[Part] = []
    of_cost = [axis for axis in r.axes if not axis.startswith("task.")]
    panels = "arm" if len(r.asked.study.arms) > 1 else of_cost[0] if of_cost else ""
    names = ("flops_ratio", "seconds_ratio")
    ratios = [row for row in rows if row["role"] == "grid" and row["metric"] in names]
    title = "R(N): cost of a step against N = 1, by the formula and by the clock"
    if len(values_of(ratios, NUM_PASSES)) > 1:
        curve = Curve(title, lines="metric", panels=panels)
        figures.draw_curve(ratios, curve, "", None, r.path("ratio.svg"))
        parts.append(
            r.picture("ratio.svg", "Training FLOPs and measured seconds of a step, over those of N = 1.")
        )
    parts.append(_cost_table(rows, of_cost))
    text = (
        "A step of each model, timed in a process of its own, median over rounds in turn. Memory is the peak "
        "beyond what the process holds before the first step. FLOPs count the products of matrices of the "
        "visits that are run, forward and backward."
    )
    yield "What it costs", [Text(text), *parts]


def _cost_table(rows: list[Row], axes: list[str]) -> Table:
    names = (
        "step_seconds",
        "tokens_per_second",
        "seconds_ratio",
        "flops_ratio",
        "memory_mib",
        "state_bytes",
        "parameters",
    )
    places: dict[str, dict[str, Any]] = {}
    for row in rows:
        parts = [
            words.value("arm", row["arm"]) if row["arm"] else "",
            words.value(NUM_PASSES, row[NUM_PASSES]),
        ]
        parts += [
            words.value(axis, row[axis]) for axis in axes if axis in row and not axis.startswith("task.")
        ]
        places.setdefault(", ".join(part for part in parts if part), {})[row["metric"]] = row["value"]
    table = [
        [place, *(words.number(found[name]) if name in found else "" for name in names)]
        for place, found in places.items()
    ]
    headings = [
        "model",
        "s/step",
        "tokens/s",
        "time / N = 1",
        "FLOPs / N = 1",
        "peak MiB",
        "state B",
        "parameters",
    ]
    return Table(headings, table, "Costs of a training step.")


def _making(r: Reporter) -> Section:
    """Who wants to make it again finds all that is needed."""
    study, trials = r.asked.study, r.plan.trials
    seconds = {row["trial"]: row["train_seconds"] for row in r.data.rows if row["trial"]}
    runs = (
        f"{len(trials)} runs, {len(trials) - len(r.data.missing)} of them done, "
        f"{words.duration(sum(seconds.values()))} of training in all; seeds "
        f"{', '.join(map(str, study.seeds))}."
    )
    facts = [
        runs if study.trains else "Steps were timed; nothing was trained.",
        f"Commit {commit()}; torch {torch.__version__}; {machine()}.",
        "data.csv holds every value that a figure or a table shows; what the study asks is in study.yaml.",
    ]
    return Section(
        "How this was made",
        [page.Command(r.asked.command), page.Command(report_command(r.asked)), Points(facts)],
    )


def report_command(asked: Asked) -> str:
    head, _, rest = asked.command.partition("sleeptrain.study ")
    return f"{head}sleeptrain.study report {rest}"


def machine() -> str:
    """Processor and its cores, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    processor = f"{len(os.sched_getaffinity(0))} cores of {next(named, platform.machine())}"
    return f"{torch.cuda.get_device_name()}, {processor}" if torch.cuda.is_available() else processor


@cache
def commit() -> str:
    """Of the code, where it is a checkout: before the report changes it."""
    command = ["git", "-C", str(CONFIGS), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
