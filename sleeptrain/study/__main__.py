"""Entry point: scaling studies over N. ``python -m sleeptrain.study study=rule110_n``

Without a verb: plan, run and report. Every verb may be given again at any time: what is done is not done
twice.
"""

import sys
import textwrap

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.cluster.launch import EXIT_FAILED
from sleeptrain.engine.plan_report import human
from sleeptrain.engine.resilience import EXIT_CONFIG, EXIT_REQUEUE
from sleeptrain.schema import ConfigError, RunError, describe
from sleeptrain.study import run, status, timing, words
from sleeptrain.study.collect import collect, to_csv
from sleeptrain.study.cost import cost_of
from sleeptrain.study.plan import Plan, plan, shape_id, shapes
from sleeptrain.study.report import write_report
from sleeptrain.study.spec import Asked, Execution, Study, ask, names, to_yaml

USAGE = """\
usage: python -m sleeptrain.study [VERB] study=NAME [study.scale=SCALE] [study.KEY=VALUE ...] [KEY=VALUE ...]

Trains a grid of models over N (and whatever else), compares them at equal budgets, and reports.

  plan      the runs, their FLOPs, hours and disk: before anything is trained
  run       makes those that are not done; the same command again goes on
  status    how far they are (study.watch=true: until all are done)
  collect   writes data.csv of what there is
  report    index.html, report.md, figures and data
            without a verb: plan, run and report

  python -m sleeptrain.study study=rule110_n study.scale=cpu_minutes
  python -m sleeptrain.study plan study=rule110_n study.scale=paper
  python -m sleeptrain.study run study=depo_n study.where=ray study.dir=/shared/depo
  sbatch --array=1-8 launchers/study.sbatch study=rule110_n study.scale=gpu_hours study.dir=/shared/r110

KEY=VALUE is a setting of every run (python -m sleeptrain.pretrain --help).
"""
VERBS = ("plan", "run", "status", "collect", "report")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a setting is wrong, 75 stopped by a signal and saved, 1 a run
    failed."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    verb = arguments[0] if arguments[0] in VERBS else ""
    try:
        asked = ask(arguments[1:] if verb else arguments)
        return carry_out(verb, asked)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def carry_out(verb: str, asked: Asked) -> int:
    timings = timing.measure(asked.folder, shapes(asked.study))
    planned = plan(asked, lambda config: timings[shape_id(config)].step_seconds)
    replace_file(asked.folder / "study.yaml", to_yaml(asked).encode())
    code = 0
    if verb in ("", "plan"):
        print(describe_plan(asked, planned, timings))
    if verb in ("", "run") and asked.study.trains:
        code = make_runs(asked, planned)
    if verb == "status":
        status.show(asked, planned)
    if verb == "collect":
        replace_file(asked.folder / "data.csv", to_csv(collect(asked, planned, timings).rows).encode())
        print(f"wrote {asked.folder / 'data.csv'}")
    if verb == "report" or (verb == "" and code == 0):
        print(f"wrote {write_report(asked, planned, collect(asked, planned, timings))}")
    return code


def make_runs(asked: Asked, planned: Plan) -> int:
    """The exit code."""
    outcome = run.run(asked, planned.trials)
    for name, why in outcome.failed.items():
        print(f"error: run {name} failed: {why or 'see its output.log'}", file=sys.stderr)
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} runs are being made by other processes; see the verb status")
    if outcome.is_stopped:
        print("stopped; the same command goes on")
        return EXIT_REQUEUE
    return EXIT_FAILED if outcome.failed else 0


def describe_plan(asked: Asked, planned: Plan, timings: dict[str, timing.Timing]) -> str:
    """What there is to be made, and what it takes here."""
    costs = {name: cost_of(config) for name, config in planned.trials.items()}
    seconds = {
        name: config.optim.num_steps * timings[shape_id(config)].step_seconds
        for name, config in planned.trials.items()
    }
    left = [name for name, config in planned.trials.items() if not run.is_done(asked, name, config)]
    slots = run.slots_of(asked, planned.trials) if asked.execution.where == "local" else 1
    lines = [
        f"study {asked.name}{f', scale {asked.scale}' if asked.scale else ''}: {asked.study.title}",
        *textwrap.wrap(asked.study.question, 100, initial_indent="  ", subsequent_indent="  "),
    ]
    if asked.study.trains:
        lines += [
            f"  runs      {len(costs)}, for {len(planned.points)} points of comparison; {len(left)} are left",
            f"  compute   {human(sum(c.flops for c in costs.values()))} FLOP of training, "
            f"{human(sum(c.tokens for c in costs.values()))} tokens",
            f"  time      {words.duration(sum(seconds[name] for name in left) / slots)}, as steps were timed "
            f"here, with {slots} runs at a time; evaluation is not counted",
            f"  disk      {human(sum(c.disk_bytes for c in costs.values()))}B of checkpoints",
        ]
    return "\n".join([*lines, f"  folder    {asked.folder}", ""])


def help_text() -> str:
    lines = [USAGE, f"studies: {', '.join(names())}", "", "settings (study.KEY=VALUE):"]
    lines.append(f"  {'study.scale=':<36} the size, of those that the study offers (configs/study/NAME.yaml)")
    for cls in (Execution, Study):
        for name, default, text in describe(cls):
            lines.append(
                textwrap.fill(
                    text,
                    100,
                    initial_indent=f"  {f'study.{name}={default}':<36} ",
                    subsequent_indent=" " * 39,
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
