"""What a run costs, from the visits that it plans: FLOPs, tokens, bytes on the disk."""

from collections import Counter
from functools import cache, lru_cache
from typing import NamedTuple

from sleeptrain.config import Config
from sleeptrain.data.batch import Batch
from sleeptrain.data.corpus import open_task
from sleeptrain.data.mixture import open_mixture
from sleeptrain.data.stream import TrainStream
from sleeptrain.engine.interval import WorkOfSteps
from sleeptrain.model.flops import count_parameters, fixed_bytes, state_bytes
from sleeptrain.optim.schedule import num_passes_at


class Cost(NamedTuple):
    """Of a whole run. ``flops``: of training, as the mathematics asks; ``state_bytes``: fast weights of one
    sequence; ``disk_bytes``: its checkpoints."""

    tokens: int
    flops: float
    parameters: int
    state_bytes: int
    disk_bytes: int


task_of = lru_cache(open_task)


@cache
def cost_of(config: Config) -> Cost:
    """Raises ConfigError where the data of the task is not there."""
    task, num_steps = task_of(config.task), config.optim.num_steps
    vocab_size = config.model.rounded_vocab(task.vocab_size)
    work, batch = WorkOfSteps(config, task.sequence_tokens, vocab_size), first_batch(config)
    fixed = fixed_bytes(config.model, config.sleep, vocab_size)
    return Cost(
        tokens=num_steps * config.data.batch_sequences * task.sequence_tokens,
        flops=sum(count * work(batch, n).model_flops for n, count in steps_by_passes(config).items()),
        parameters=sum(count_parameters(config.model, config.sleep, vocab_size)),
        state_bytes=state_bytes(config.model),
        disk_bytes=(config.checkpoint.keep_last + 1) * (fixed.weights + fixed.optimizer),
    )


def steps_by_passes(config: Config) -> Counter[int]:
    """How many optimizer steps a run makes with each N."""
    num_steps = config.optim.num_steps
    if config.sleep.passes_schedule == "fixed":
        return Counter({config.sleep.num_passes: num_steps})
    return Counter(num_passes_at(step, config.sleep, num_steps, config.run.seed) for step in range(num_steps))


def first_batch(config: Config) -> Batch:
    """That of the training, whose window plan is that of all."""
    return stream_of(config).batch(0)


def stream_of(config: Config) -> TrainStream:
    """The training data of a run in one process."""
    task, data = task_of(config.task), config.data
    mixture = open_mixture(config, task)
    return TrainStream(
        task, config.run.seed, data.batch_sequences, config.sleep.window_tokens, 0, 1, mixture, 0
    )
