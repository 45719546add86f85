"""What a token costs awake, and how long a sleep lasts: over N, and over how much was read before.

Awake: seconds per token (p50, p99) of a session that reads one token at a time, in the second half of its
open window, after 1 and more windows, with N passes in each sleep; sides are timed in turn, token by token.
The peer is a transformer of the same width and depth that keeps everything it read: its token costs more, the
more it read; without a window it has no decoder either. Asleep: the sleep at the end of a window against
N - 1 forwards over the window, of embedding and blocks, in the same run. Memory: peak of a fresh process that
reads so many tokens.

The ratios are N = 8 over N = 1, the longest context over the shortest, sleep over its forwards. With --device
cuda the model has 1.4 billion weights, in bfloat16, and a fourth ratio is that of a token to its floor: the
time that reading all weights once takes at 4.3 TB/s (one H200).
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import NamedTuple

import measure
import torch

from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.model import session
from sleeptrain.model.decoder import Decoder
from sleeptrain.model.ragged import Rows
from sleeptrain.model.sleep import SleepModel

VOCAB_SIZE = 257
BAR_AWAKE, BAR_STALL, BAR_MB_PER_10K_TOKENS, BAR_FLOOR = 1.02, 0.10, 1.0, 1.5
BAR_LOGITS = 0.05  # in bfloat16, after a window
BYTES_PER_SECOND = 4.3e12
NO_DEVICE = 2  # exit code


@dataclass(frozen=True)
class Setup:
    """Sizes of a measurement."""

    d_model: int = 256
    head_dim: int = 64
    window_tokens: int = 128
    num_passes: tuple[int, ...] = (1, 2, 4, 8)
    contexts: tuple[int, ...] = (1, 4, 16, 64)  # windows read before
    memory_tokens: tuple[int, ...] = (2_560, 12_800, 23_040)
    num_heads: int = 4
    repeats: int = 1  # of four blocks
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def model(self, pattern: str = "attn gdn attn gdn", window_tokens: int | None = None) -> SleepModel:
        """``window_tokens`` 0: one window that never ends."""
        dim = self.head_dim
        config = ModelConfig(
            d_model=self.d_model,
            num_heads=self.num_heads,
            head_dim=dim,
            memory_heads=self.num_heads,
            memory_key_dim=dim,
            memory_value_dim=dim,
            pattern=pattern,
            pattern_repeats=self.repeats,
        )
        length = self.window_tokens if window_tokens is None else window_tokens
        model = SleepModel(config, SleepConfig(window_tokens=length), VOCAB_SIZE)
        return model.to(self.device, self.dtype)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


QUICK = Setup(*(32, 8, 16), num_passes=(1, 2), contexts=(1, 3), memory_tokens=(32, 64, 128))
ON_CUDA = Setup(2048, 128, 512, num_heads=16, repeats=7, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    parser = measure.parser(__doc__ or "", rounds=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default cpu)")
    parser.add_argument("--alone", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, and torch sees no CUDA device here", file=sys.stderr)
        sys.exit(NO_DEVICE)
    setup = ON_CUDA if options.device == "cuda" else Setup()
    if options.quick:
        setup = replace(QUICK, device=options.device)
    if options.alone:
        read_alone(setup, options.alone)
        return
    measure.begin()
    print(f"{setup}\n")
    report_decoder(setup, judged=not options.quick)
    report_awake(setup, options.rounds, judged=not options.quick)
    report_sleep(setup, options.rounds, judged=not options.quick)
    size = ["--device", options.device, *(["--quick"] if options.quick else [])]
    peaks = [measure.peak_mib(__file__, [*size, "--alone", str(n)]) for n in setup.memory_tokens]
    report_memory(setup, peaks, judged=not options.quick)


def read_alone(setup: Setup, num_tokens: int) -> None:
    """In a process of its own: prints the peak of its memory, or of the device's."""
    torch.set_num_threads(1)
    measure.return_freed_memory()
    read_windows(setup, setup.model(), num_tokens // setup.window_tokens, 2)
    if setup.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        measure.print_peak()


def random_ids(setup: Setup, num_tokens: int) -> torch.Tensor:
    ids = torch.randint(VOCAB_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(setup.device)


def read_windows(setup: Setup, model: SleepModel, num_windows: int, num_passes: int) -> session.Session:
    """A session that has read so many windows."""
    now = session.begin(model, 1)
    for _ in range(num_windows):
        _, now = session.feed(model, now, random_ids(setup, setup.window_tokens), num_passes)
    return now


class Reader(NamedTuple):
    """``begin`` goes back to the middle of the open window, ``read`` reads token i after it."""

    begin: Callable[[], None]
    read: Callable[[int], None]


def token_by_token(setup: Setup, model: SleepModel, num_windows: int, num_passes: int) -> Reader:
    """After so many windows: by the decoder, where there is one."""
    now = read_windows(setup, model, num_windows, num_passes)
    ids = random_ids(setup, setup.window_tokens // 2)
    _, start = session.read(model, now, ids)
    if model.sleep.window_tokens:
        return decoding(setup, model, start, ids)
    place = [start]

    def begin() -> None:
        place[0] = start

    def read(i: int) -> None:
        _, place[0] = session.read(model, place[0], ids[:, i : i + 1])
        setup.wait()

    return Reader(begin, read)


def decoding(setup: Setup, model: SleepModel, start: session.Session, ids: torch.Tensor) -> Reader:
    decoder = Decoder(model, contextlib.nullcontext)
    rows = Rows(start, torch.full((1,), start.position_tokens, device=setup.device))

    def read(i: int) -> None:
        decoder.read(ids[:, i])
        setup.wait()

    return Reader(lambda: decoder.enter(rows), read)


def report_awake(setup: Setup, rounds: int, judged: bool) -> None:
    model, everything = setup.model(), setup.model("attn attn attn attn", window_tokens=0)
    most, first, last = max(setup.num_passes), setup.contexts[0], setup.contexts[-1]
    sides = {("sleeps", n, last): token_by_token(setup, model, last, n) for n in setup.num_passes}
    for context in setup.contexts[:-1]:
        sides["sleeps", most, context] = token_by_token(setup, model, context, most)
    for context in setup.contexts:
        sides["attention to all", 1, context] = token_by_token(setup, everything, context, 1)
    num_tokens = setup.window_tokens // 2
    times: dict[tuple[str, int, int], list[float]] = {side: [] for side in sides}
    for name in ("sleeps", "attention to all"):  # what the peer reads would push ours out of the caches
        of_model = [side for side in sides if side[0] == name]
        for turn in range((rounds + 1) * num_tokens):  # the first round warms up
            for side in of_model[turn % len(of_model) :] + of_model[: turn % len(of_model)]:
                token = turn % num_tokens
                if token == 0:
                    sides[side].begin()
                start = time.perf_counter()
                sides[side].read(token)
                times[side].append(time.perf_counter() - start)
        for side in of_model:
            del times[side][:num_tokens]
        rows = [
            (name, str(n), str(context), f"{1e3 * median(found):.3f}", f"{1e3 * percentile_99(found):.3f}")
            for (_, n, context), found in ((side, times[side]) for side in of_model)
        ]
        measure.show(("model", "N", "windows before", "p50 ms", "p99 ms"), rows)

    def ratio(over: tuple[str, int, int], under: tuple[str, int, int]) -> float:
        return median(times[over]) / median(times[under])

    over_n = ratio(("sleeps", most, last), ("sleeps", 1, last))
    over_context = ratio(("sleeps", most, last), ("sleeps", most, first))
    of_peer = ratio(("attention to all", 1, last), ("attention to all", 1, first))
    print(f"ratio p50, N = {most} / N = 1: {over_n:.3f}")
    print(f"ratio p50, {last} windows / {first}: {over_context:.3f}")
    print(f"ratio p50, {last} windows / {first}, attention to all: {of_peer:.3f}\n")
    if setup.device == "cuda":
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        floor = num_bytes / BYTES_PER_SECOND
        over_floor = median(times["sleeps", most, last]) / floor
        print(f"ratio p50 / floor of {1e3 * floor:.3f} ms: {over_floor:.3f}")
        measure.judge("p50 awake / floor", over_floor, at_most=BAR_FLOOR)
    if judged:
        measure.judge(f"p50 awake, N = {most} / N = 1", over_n, at_most=BAR_AWAKE)
        measure.judge(f"p50 awake, {last} windows / {first}", over_context, at_most=BAR_AWAKE)


def percentile_99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


def report_decoder(setup: Setup, judged: bool) -> None:
    """How far its logits are from those of the usual reader, of some tokens in a row."""
    model, ids = setup.model(), random_ids(setup, setup.window_tokens)
    half = setup.window_tokens // 2
    _, usual = session.read(model, session.begin(model, 1), ids[:, :half])
    decoder = Decoder(model, contextlib.nullcontext)
    decoder.enter(Rows(usual, torch.full((1,), half, device=setup.device)))
    worst = 0.0
    for i in range(half, setup.window_tokens):
        expected, usual = session.read(model, usual, ids[:, i : i + 1])
        found = decoder.read(ids[:, i])
        worst = max(worst, float((found - expected[:, 0]).norm() / expected.norm()))
    print(f"worst relative difference of the decoder's logits: {worst:.7f}")
    if judged:
        measure.judge("worst relative difference of the decoder's logits", worst, at_most=BAR_LOGITS)


def report_sleep(setup: Setup, rounds: int, judged: bool) -> None:
    """Stalls against as many forwards."""
    model = setup.model()
    before, ids = read_windows(setup, model, 2, 2), random_ids(setup, setup.window_tokens)
    _, full = session.read(model, before, ids)

    def forward() -> None:
        with torch.no_grad():
            session.read_on(model, before, ids)
        setup.wait()

    def sleep(num_passes: int) -> None:
        session.sleep(model, full, num_passes)
        setup.wait()

    calls: dict[int, Callable[[], object]] = {0: forward}
    calls |= {n: partial(sleep, n) for n in setup.num_passes[1:]}
    times = measure.interleaved(calls, 3 * rounds)
    rows, worst = [], 0.0
    for n in setup.num_passes[1:]:
        ratio = median(a.wall / (b.wall * (n - 1)) for a, b in zip(times[n], times[0]))
        worst = max(worst, ratio - 1)
        rows.append((str(n), f"{1e3 * measure.median_wall(times[n]):.1f}", f"{ratio:.3f}"))
    print(f"a forward over {setup.window_tokens} tokens: {1e3 * measure.median_wall(times[0]):.1f} ms")
    measure.show(("N", "sleep ms", "over N - 1 forwards"), rows)
    print(f"ratio sleep / forwards, worst: {1 + worst:.3f}\n")
    if judged:
        measure.judge("sleep beyond N - 1 forwards, share", worst, at_most=BAR_STALL)


def report_memory(setup: Setup, peaks: list[float], judged: bool) -> None:
    rows = [(str(n), f"{peak:.1f}") for n, peak in zip(setup.memory_tokens, peaks)]
    measure.show(("tokens read", "peak MiB"), rows)
    slope = measure.slope(setup.memory_tokens, peaks) * 10_000 * 2**20 / 1e6
    print(f"growth of the peak per 10k tokens: {slope:.3f} MB")
    if judged:
        measure.judge("MB per 10k tokens", slope, at_most=BAR_MB_PER_10K_TOKENS)


if __name__ == "__main__":
    main()
