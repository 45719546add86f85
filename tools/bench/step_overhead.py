"""What the framework adds to a training step: the trainer's own loop against a bare torch loop.

Both train the quickstart model from the same weights on the same batches with the same optimizer maths, in
blocks of log.every_steps steps in turn, and must end with equal weights, bit for bit. The framework's side is
everything its loop does: data, forward/backward, update, progress, a row of metrics; only saving and
evaluating are switched off. The bare side has its batches ready and does nothing else. The ratio is
framework / bare.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import measure
import torch

from sleeptrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
)
from sleeptrain.data.stream import TrainStream
from sleeptrain.engine.trainer import Trainer
from sleeptrain.model.sleep import SleepModel
from sleeptrain.optim.optimizer import MuonAdamW
from sleeptrain.optim.schedule import lr_factor
from sleeptrain.parallel.place import Alone
from sleeptrain.tasks import make_task


class Switch:
    """Stands in for the stop signal, which the trainer's loop asks between two steps: the bare side's turn.

    Both sides' time of every block is kept; the first one is a warm-up.
    """

    def __init__(self, bare_block: Callable[[], None], block_steps: int, rounds: int) -> None:
        self.bare_block, self.block_steps, self.num_blocks = bare_block, block_steps, rounds + 1
        self.num_asked, self.start = 0, measure.now()
        self.framework: list[measure.Seconds] = []
        self.bare: list[measure.Seconds] = []

    @property
    def requested(self) -> str | None:
        at_border = self.num_asked % self.block_steps == 0
        if at_border and self.num_asked:
            self.framework.append(measure.since(self.start))
        self.num_asked += 1
        if len(self.framework) == self.num_blocks:
            return "the benchmark"
        if at_border:
            self.bare.append(measure.timed(self.bare_block))
            self.start = measure.now()
        return None


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=15).parse_args()
    measure.begin()
    config = quickstart(options.quick)
    block_steps = config.log.every_steps
    with tempfile.TemporaryDirectory() as folder:
        in_folder = replace(config, run=replace(config.run, dir=folder))
        trainer = Trainer(in_folder, make_task(config.task), Path(folder), frozen_config="", place=Alone())
        model = SleepModel(config.model, config.sleep, trainer.task.vocab_size, config.run.seed)
        switch = Switch(
            bare_loop(config, model, (options.rounds + 1) * block_steps), block_steps, options.rounds
        )
        trainer.run(switch)  # type: ignore[arg-type]
    ours = dict(trainer.backend.model.named_parameters())
    if not all(torch.equal(p, ours[name]) for name, p in model.named_parameters()):
        sys.exit("the bare loop ended with other weights than the framework: they do not compute the same")
    framework, bare = switch.framework[1:], switch.bare[1:]
    print(
        f"\nequal weights after {trainer.step} steps each; milliseconds per step over {options.rounds} blocks"
    )
    rows = [
        (name, f"{per_step(measure.median_wall(times)):.2f}", f"{per_step(measure.least_cpu(times)):.2f}")
        for name, times in (("framework", framework), ("bare loop", bare))
        for per_step in [lambda seconds: 1e3 * seconds / block_steps]
    ]
    measure.show(("", "median", "least cpu"), rows)
    ratio = measure.ratio(framework, bare)
    print(f"ratio framework / bare: {ratio}")
    if not options.quick:
        measure.judge("framework / bare", ratio.wall, at_most=1.05)


def quickstart(quick: bool) -> Config:
    """The defaults of a run are the quickstart; here on one CPU thread, without evaluating and saving."""
    config = Config(
        run=RunConfig(device="cpu", num_threads=1),
        eval=EvalConfig(every_steps=0),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    if not quick:
        return config
    return replace(
        config,
        model=ModelConfig(d_model=32),
        data=DataConfig(batch_sequences=4),
        log=LogConfig(every_steps=2),
    )


def bare_loop(config: Config, model: SleepModel, num_steps: int) -> Callable[[], None]:
    """A function that trains the next block of steps, written out as in a notebook."""
    task = make_task(config.task)
    stream = TrainStream(task, config.run.seed, config.data.batch_sequences, config.sleep.window_tokens)
    steps = iter([(stream.batch(step), lr_factor(step, config.optim)) for step in range(num_steps)])
    optimizers = MuonAdamW(model, config.optim)
    groups = [
        (group, peak)
        for optimizer, peak in (
            (optimizers.muon, config.optim.muon_lr),
            (optimizers.adamw, config.optim.adamw_lr),
        )
        for group in optimizer.param_groups
    ]

    def block() -> None:
        for batch, factor in islice(steps, config.log.every_steps):
            (model(batch, config.sleep.num_passes).loss_sum / batch.num_targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            for group, peak in groups:
                group["lr"] = peak * factor
            optimizers.muon.step()
            optimizers.adamw.step()
            model.zero_grad()

    return block


if __name__ == "__main__":
    main()
