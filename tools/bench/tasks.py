"""Does data keep up? Examples per second that each task makes, against what one training step uses up.

Both on one thread of this machine. The model of a task trains at N = 1, where it asks for most examples. The
ratio is made / used: at 100, making the examples costs 1 % of a step.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import measure

from sleeptrain.config import (
    Config,
    DataConfig,
    DepoConfig,
    GSMInfiniteConfig,
    ModelConfig,
    RecallConfig,
    Rule110Config,
    RunConfig,
    SleepConfig,
    TextConfig,
)
from sleeptrain.data.stream import TrainStream
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.tasks import make_task

PAPER_RULE110 = ModelConfig(d_model=256, head_dim=64, memory_key_dim=64, memory_value_dim=64)
SMALL = ModelConfig(d_model=128, memory_key_dim=32, memory_value_dim=32)

RUN = RunConfig(device="cpu")
SETUPS = {
    "rule110 quickstart": Config(run=RUN),
    "rule110 paper": Config(
        run=RUN,
        model=PAPER_RULE110,
        task=Rule110Config(width=24, num_strings=4, steps=32),
        sleep=SleepConfig(window_tokens=24),
        data=DataConfig(batch_sequences=32),
    ),
    "depo paper, small model": Config(
        run=RUN,
        model=SMALL,
        task=DepoConfig(),
        sleep=SleepConfig(window_tokens=75),
        data=DataConfig(batch_sequences=16),
    ),
    "recall 64 windows": Config(
        run=RUN,
        task=RecallConfig(num_windows=64, num_keys=128),
        sleep=SleepConfig(window_tokens=4),
        data=DataConfig(batch_sequences=16),
    ),
    "gsm_infinite in bytes, small model": Config(
        run=RUN,
        model=SMALL,
        task=GSMInfiniteConfig(),
        sleep=SleepConfig(window_tokens=512),
        data=DataConfig(batch_sequences=2),
    ),
    "text stdlib, small model": Config(
        run=RUN,
        model=SMALL,
        task=TextConfig(),
        sleep=SleepConfig(window_tokens=128, schedule="predict_then_consolidate"),
        data=DataConfig(batch_sequences=16),
    ),
}


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=9).parse_args()
    measure.begin()
    rows = []
    for name, config in SETUPS.items():
        num_sequences = 2 if options.quick else config.data.batch_sequences
        make, use = sides(replace(config, data=DataConfig(batch_sequences=num_sequences)))
        times = measure.interleaved({"make": make, "use": use}, options.rounds)
        ratio = measure.ratio(times["use"], times["make"])
        made, used = (num_sequences / measure.median_wall(times[side]) for side in ("make", "use"))
        rows.append((name, str(num_sequences), f"{made:,.0f}", f"{used:,.1f}", str(ratio)))
    measure.show(("task", "batch", "made/s", "used/s", "ratio made / used"), rows)


def sides(config: Config) -> tuple[Callable[[], object], Callable[[], object]]:
    """Make the next batch; train one step on a batch."""
    task = make_task(config.task)
    stream = TrainStream(task, config.run.seed, config.data.batch_sequences, config.sleep.window_tokens)
    backend, batch, steps = LocalBackend(config, task.vocab_size), stream.batch(0), count()

    def train() -> None:
        result = backend.forward_backward(batch, num_passes=1)
        backend.step(lr_factor=0.1, loss=result.loss)

    return lambda: stream.batch(next(steps)), train


if __name__ == "__main__":
    main()
