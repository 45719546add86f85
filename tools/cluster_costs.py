"""What a step, a checkpoint and a failure cost on a cluster: the closed forms of simulate.py, and the random
failures that check them.

A step is that of ``estimate.py`` (FLOPs, visits, messages and their assumed speeds), taken apart, and with
the latency of long rings. Goodput is the share of wall time whose work lasts: not spent saving, failing,
recovering, nor on steps that are made again.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import estimate

from sleeptrain.config import Config, DataConfig, ParallelConfig
from sleeptrain.model.flops import FLOAT32_BYTES, fixed_bytes
from sleeptrain.model.visits import plan, require_passes
from sleeptrain.parallel.check import check_degrees
from sleeptrain.parallel.layout import bucket_elements
from sleeptrain.parallel.rows import micro_batch_of
from sleeptrain.parallel.topology import check_world
from sleeptrain.schema import ConfigError

STALL_OVER_COPY = 1.234  # measured: tools/bench/checkpoint.py, see LOG.md


@dataclass(frozen=True)
class Cluster:
    """What a run on it meets; docs/scale.md has the source of every default.

    ``mtbf_gpu_hours``: GPU-hours per failure of a job; the bandwidths are bytes per second of one GPU.
    ``checkpoint_seconds`` and ``load_seconds``: None, if they follow from the bytes of the model.
    """

    mtbf_gpu_hours: float = 54 * 24 * 16384 / 419  # Llama 3 (arXiv 2407.21783), unplanned interruptions
    flops_per_second: float = estimate.FLOPS_PER_SECOND
    hop_seconds: float = 5e-6
    copy_bytes_per_second: float = 20e9
    storage_bytes_per_second: float = 0.12e9
    save_overhead_seconds: float = 1.0
    checkpoint_seconds: float | None = None
    detect_seconds: float = 30.0
    restart_seconds: float = 90.0
    load_seconds: float | None = None
    first_step_seconds: float = 60.0


class Step(NamedTuple):
    """An optimizer step: where its seconds go, on the slowest rank, and what it takes and does."""

    compute_seconds: float
    bubble_seconds: float
    tensor_seconds: float
    data_seconds: float
    num_visits: int
    num_micro: int
    replicas: int
    batch_tokens: int
    rank_bytes: int  # on the fullest rank
    weight_bytes: int  # on the rank with most of them

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.bubble_seconds + self.tensor_seconds + self.data_seconds

    @property
    def bubble(self) -> float:
        """Idle share of the pipeline, messages aside."""
        return self.bubble_seconds / (self.compute_seconds + self.bubble_seconds)


class Faults(NamedTuple):
    """Seconds that decide goodput. ``stall``: a save holds the loop; ``durable``: from then until the save
    counts; ``recovery``: from a failure until training goes on; ``mtbf``: between failures of the job."""

    stall: float
    durable: float
    recovery: float
    mtbf: float


class Point(NamedTuple):
    """A run on so many GPUs, with N passes and a checkpoint after each ``interval`` seconds of training."""

    gpus: int
    num_passes: int
    step: Step
    faults: Faults
    interval: float

    @property
    def goodput(self) -> float:
        return goodput(self.faults, self.interval)

    @property
    def tokens_per_second(self) -> float:
        """Tokens whose training lasts."""
        return self.goodput * self.step.batch_tokens / self.step.seconds


def bubble_share(num_stages: int, num_micro: int, num_visits: int) -> float:
    """(p - 1) / (m V + p - 1)."""
    return (num_stages - 1) / (num_micro * num_visits + num_stages - 1)


def on_gpus(config: Config, run: estimate.Run, gpus: int, replica_sequences: int) -> tuple[Config, int]:
    """The run with a batch of so many sequences on each replica, and the replicas; ConfigError where the
    degrees do not fit."""
    replicas = check_world(config.parallel, gpus)
    data = replace(config.data, batch_sequences=replicas * replica_sequences, num_streams=None)
    config = replace(config, data=data)
    return config, check_degrees(config, run.vocab_size, run.sequence_tokens, gpus)


def point(
    run: estimate.Run,
    replica_sequences: int,
    interval_seconds: float | None,
    cluster: Cluster,
    config: Config,
    gpus: int,
) -> Point:
    """``interval_seconds``: None, for the best one. ConfigError where degrees or batch do not fit."""
    config, replicas = on_gpus(config, run, gpus, replica_sequences)
    step = step_of(config, run, replicas, cluster)
    faults = faults_of(config, run, step, gpus, cluster)
    least = max(step.seconds, faults.durable)
    if interval_seconds is not None and interval_seconds < least:
        raise ConfigError(
            f"--interval-seconds={interval_seconds:g} is below the {least:.3g} seconds that "
            f"{'a step' if least == step.seconds else 'writing a save'} takes on {gpus} GPUs; raise it"
        )
    interval = interval_seconds or best_interval(faults, step.seconds)
    return Point(gpus, config.sleep.num_passes, step, faults, interval)


def with_passes(config: Config, num_passes: int) -> Config:
    """ConfigError where the looped blocks have nothing to write."""
    require_passes(num_passes, config.model)
    return replace(config, sleep=replace(config.sleep, num_passes=num_passes, min_passes=1))


def step_of(config: Config, run: estimate.Run, replicas: int, cluster: Cluster) -> Step:
    """The step of a laid-out run, nothing of its messages hidden behind computation."""
    num_stages, rows = config.parallel.pipeline_size, config.data.batch_sequences // replicas
    of_stages = estimate.ranks_of_stages(config, run, replicas)
    num_micro = rows // micro_batch_of(config, rows)
    num_visits = len(plan(run.windows, config.sleep.num_passes, config.model, config.sleep))
    compute = num_micro * max(
        rows / num_micro * flops_of_sequence(config, run) / cluster.flops_per_second,
        estimate.BLOCK_SECONDS * num_visits * len(config.model.blocks) / num_stages,
    )
    bubble = bubble_share(num_stages, num_micro, num_visits)
    tensor, data = traffic_seconds(config, run, replicas, max(rank.gradients for rank in of_stages), cluster)
    idle = compute * bubble / (1 - bubble)
    tokens = config.data.batch_sequences * run.sequence_tokens
    most, weights = max(rank.total for rank in of_stages), max(rank.weights for rank in of_stages)
    return Step(compute, idle, tensor, data, num_visits, num_micro, replicas, tokens, most, weights)


def flops_of_sequence(config: Config, run: estimate.Run) -> float:
    """FLOPs of one sequence on a rank of the busiest stage, what is computed again included."""
    degrees, num_stages = config.parallel.tensor_size, config.parallel.pipeline_size
    parallel = ParallelConfig(tensor_size=degrees, pipeline_size=num_stages)
    alone = replace(config, data=DataConfig(), parallel=parallel)
    windows = tuple(run.windows)
    return max(estimate.stage_flops(alone, run.vocab_size, windows, stage) for stage in range(num_stages))


def traffic_seconds(
    config: Config, run: estimate.Run, replicas: int, gradients: int, cluster: Cluster
) -> tuple[float, float]:
    """Sums over tensor ranks, and what replicas send each other; the latter in buckets, each of which passes
    replicas - 1 hops, a replica's part of it at a time."""
    rows = config.data.batch_sequences // replicas
    alone = replace(config, data=replace(config.data, batch_sequences=rows, num_streams=None))
    tensor = estimate.message_seconds(alone, run, 1, gradients)
    sending = estimate.message_seconds(config, run, replicas, gradients) - tensor
    if replicas == 1:
        return tensor, 0.0
    gpus = replicas * config.parallel.tensor_size * config.parallel.pipeline_size
    is_near = gpus <= estimate.NODE
    speed = estimate.NEAR_BYTES_PER_SECOND if is_near else estimate.FAR_BYTES_PER_SECOND
    bucket_bytes = gradients
    if config.parallel.zero_stage:
        bucket_bytes = FLOAT32_BYTES * bucket_elements(gradients // FLOAT32_BYTES)
    return tensor, sending * (1 + replicas * cluster.hop_seconds * speed / bucket_bytes)


def faults_of(config: Config, run: estimate.Run, step: Step, gpus: int, cluster: Cluster) -> Faults:
    """Stall, delay and recovery of a laid-out run: every rank saves its share of weights and moments, and
    loads the weights of its part of the model and its share of the moments."""
    of_model = fixed_bytes(config.model, config.sleep, run.vocab_size)
    saved = (of_model.weights + of_model.optimizer) / gpus
    stall = cluster.checkpoint_seconds
    if stall is None:
        stall = cluster.save_overhead_seconds + STALL_OVER_COPY * saved / cluster.copy_bytes_per_second
    load = cluster.load_seconds
    if load is None:
        load = (step.weight_bytes + of_model.optimizer / gpus) / cluster.storage_bytes_per_second
    recovery = cluster.detect_seconds + cluster.restart_seconds + load + cluster.first_step_seconds
    durable = saved / cluster.storage_bytes_per_second
    return Faults(stall, durable, recovery, cluster.mtbf_gpu_hours * 3600 / gpus)


def best_interval(faults: Faults, step_seconds: float) -> float:
    """Seconds of training between two saves that lose least (Young 1974, with the next terms of Daly 2006);
    at least a step, and not before the last save is durable. Infinite without failures."""
    if math.isinf(faults.mtbf):
        return math.inf
    small = faults.stall / (2 * faults.mtbf)
    best = faults.mtbf
    if small < 1:
        series = 1 + math.sqrt(small) / 3 + small / 9
        best = young_interval(faults.stall, faults.mtbf) * series - faults.stall
    return max(best, step_seconds, faults.durable)


def young_interval(stall_seconds: float, mtbf_seconds: float) -> float:
    """sqrt(2 d MTBF)."""
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


def goodput(faults: Faults, interval_seconds: float) -> float:
    """Share of wall time whose work lasts, exact for failures at random that may also hit a recovery.

    With M = mtbf, a stretch of tau seconds of work becomes durable after
    M exp((recovery + durable) / M) (exp((tau + stall) / M) - 1) seconds on average.
    """
    if math.isinf(faults.mtbf):
        return 1.0 if math.isinf(interval_seconds) else interval_seconds / (interval_seconds + faults.stall)
    cycle = interval_seconds + faults.stall
    survives = math.exp(-(cycle + faults.recovery + faults.durable) / faults.mtbf)
    return interval_seconds / faults.mtbf * survives / -math.expm1(-cycle / faults.mtbf)


def goodput_first_order(faults: Faults, interval_seconds: float) -> float:
    """1 - d / tau - (tau / 2 + T_recovery) / MTBF, the rule of thumb; below 0 where failures are frequent."""
    lost = interval_seconds / 2 + faults.durable + faults.recovery
    return 1 - faults.stall / interval_seconds - lost / faults.mtbf


def goodput_of_kills(faults: Faults, interval_seconds: float, num_kills: int, seed: int) -> float:
    """The same measured on a run that is killed at random until it has met so many kills: event by event,
    without the formula."""
    clock = random.Random(seed)
    now = done = 0.0
    needed = 0.0  # from ``now`` on, until training goes on from the newest durable save
    kill = clock.expovariate(1 / faults.mtbf)
    for _ in range(num_kills):
        saved = now + needed + interval_seconds + faults.stall + faults.durable
        while saved <= kill:
            done += interval_seconds
            saved += interval_seconds + faults.stall
        now, needed = kill, faults.recovery
        kill = now + clock.expovariate(1 / faults.mtbf)
    return done / now
