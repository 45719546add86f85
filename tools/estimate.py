"""Will it fit, and how best to spread it? Memory per rank and a ranking of layouts, in closed form.

``python tools/estimate.py experiment=depo_paper gpus=8 gpu_gib=80`` lists the layouts of that run on 8 GPUs
that fit, the fastest first. With settings of ``parallel`` it says first whether that layout fits:
``python tools/estimate.py experiment=depo_paper gpus=8 gpu_gib=80 parallel=tp2_pp2_dp2``. Nothing is
allocated, and no GPU is needed.

arguments: gpus=NUMBER (1 to 4096; default 1), gpu_gib=MEMORY of each (default 80), and every setting of
``sleeptrain.pretrain`` (see its --help): experiment, model, sleep.num_passes, sleep.window_tokens, data, ...

memory: weights, gradients, DeepSpeed's copy, both optimizers' moments, the activations alive at the fullest
moment of the pipeline's schedule, messages, and room for the update (sleeptrain/parallel/rank_memory.py; a
test holds it against real stages). Activations count in float32; under bfloat16 autocast they are 10 to 25 %
smaller. One tenth of the GPU is left to CUDA and to fragmentation.

ranking: seconds of a step = compute / (1 - bubble) + messages.
  compute   on the fullest stage: FLOPs as they run, at 40 % of 989 TFLOP/s, but no less than 1.5 ms for each
            block in each visit of each microbatch, which is what launching its kernels takes
  bubble    (p - 1) / (m V + p - 1) with p stages, m microbatches and V visits
  messages  sums over the tensor ranks, which stay within a node of 8, at 300 GB/s; sums over the replicas,
            once a step (ZeRO 3 gathers weights in each microbatch, too), at 40 GB/s a GPU outside a node
The constants are assumptions about one kind of machine: take the order, not the seconds.

exit code: 0 it fits (or something does), 1 it does not, 2 a setting is wrong.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from sleeptrain.config import Config, DataConfig, ParallelConfig
from sleeptrain.data.stream import TrainStream
from sleeptrain.engine.plan_report import rank_table
from sleeptrain.model.flops import FLOAT32_BYTES, training_flops
from sleeptrain.model.visits import Window, cut, plan
from sleeptrain.parallel.check import check_degrees
from sleeptrain.parallel.layout import check_tensor_size, model_of_rank, visits_of_stage
from sleeptrain.parallel.rank_memory import RankBytes, rank_bytes
from sleeptrain.parallel.rows import micro_batch_of
from sleeptrain.pretrain import compose_config, with_tokenizer_or_bytes
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

NODE = 8  # GPUs that are joined by fast links
MOST_GPUS = 4096
USABLE = 0.9
FLOPS_PER_SECOND = 0.4 * 989e12
BLOCK_SECONDS = 1.5e-3  # least time of a block, forward and backward
NEAR_BYTES_PER_SECOND, FAR_BYTES_PER_SECOND = 300e9, 40e9
POLICIES: tuple[Literal["none", "pass", "block", "both"], ...] = ("none", "pass", "block", "both")
NUM_SHOWN = 8


class Run(NamedTuple):
    """What does not depend on the layout."""

    vocab_size: int
    sequence_tokens: int
    windows: list[Window]


class Candidate(NamedTuple):
    """A layout, its fullest rank, and what a step costs by the model above."""

    config: Config
    replicas: int
    num_micro: int
    memory: RankBytes
    bubble: float
    seconds: float


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        gpus, gpu_gib, settings = own_arguments(arguments)
        config = with_tokenizer_or_bytes(compose_config(settings))
        run = describe(config)
        room = int(USABLE * gpu_gib * 2**30)
        fits = True
        if any(s.split("=")[0].split(".")[0].lstrip("+~") == "parallel" for s in settings):
            fits = answer(config, run, gpus, gpu_gib, room)
        found = propose(config, run, gpus, room)
        if found:
            print(proposals(found, gpus, gpu_gib))
        return 0 if fits and found else 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def own_arguments(arguments: list[str]) -> tuple[int, float, list[str]]:
    """Number of GPUs, GiB of each, and the settings of the run."""
    own, settings = {"gpus": "1", "gpu_gib": "80"}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            settings.append(argument)
    if not own["gpus"].isdigit() or not 1 <= int(own["gpus"]) <= MOST_GPUS:
        raise ConfigError(f"gpus={own['gpus']} must be a whole number in 1..{MOST_GPUS}")
    try:
        gib = float(own["gpu_gib"])
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise ConfigError(f"gpu_gib={own['gpu_gib']} must be a number above 0, as in gpu_gib=80")
    return int(own["gpus"]), gib, settings


def describe(config: Config) -> Run:
    task = make_task(config.task)
    stream = TrainStream(task, config.run.seed, config.data.batch_sequences, config.sleep.window_tokens)
    has_loss = stream.batch(0).windows_with_loss
    windows = cut(task.sequence_tokens, config.sleep.window_tokens, has_loss)
    return Run(config.model.rounded_vocab(task.vocab_size), task.sequence_tokens, windows)


def answer(config: Config, run: Run, gpus: int, gpu_gib: float, room: int) -> bool:
    """Prints what each stage of the layout asked for needs, and whether it fits."""
    replicas = check_degrees(config, run.vocab_size, run.sequence_tokens, gpus)
    print("\n".join(rank_table(config, run.vocab_size, run.windows, replicas)))
    candidate = judge(config, run, replicas)
    verdict = "it fits" if candidate.memory.total <= room else "it does not fit"
    needed = f"{candidate.memory.total / 2**30:.1f} GiB on the fullest rank"
    print(f"  {verdict}: {needed}, {room / 2**30:.1f} usable of {gpu_gib:g} GiB\n")
    return candidate.memory.total <= room


def propose(config: Config, run: Run, gpus: int, room: int) -> list[Candidate]:
    """The layouts that fit, the fastest first; of equal degrees the fastest ZeRO stage, microbatch and policy
    alone. ConfigError where no layout uses all GPUs."""
    best: dict[tuple[int, int], Candidate] = {}
    least: Candidate | None = None
    for candidate in candidates(config, run, gpus):
        degrees = candidate.config.parallel
        key = degrees.tensor_size, degrees.pipeline_size
        if least is None or candidate.memory.total < least.memory.total:
            least = candidate
        if candidate.memory.total <= room and (key not in best or candidate.seconds < best[key].seconds):
            best[key] = candidate
    if least is None:
        raise ConfigError(
            f"no layout spreads data.batch_sequences={config.data.batch_sequences} and this model over "
            f"gpus={gpus}: replicas must divide the batch, stages the looped blocks, tensor ranks (at most "
            f"{NODE}) the heads and the vocabulary; change gpus, the batch, or model.vocab_multiple"
        )
    if not best:
        print(
            f"nothing fits on {gpus} GPUs: {settings_of(least)} needs {least.memory.total / 2**30:.1f} GiB "
            f"a GPU, {room / 2**30:.1f} are usable; take more or larger GPUs, or a smaller model, window or N"
        )
    return sorted(best.values(), key=lambda candidate: candidate.seconds)


def candidates(config: Config, run: Run, gpus: int) -> Iterator[Candidate]:
    """Every layout that uses all GPUs and passes the checks of a run."""
    for tensor in divisors(min(gpus, NODE)) if gpus < NODE else (1, 2, 4, 8):
        if gpus % tensor or not splits(config, run, tensor):
            continue
        for pipeline in divisors(len(config.model.core_blocks)):
            replicas, rest = divmod(gpus, tensor * pipeline)
            if rest or not replicas or config.data.batch_sequences % replicas:
                continue
            yield from of_degrees(config, run, tensor, pipeline, replicas)


def of_degrees(config: Config, run: Run, tensor: int, pipeline: int, replicas: int) -> Iterator[Candidate]:
    """All ZeRO stages, microbatches and policies of given degrees."""
    rows = config.data.batch_sequences // replicas
    stages = [1] if replicas == 1 else [0, 1, 2] if pipeline > 1 else [0, 1, 2, 3]
    for micro in divisors(rows):
        if (rows // micro) % pipeline:
            continue
        for policy in POLICIES:
            for stage in stages:
                degrees = {"tensor_size": tensor, "pipeline_size": pipeline, "data_size": replicas}
                others = {"backend": "auto", "zero_stage": stage, "sequence_parallel": False}
                with suppress(ConfigError):  # settings that do not go with this layout
                    laid_out = replace(
                        config,
                        parallel=replace(config.parallel, **degrees, **others),
                        data=replace(config.data, micro_batch_sequences=micro),
                        sleep=replace(config.sleep, activation_checkpointing=policy),
                    )
                    yield judge(laid_out, run, replicas)


def splits(config: Config, run: Run, tensor: int) -> bool:
    try:
        check_tensor_size(config.model, run.vocab_size, tensor)
    except ConfigError:
        return False
    return True


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def judge(config: Config, run: Run, replicas: int) -> Candidate:
    """Memory of the fullest rank, and the cost of a step."""
    num_stages = config.parallel.pipeline_size
    of_stages = ranks_of_stages(config, run, replicas)
    rows = config.data.batch_sequences // replicas
    num_micro = rows // micro_batch_of(config, rows)
    num_visits = len(plan(run.windows, config.sleep.num_passes, config.model, config.sleep))
    bubble = (num_stages - 1) / (num_micro * num_visits + num_stages - 1)
    degrees = ParallelConfig(tensor_size=config.parallel.tensor_size, pipeline_size=num_stages)
    key = replace(config, data=DataConfig(), parallel=degrees)
    flops = max(stage_flops(key, run.vocab_size, tuple(run.windows), stage) for stage in range(num_stages))
    launching = BLOCK_SECONDS * num_visits * len(config.model.blocks) / num_stages
    compute = num_micro * max(rows / num_micro * flops / FLOPS_PER_SECOND, launching)
    gradients = max(rank.gradients for rank in of_stages)
    seconds = compute / (1 - bubble) + message_seconds(config, run, replicas, gradients)
    fullest = max(of_stages, key=lambda rank: rank.total)
    return Candidate(config, replicas, num_micro, fullest, bubble, seconds)


def ranks_of_stages(config: Config, run: Run, replicas: int) -> list[RankBytes]:
    """What a rank of each stage needs, in the first replica."""
    stages = range(config.parallel.pipeline_size)
    return [rank_bytes(config, run.vocab_size, run.windows, replicas, stage) for stage in stages]


@lru_cache(maxsize=1024)
def stage_flops(config: Config, vocab_size: int, windows: tuple[Window, ...], stage: int) -> float:
    """FLOPs of one sequence as they run on a rank of a stage, with what checkpointing computes again."""
    visits = [visit for visit in visits_of_stage(config, windows, stage) if visit is not None]
    part, of_rank = model_of_rank(config, stage), vocab_size // config.parallel.tensor_size
    return training_flops(part, config.sleep, windows, visits, of_rank).hardware


def message_seconds(config: Config, run: Run, replicas: int, gradients: int) -> float:
    """Sums over tensor ranks (two forward and two backward in a block, two more where it is computed again)
    and over replicas, of so many bytes of ``gradients``: what a rank sends at the speed of the links."""
    parallel, rows = config.parallel, config.data.batch_sequences // replicas
    tensor, seconds = parallel.tensor_size, 0.0
    if tensor > 1:
        visits = plan(run.windows, config.sleep.num_passes, config.model, config.sleep)
        tokens = sum(run.windows[v.window].stop - run.windows[v.window].start for v in visits)
        blocks = len(config.model.blocks) / parallel.pipeline_size
        sums = 4 if config.sleep.activation_checkpointing == "none" else 6
        sent = sums * tokens * blocks * FLOAT32_BYTES * config.model.d_model * rows
        seconds += 2 * (tensor - 1) / tensor * sent / NEAR_BYTES_PER_SECOND
    if replicas > 1:
        trips = {0: 2, 1: 3, 2: 3, 3: 1 + 2 * rows // micro_batch_of(config, rows)}[parallel.zero_stage]
        is_near = tensor * parallel.pipeline_size * replicas <= NODE
        speed = NEAR_BYTES_PER_SECOND if is_near else FAR_BYTES_PER_SECOND
        seconds += trips * (replicas - 1) / replicas * gradients / speed
    return seconds


def settings_of(candidate: Candidate) -> str:
    """As arguments of a run."""
    parallel, sleep = candidate.config.parallel, candidate.config.sleep
    return (
        f"parallel.tensor_size={parallel.tensor_size} parallel.pipeline_size={parallel.pipeline_size} "
        f"parallel.data_size={candidate.replicas} parallel.zero_stage={parallel.zero_stage} "
        f"data.micro_batch_sequences={candidate.config.data.micro_batch_sequences} "
        f"sleep.activation_checkpointing={sleep.activation_checkpointing}"
    )


def proposals(found: Sequence[Candidate], gpus: int, gpu_gib: float) -> str:
    """A line for each pair of tensor and pipeline degrees, and the settings of the first."""
    heading = ["tensor", "pipeline", "data", "ZeRO", "micro-batch", "microbatches", "checkpointing"]
    rows = [[*heading, "GiB", "bubble", "time"]]
    for c in found[:NUM_SHOWN]:
        parallel, micro = c.config.parallel, c.config.data.micro_batch_sequences
        sizes = (parallel.tensor_size, parallel.pipeline_size, c.replicas, parallel.zero_stage, micro)
        rows.append([*map(str, sizes), str(c.num_micro), c.config.sleep.activation_checkpointing])
        rows[-1] += [f"{c.memory.total / 2**30:.1f}", f"{100 * c.bubble:.1f} %"]
        rows[-1].append(f"{c.seconds / found[0].seconds:.2f}")
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(["", *(x.rjust(w) for x, w in zip(row, widths))]) for row in rows]
    title = f"layouts that fit on {gpus} GPUs of {gpu_gib:g} GiB, the fastest first (its time is 1)"
    return "\n".join([title, *lines, f"  {settings_of(found[0])}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
