"""Training on one GPU: tokens per second over N and window, with activation checkpointing, and the paper's.

A step is forward, backward and update of one sequence of 12,288 tokens: all windows but the last are slept
on, and that one predicts. The model is Ouro 1.4B with 6 Jet blocks (configs/model/ouro_1b4_jet.yaml) at
random weights, in bfloat16 over float32 weights. MFU counts the FLOPs of the model, HFU also those that are
computed again, over the dense bfloat16 peak of the device. The ratio is ours over the paper's tokens per
second on one H200 (its Fig. 6). First comes the gradient check of the kernels.

--profile FOLDER also writes a trace of one step (Perfetto, chrome://tracing) and prints the operations that
take most of it. With --quick a tiny model on any device: does it run?
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import measure
import torch

from sleeptrain.config import Config, DataConfig, ModelConfig, RunConfig, SleepConfig, TextConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.flops import peak_flops, training_flops
from sleeptrain.model.visits import plan
from sleeptrain.parallel.backend import LocalBackend

NO_DEVICE = 2  # exit code
WARMUP_STEPS = 2
BAR = 1.5
OURO_JET = ModelConfig(
    d_model=2048,
    pattern="attn attn attn attn jet",
    pattern_repeats=6,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    mlp_dim=5632,
    memory_mlp=False,
    memory_heads=8,
    memory_key_dim=128,
    memory_value_dim=256,
    rope_theta=1e6,
    norm_placement="sandwich",
    vocab_multiple=49152,
)
# Tokens per second of the paper by (window, N), on one H200 with T = 12k and checkpointing (Fig. 6).
PAPER = {
    (1024, 1): 19_800,
    (1024, 2): 9_700,
    (1024, 4): 4_600,
    (2048, 1): 19_400,
    (2048, 2): 10_100,
    (2048, 4): 4_800,
}


class Setup(NamedTuple):
    """Sizes of a measurement."""

    model: ModelConfig = OURO_JET
    vocab_size: int = 49152
    num_tokens: int = 12_288
    windows: tuple[int, ...] = (1024, 2048, 4096)
    num_passes: tuple[int, ...] = (1, 2, 4)
    policies: tuple[str, ...] = ("pass", "both")  # sleep.activation_checkpointing


QUICK = Setup(ModelConfig(d_model=32, norm_placement="sandwich"), 64, 48, (12, 24), (1, 2), ("pass", "none"))


class Planned(NamedTuple):
    """What a step does: tokens that pass through the looped blocks, and its FLOPs."""

    pass_tokens: int
    model_flops: float
    hardware_flops: float


def main() -> None:
    parser = measure.parser(__doc__ or "", rounds=5)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="trace a step of the largest N")
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        print("error: train_gpu.py measures a CUDA device, and torch sees none here", file=sys.stderr)
        sys.exit(NO_DEVICE)
    measure.begin()
    setup = QUICK if options.quick else Setup()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("device:", torch.cuda.get_device_name() if device == "cuda" else "cpu")
    if device == "cuda":
        check_kernels()
    backend = make_backend(setup, device)
    for window_tokens in setup.windows:
        for policy in setup.policies:
            rows = list(over_passes(backend, setup, window_tokens, policy, options.rounds))
            print(f"\nwindows of {window_tokens}, checkpointing {policy}")
            measure.show(
                ("N", "s/step", "tokens/s", "pass-tokens/s", "MFU %", "HFU %", "peak GiB", "over paper"), rows
            )
    if options.profile:
        profile(backend, setup, options.profile)


def check_kernels() -> None:
    from sleeptrain.memory.kernels.check import Case, above_bar, errors

    case = Case(key_dim=128, value_dim=256, extreme=True)
    bad = above_bar(case, errors(case, "cuda"))
    print(f"{'FAIL' if bad else 'PASS'}  {case}", bad or "")


def make_backend(setup: Setup, device: str) -> LocalBackend:
    config = Config(
        run=RunConfig(device=device),  # type: ignore[arg-type]
        model=setup.model,
        task=TextConfig(sequence_tokens=setup.num_tokens),
        data=DataConfig(batch_sequences=1),
    )
    return LocalBackend(config, setup.vocab_size)


def over_passes(
    backend: LocalBackend, setup: Setup, window_tokens: int, policy: str, rounds: int
) -> Iterator[tuple[str, ...]]:
    """A row of the table for each N."""
    is_cuda = backend.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name()) if is_cuda else None
    for num_passes in setup.num_passes:
        step, planned = prepared(backend, setup, window_tokens, policy, num_passes)
        seconds, peak_bytes = timed(step, is_cuda, rounds)
        speed = setup.num_tokens / seconds
        published = PAPER.get((window_tokens, num_passes))
        if published:
            name = f"tokens/s over the paper's, N = {num_passes}, windows of {window_tokens}, {policy}"
            print(f"ratio {name}: {speed / published:.3f}")
            measure.judge(name, speed / published, at_least=BAR)
        yield (
            str(num_passes),
            f"{seconds:.3f}",
            f"{speed:,.0f}",
            f"{planned.pass_tokens / seconds:,.0f}",
            share(planned.model_flops / seconds, peak),
            share(planned.hardware_flops / seconds, peak),
            f"{peak_bytes / 2**30:.1f}" if is_cuda else "-",
            f"{speed / published:.2f}" if published else "-",
        )


def prepared(
    backend: LocalBackend, setup: Setup, window_tokens: int, policy: str, num_passes: int
) -> tuple[Callable[[], None], Planned]:
    """A whole step, and what is known of it beforehand. The weights stay those of the step before."""
    sleep = SleepConfig(window_tokens, num_passes, activation_checkpointing=policy)  # type: ignore[arg-type]
    backend.model.sleep, batch = sleep, make_batch(setup, window_tokens)
    windows = backend.model.windows(batch)
    visits = plan(windows, num_passes, setup.model, sleep)
    cost = training_flops(setup.model, sleep, windows, visits, setup.vocab_size)
    pass_tokens = sum(windows[v.window].stop - windows[v.window].start for v in visits if v.segment == "core")

    def step() -> None:
        result = backend.forward_backward(batch, num_passes)
        assert backend.step(1e-3, result.loss).applied

    return step, Planned(pass_tokens, cost.model, cost.hardware)


def make_batch(setup: Setup, window_tokens: int) -> Batch:
    """Random tokens, a loss on the last window."""
    ids = torch.randint(setup.vocab_size, (1, setup.num_tokens), generator=torch.Generator().manual_seed(0))
    num_windows = setup.num_tokens // window_tokens
    loss_mask = torch.zeros_like(ids, dtype=torch.bool)
    loss_mask[:, -window_tokens:] = True
    return Batch(
        ids=ids,
        targets=ids.roll(-1, 1),
        loss_mask=loss_mask,
        valid=None,
        reset_state=None,
        difficulty=torch.zeros(1, dtype=torch.int64),
        windows_with_loss=(*[False] * (num_windows - 1), True),
        num_targets=window_tokens,
    )


def timed(step: Callable[[], None], is_cuda: bool, rounds: int) -> tuple[float, int]:
    """Median seconds of a step, and the peak of the device's memory in bytes."""
    for _ in range(WARMUP_STEPS):
        step()
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds), torch.cuda.max_memory_allocated() if is_cuda else 0


def share(flops_per_second: float, peak: float | None) -> str:
    return f"{100 * flops_per_second / peak:.1f}" if peak else "-"


def profile(backend: LocalBackend, setup: Setup, folder: Path) -> None:
    """One step of the largest N, windows of 2048 or the largest."""
    window_tokens = 2048 if 2048 in setup.windows else setup.windows[-1]
    num_passes, policy = setup.num_passes[-1], setup.policies[0]
    step, _ = prepared(backend, setup, window_tokens, policy, num_passes)
    for _ in range(WARMUP_STEPS):
        step()
    with torch.profiler.profile() as trace:
        step()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_n{num_passes}_window{window_tokens}_{policy}.json"
    trace.export_chrome_trace(str(path))
    order = f"self_{backend.device.type}_time_total"
    print(trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
