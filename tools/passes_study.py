"""What N does: the same data order with N = 1, 2, 3, 4 over several seeds, at equal steps and at equal FLOPs.

``python tools/passes_study.py --out runs/passes --width 8 --steps-automaton 8`` trains each run in a process
of its own (finished ones are skipped, so the same command goes on), scores it on held-out and on training
strings, and writes ``results.json``, ``table.md`` and ``accuracy.svg``. Equal FLOPs: N = 1 is also trained
R(N) times as long, on its own learning-rate schedule. R(N) is the ratio of training FLOPs by
``sleeptrain.model.flops``. A gain is the difference between two runs of one seed: N passes less N = 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from sleeptrain.model.flops import pass_ratio
from sleeptrain.model.visits import cut
from sleeptrain.pretrain import compose_config


class Run(NamedTuple):
    """N passes for a number of optimizer steps; ``matches`` is the N whose FLOPs a longer N = 1 run has."""

    num_passes: int
    num_steps: int
    matches: int
    seed: int

    @property
    def name(self) -> str:
        return f"n{self.num_passes}_steps{self.num_steps}_seed{self.seed}"


def main() -> None:
    args = parse_arguments()
    shared = [
        *("experiment=quickstart", f"task.width={args.width}", f"task.steps={args.steps_automaton}"),
        *(f"task.num_strings={args.strings}", f"sleep.window_tokens={args.width}", "eval.num_passes=[]"),
        *("eval.every_steps=0", "checkpoint.keep_last=1", "run.num_threads=1", *args.settings),
    ]
    runs = plan_runs(shared, args.passes, args.steps, args.seeds)
    with ThreadPoolExecutor(args.workers) as pool:
        scored = list(
            tqdm(pool.map(lambda run: score(run, shared, args.out), runs), total=len(runs), unit="run")
        )
    results = [{**run._asdict(), **scores} for run, scores in zip(runs, scored)]
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    table = as_table(results)
    (args.out / "table.md").write_text(table)
    problem = f"Rule 110, {args.strings} strings of {args.width} bits, t = {args.steps_automaton}"
    draw(results, args.out / "accuracy.svg", f"{problem}; {args.steps} steps", chance=0.5**args.strings)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the results")
    parser.add_argument("--width", type=int, default=8, help="bits of a string (default %(default)s)")
    parser.add_argument(
        "--steps-automaton", type=int, default=8, help="t, the difficulty (default %(default)s)"
    )
    parser.add_argument("--strings", type=int, default=2, help="strings of an example (default %(default)s)")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 4], help="values of N")
    parser.add_argument(
        "--steps", type=int, default=400, help="optimizer steps at equal steps (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0..this-1 (default %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each"
    )
    parser.add_argument("settings", nargs="*", help="further KEY=VALUE for sleeptrain.pretrain")
    return parser.parse_args()


def plan_runs(shared: list[str], passes: list[int], num_steps: int, num_seeds: int) -> list[Run]:
    """Equal steps for every N, and N = 1 for the steps that have the FLOPs of each larger N; cheap seeds
    first."""
    config = compose_config(shared)
    task = config.task
    windows_with_loss = [False] * task.num_strings + [True]  # type: ignore[union-attr]
    windows = cut(task.sequence_tokens, config.sleep.window_tokens, windows_with_loss)
    vocab_size = 2 + task.num_strings  # type: ignore[union-attr]
    runs = []
    for seed in range(num_seeds):
        runs += [Run(n, num_steps, n, seed) for n in passes]
        for n in passes:
            ratio = pass_ratio(config.model, config.sleep, windows, vocab_size, n)
            if n > 1:
                runs.append(Run(1, round(ratio * num_steps), n, seed))
    return runs


def score(run: Run, shared: list[str], out: Path) -> dict[str, float]:
    """Trains the run to its end, and returns exact accuracy on held-out and on training strings; what is
    there already is not done again."""
    folder = out / run.name
    settings = [
        *(f"sleep.num_passes={run.num_passes}", f"optim.num_steps={run.num_steps}", f"run.seed={run.seed}"),
        *(f"run.dir={folder}", f"run.id={run.name}"),
    ]
    files = {s: folder / "eval" / f"step_{run.num_steps:08d}_{s}.json" for s in ("test", "train")}
    commands = {file: ["evaluate", f"checkpoint={folder}", f"split={s}"] for s, file in files.items()}
    commands = {folder / "figures": ["pretrain", *shared, *settings]} | commands
    for result, (entry, *arguments) in commands.items():
        if not result.exists():
            command = [sys.executable, "-m", f"sleeptrain.{entry}", *arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    documents = {split: json.loads(file.read_text()) for split, file in files.items()}
    return {split: d["results"][0]["metrics"]["exact_accuracy"] for split, d in documents.items()}


def as_table(results: list[dict]) -> str:
    """Mean and standard deviation over seeds, for held-out strings and then for training strings; gains with
    their standard error and the number of seeds in which N passes were ahead."""

    def by_seed(split: str, num_passes: int, matches: int) -> list[float]:
        chosen = [r for r in results if (r["num_passes"], r["matches"]) == (num_passes, matches)]
        return [r[split] for r in sorted(chosen, key=lambda r: r["seed"])]

    lines = []
    for split, name in (("test", "held out"), ("train", "training strings")):
        lines += [
            f"| {name}: N | N passes | N = 1, equal steps: gain | N = 1, equal FLOPs | gain |",
            "|---|---|---|---|---|",
        ]
        for n in sorted({r["matches"] for r in results}):
            asleep, short, long = by_seed(split, n, n), by_seed(split, 1, 1), by_seed(split, 1, n)
            cells = [_spread(asleep), _gain(asleep, short), _spread(long), _gain(asleep, long)]
            lines.append(f"| {n} | {' | '.join(cells if n > 1 else [cells[0], '', '', ''])} |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def _gain(asleep: list[float], awake: list[float]) -> str:
    gains = [a - b for a, b in zip(asleep, awake, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    wins = sum(gain > 0 for gain in gains)
    return f"{statistics.mean(gains):+.3f} ± {error:.3f}, {wins} of {len(gains)}"


def draw(results: list[dict], path: Path, title: str, chance: float) -> None:
    """Exact accuracy against N, every seed a dot, their mean a line; held out left, training right."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, split, name in zip(axes, ("test", "train"), ("held-out strings", "training strings")):
        axis.axhline(chance, color="grey", linestyle=":", linewidth=1, label="guessing")
        for asleep, label, shift in (
            (True, "N passes, equal steps", -0.03),
            (False, "N = 1, trained longer: the FLOPs of N", 0.03),
        ):
            chosen = [r for r in results if (r["num_passes"] == r["matches"]) == asleep or r["matches"] == 1]
            points = {
                n: [r[split] for r in chosen if r["matches"] == n]
                for n in sorted({r["matches"] for r in chosen})
            }
            (line,) = axis.plot(list(points), [statistics.mean(v) for v in points.values()], label=label)
            for n, values in points.items():
                axis.plot([n + shift] * len(values), values, ".", color=line.get_color(), alpha=0.5)
        axis.set_xlabel("N, passes over a window")
        axis.set_xticks(sorted({r["matches"] for r in results}))
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact accuracy, all strings right")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path)


if __name__ == "__main__":
    main()
