"""What a pass costs: step time and peak memory against N, all activations kept or recomputed per pass.

A step is the forward and backward of three windows to sleep on and a small one with the loss.
Time: T(N) / T(1) against R(N), the ratio of the FLOPs of the visits planned; and what recomputing adds.
Memory: the peak of a fresh process for each N and policy; of its growth per extra pass, the ratio per pass /
keep all.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.flops import pass_ratio
from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.visits import cut

VOCAB_SIZE = 64
POLICIES = ("none", "pass")  # sleep.activation_checkpointing


@dataclass(frozen=True)
class Setup:
    """Sizes of a measurement."""

    d_model: int = 256
    head_dim: int = 64
    window_tokens: int = 256
    prediction_tokens: int = 16
    batch_sequences: int = 2
    num_passes: tuple[int, ...] = (1, 2, 4, 8)

    @property
    def num_tokens(self) -> int:
        return 3 * self.window_tokens + self.prediction_tokens

    @property
    def model(self) -> ModelConfig:
        """Four blocks with four heads."""
        dim = self.head_dim
        return ModelConfig(d_model=self.d_model, head_dim=dim, memory_key_dim=dim, memory_value_dim=dim)

    def sleep(self, policy: str) -> SleepConfig:
        return SleepConfig(window_tokens=self.window_tokens, activation_checkpointing=policy)  # type: ignore[arg-type]


WINDOWS_WITH_LOSS = (False, False, False, True)
QUICK = Setup(d_model=32, head_dim=8, window_tokens=16, prediction_tokens=4, num_passes=(1, 2))


def main() -> None:
    parser = measure.parser(__doc__ or "", rounds=5)
    parser.add_argument("--alone", nargs=2, metavar=("N", "POLICY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup = QUICK if options.quick else Setup()
    if options.alone:
        torch.set_num_threads(1)
        measure.return_freed_memory()
        training_step(setup, int(options.alone[0]), options.alone[1])()
        measure.print_peak()
        return
    measure.begin()
    measure.keep_freed_memory()
    print(f"{setup}\n")
    sides = [(n, policy) for n in setup.num_passes for policy in POLICIES]
    times = measure.interleaved({side: training_step(setup, *side) for side in sides}, options.rounds)
    report_time(setup, times, judged=not options.quick)
    size = ["--quick"] if options.quick else []
    peaks = {(n, p): measure.peak_mib(__file__, [*size, "--alone", str(n), p]) for n, p in sides}
    report_memory(setup, peaks, judged=not options.quick)


def training_step(setup: Setup, num_passes: int, policy: str) -> Callable[[], None]:
    """Forward and backward on one batch; the gradients are freed."""
    model = SleepModel(setup.model, setup.sleep(policy), VOCAB_SIZE)
    batch = make_batch(setup)

    def step() -> None:
        (model(batch, num_passes).loss_sum / batch.num_targets).backward()
        model.zero_grad()

    return step


def make_batch(setup: Setup) -> Batch:
    """Random tokens, a loss on the last window."""
    shape = (setup.batch_sequences, setup.num_tokens)
    ids = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0))
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask[:, -setup.prediction_tokens :] = True
    return Batch(
        ids=ids,
        targets=ids,
        loss_mask=loss_mask,
        valid=None,
        reset_state=None,
        difficulty=torch.zeros(setup.batch_sequences, dtype=torch.int64),
        windows_with_loss=WINDOWS_WITH_LOSS,
        num_targets=int(loss_mask.sum()),
    )


def report_time(setup: Setup, times: dict[tuple[int, str], list[measure.Seconds]], judged: bool) -> None:
    windows = cut(setup.num_tokens, setup.window_tokens, WINDOWS_WITH_LOSS)
    rows, taxes, worst = [], [], 0.0
    for n in setup.num_passes:
        kept, again = times[n, "none"], times[n, "pass"]
        by_flops = pass_ratio(setup.model, setup.sleep("none"), windows, VOCAB_SIZE, n)
        by_time, tax = measure.ratio(kept, times[1, "none"]), measure.ratio(again, kept)
        taxes.append(tax)
        worst = max(worst, abs(by_time.wall / by_flops - 1))
        seconds = (f"{measure.median_wall(side):.3f}" for side in (kept, again))
        rows.append(
            (str(n), *seconds, str(by_time), f"{by_flops:.3f}", f"{by_time.wall / by_flops:.3f}", str(tax))
        )
    heading = (
        "N",
        "keep all s",
        "per pass s",
        "T(N) / T(1)",
        "R(N) flops",
        "time / flops",
        "ratio per pass / keep all",
    )
    measure.show(heading, rows)
    if judged:
        measure.judge("T(N) / T(1) over R(N), largest distance from 1", worst, at_most=0.08)
        measure.judge("time per pass / keep all, largest", max(tax.wall for tax in taxes), at_most=1.34)


def report_memory(setup: Setup, peaks: dict[tuple[int, str], float], judged: bool) -> None:
    print()
    rows = [(str(n), *(f"{peaks[n, policy]:.1f}" for policy in POLICIES)) for n in setup.num_passes]
    measure.show(("N", "keep all MiB", "per pass MiB"), rows)
    slopes = [measure.slope(setup.num_passes, [peaks[n, p] for n in setup.num_passes]) for p in POLICIES]
    print("growth per extra pass: keep all {:.2f} MiB, per pass {:.2f} MiB".format(*slopes))
    if slopes[0] > 0:
        print(f"ratio of growth per pass / keep all: {slopes[1] / slopes[0]:.3f}")
        if judged:
            measure.judge("growth of memory per pass / keep all", slopes[1] / slopes[0], at_most=0.15)


if __name__ == "__main__":
    main()
