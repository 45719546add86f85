"""Step time and goodput of a run on 8 to 16,384 GPUs, in closed form: nothing is trained, no GPU is needed.

``python tools/simulate.py`` takes a model of the paper's size (1.4 B parameters, windows of 2048 tokens) and
prints a table over numbers of GPUs, and one over N, the passes over a window. KEY=VALUE are settings of
sleeptrain.pretrain: ``python tools/simulate.py --gpus 8,64 experiment=depo_paper parallel.pipeline_size=2``.
With experiment=NAME they start from that experiment, otherwise from the 1.4 B model on 4 pipeline stages;
the replicas follow from the number of GPUs.

step: the FLOPs of the visits (sleeptrain/model/flops.py) at --gpu-tflops; the pipeline's bubble, (p - 1) /
  (m V + p - 1) with p stages, m microbatches, V visits; sums over tensor ranks and over replicas (ZeRO) at
  the speeds of tools/estimate.py, plus --hop-microseconds for each replica that a bucket passes. Messages
  hide behind nothing. Every replica has --replica-sequences, so that the batch grows with the GPUs.
goodput: the share of wall time whose work lasts. A job fails every --mtbf-gpu-hours / GPUs on average, and
  goes on from its last durable checkpoint after detecting, restarting, loading, and a slow first step. A
  save stalls the loop for a copy of the rank's share, and counts when it is written. Checkpoints come at the
  best interval (Young, Daly) unless --interval-seconds says otherwise.
--validate holds the formulas against what was measured in small runs (LOG.md) and against simulated kills.

Where every default comes from, measured, published or assumed, is in docs/scale.md: take ratios and trends,
not seconds. exit code: 0, or 2 where a setting is wrong.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import estimate
from cluster_costs import Cluster, Point, Step, point, with_passes

from sleeptrain.config import Config
from sleeptrain.model.flops import count_parameters, training_flops
from sleeptrain.model.visits import plan
from sleeptrain.pretrain import compose_config
from sleeptrain.schema import ConfigError

MOST_GPUS = 131_072
GPUS = (8, 64, 512, 1024, 4096, 9600, 16384)
PASSES = (1, 2, 4, 8)
# The widths of Ouro 1.4B; six of its 24 mixers are Jet blocks. The vocabulary is rounded up to Ouro's.
PAPER_MODEL = (
    *("experiment=text_small", "model.d_model=2048", "model.pattern='attn attn attn jet'"),
    *("model.pattern_repeats=6", "model.num_heads=16", "model.mlp_dim=5632", "model.memory_heads=8"),
    *("model.memory_key_dim=128", "model.memory_value_dim=256", "model.vocab_multiple=49152"),
    *("task.sequence_tokens=12288", "sleep.window_tokens=2048", "sleep.num_passes=4"),
    *("sleep.activation_checkpointing=pass", "data.micro_batch_sequences=1", "parallel=pp4"),
)


class Parser(argparse.ArgumentParser):
    """Bad options get the sentence that bad settings get."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    try:
        options = parse(arguments)
        if options.validate:
            from simulate_report import validation

            print(validation())
            return 0
        config = compose(options.settings)
        run, cluster = estimate.describe(config), cluster_of(options)
        at = partial(point, run, options.replica_sequences, options.interval_seconds, cluster)
        over_gpus = [at(config, gpus) for gpus in options.gpus]
        over_n = [at(with_passes(config, n), options.gpus[-1]) for n in options.num_passes]
        print("\n\n".join([heading(config, run), gpus_table(over_gpus), passes_table(config, run, over_n)]))
        if options.figure:
            from simulate_report import draw

            print(f"figure: {draw(options.figure, over_gpus, over_n)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --figure cannot be written: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser(description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shown = parser.add_argument, "(default %(default)s)"
    add("--gpus", type=counts(MOST_GPUS), default=GPUS, metavar="N,N", help=f"numbers of GPUs {shown}")
    add(
        "--num-passes",
        type=counts(64),
        default=PASSES,
        metavar="N,N",
        help=f"values of N in the second table {shown}",
    )
    add(
        "--replica-sequences",
        type=count,
        default=4,
        metavar="N",
        help=f"sequences of a step on each replica {shown}",
    )
    add("--gpu-tflops", type=positive, default=estimate.FLOPS_PER_SECOND / 1e12, help=f"as they run {shown}")
    add("--hop-microseconds", type=amount, default=5.0, help=f"latency of a hop between replicas {shown}")
    add(
        "--mtbf-gpu-hours",
        type=positive_or_inf,
        default=Cluster().mtbf_gpu_hours,
        help="GPU-hours per failure; inf: none (default %(default).0f, Llama 3)",
    )
    add("--interval-seconds", type=positive, help="training between two saves (default the best)")
    add("--checkpoint-seconds", type=amount, help="stall of a save (default: overhead + copy of the share)")
    add("--copy-gb-per-second", type=positive, default=20.0, help=f"of a GPU to its host {shown}")
    add("--storage-gb-per-second", type=positive, default=0.12, help=f"for each GPU {shown}")
    for part, help_text in (
        ("save_overhead", "of a save beside the copy"),
        ("detect", "from a failure until it is noticed"),
        ("restart", "until all processes are there again"),
        ("first_step", "the first step takes longer"),
    ):
        name = f"{part}_seconds"
        option = "--" + name.replace("_", "-")
        add(option, type=amount, default=getattr(Cluster(), name), help=f"{help_text} {shown}")
    add("--load-seconds", type=amount, help="loading a checkpoint (default: its bytes)")
    add("--figure", type=Path, metavar="PATH", help="draw PATH.svg and PATH.png")
    add("--validate", action="store_true", help="hold the formulas against measurements, and stop")
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of sleeptrain.pretrain")
    return parser.parse_intermixed_args(arguments)


def counts(most: int) -> Callable[[str], tuple[int, ...]]:
    """Parses ``8,64``: whole numbers from 1 to ``most``, sorted."""

    def numbers(text: str) -> tuple[int, ...]:
        values = [int(word) if word.isdigit() else 0 for word in text.split(",")]
        if not all(1 <= value <= most for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers in 1..{most}, as in 8,64")
        return tuple(sorted(set(values)))

    return numbers


def count(text: str) -> int:
    [value, *more] = counts(2**20)(text)
    if more:
        raise argparse.ArgumentTypeError(f"{text!r} must be one number")
    return value


def amount(text: str) -> float:
    """At least 0, finite."""
    if not 0 <= number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 up")
    return float(text)


def positive(text: str) -> float:
    """Above 0, finite."""
    if not 0 < number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return float(text)


def positive_or_inf(text: str) -> float:
    return math.inf if text == "inf" else positive(text)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def compose(settings: Sequence[str]) -> Config:
    """The paper's model, unless another is chosen, with these settings; raises ConfigError."""
    given = {setting.split("=")[0] for setting in settings}
    base: list[str] = []
    if not given & {"experiment", "model", "task"}:
        base = [default for default in PAPER_MODEL if default.split("=")[0] not in given]
    config = compose_config([*base, *settings])
    return replace(config, parallel=replace(config.parallel, data_size=None))  # as many as the GPUs allow


def cluster_of(options: argparse.Namespace) -> Cluster:
    given = {f.name: getattr(options, f.name) for f in fields(Cluster) if hasattr(options, f.name)}
    return Cluster(
        **given,
        flops_per_second=1e12 * options.gpu_tflops,
        hop_seconds=options.hop_microseconds / 1e6,
        copy_bytes_per_second=1e9 * options.copy_gb_per_second,
        storage_bytes_per_second=1e9 * options.storage_gb_per_second,
    )


def heading(config: Config, run: estimate.Run) -> str:
    parts = count_parameters(config.model, config.sleep, run.vocab_size)
    parallel = config.parallel
    degrees = f"tensor {parallel.tensor_size} x pipeline {parallel.pipeline_size} x data the rest"
    return (
        f"{sum(parts) / 1e9:.3g} B parameters; {run.sequence_tokens} tokens in {len(run.windows)} windows; "
        f"{degrees}, ZeRO {parallel.zero_stage}\n"
        "computed from assumed speeds, not measured: docs/scale.md"
    )


def gpus_table(points: Sequence[Point]) -> str:
    rows = [
        [
            "GPUs",
            "GiB",
            "step",
            "compute",
            "bubble",
            "tensor",
            "data",
            "MTBF",
            "stall",
            "recovery",
            "interval",
            "goodput",
            "tokens/s",
        ],
        ["", "", "s", "%", "%", "%", "%", "h", "s", "s", "s (steps)", "%", "that last"],
    ]
    for p in points:
        rows.append(
            [str(p.gpus), f"{p.step.rank_bytes / 2**30:.1f}", f"{p.step.seconds:.3g}", *shares(p.step)]
        )
        rows[-1] += [f"{p.faults.mtbf / 3600:.3g}", f"{p.faults.stall:.2f}", f"{p.faults.recovery:.0f}"]
        rows[-1] += [interval_of(p), f"{100 * p.goodput:.2f}", f"{p.tokens_per_second:.3g}"]
    return f"over GPUs, N = {points[0].num_passes}\n" + aligned(rows)


def passes_table(config: Config, run: estimate.Run, points: Sequence[Point]) -> str:
    """``step / R(N)``: the seconds of a step, in units of those at the first N, over the same ratio of model
    FLOPs; below 1 where more passes cost less than their FLOPs."""
    rows = [
        [
            "N",
            "visits",
            "R(N)",
            "step",
            "step / R(N)",
            "compute",
            "bubble",
            "tensor",
            "data",
            "interval",
            "goodput",
        ],
        ["", "", "", "s", f"N = {points[0].num_passes}: 1", "%", "%", "%", "%", "s (steps)", "%"],
    ]
    first = points[0]
    for p in points:
        ratio = model_flops(config, run, p.num_passes) / model_flops(config, run, first.num_passes)
        price = p.step.seconds / first.step.seconds / ratio
        r_of_n = model_flops(config, run, p.num_passes) / model_flops(config, run, 1)
        rows.append(
            [
                str(p.num_passes),
                str(p.step.num_visits),
                f"{r_of_n:.2f}",
                f"{p.step.seconds:.3g}",
                f"{price:.3f}",
            ]
        )
        rows[-1] += [*shares(p.step), interval_of(p), f"{100 * p.goodput:.2f}"]
    return f"over N, {first.gpus} GPUs\n" + aligned(rows)


def model_flops(config: Config, run: estimate.Run, num_passes: int) -> float:
    visits = plan(run.windows, num_passes, config.model, config.sleep)
    return training_flops(config.model, config.sleep, run.windows, visits, run.vocab_size).model


def shares(step: Step) -> list[str]:
    """Of a step, in %."""
    parts = (step.compute_seconds, step.bubble_seconds, step.tensor_seconds, step.data_seconds)
    return [f"{100 * part / step.seconds:.1f}" for part in parts]


def interval_of(p: Point) -> str:
    return "never" if math.isinf(p.interval) else f"{p.interval:.0f} ({p.interval / p.step.seconds:.0f})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(["", *(x.rjust(w) for x, w in zip(row, widths))]) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
