"""Training on one GPU: tokens per second over N and window, with activation checkpointing, and the paper's.

A step is forward and backward of two sequences of 12,288 tokens, one after the other, and an update: all
windows but the last are slept on, and that one predicts. The model is Ouro 1.4B with 6 Jet blocks
(configs/model/ouro_1b4_jet.yaml) at random weights, in bfloat16 over float32 weights. MFU counts the FLOPs of
the model, HFU also those that are computed again, over the dense bfloat16 peak of the device. The ratio is
ours over the paper's tokens per second on one H200 (its Fig. 6). A pass is started kernel by kernel, or
replayed as a CUDA graph (run.cuda_graphs); the ratio of the two is that of whole steps. Compiled: also norms,
SwiGLU and rotary positions fused by torch.compile (run.compile). Memory per pass is the slope of the peak
over N, beside h and S, which are all that a pass must keep.

First come the gradient check of the kernels, in the sizes of the model, and the seconds from the start of
this program to the end of its first step, kernels compiled: that is from cold only with an empty folder in
TRITON_CACHE_DIR; and whether replayed passes have the loss and the gradients of those started one by one.
Last comes what deterministic algorithms cost, and whether two equal steps then have equal bits. A setting
that fails is named, and the others are measured.

--profile FOLDER also writes a trace of one step of one sequence (Perfetto, chrome://tracing) and prints the
operations that take most of it. With --quick a tiny model on any device: does it run?
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import measure
import torch

from sleeptrain.config import Config, DataConfig, ModelConfig, RunConfig, SleepConfig, TextConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.flops import FLOAT32_BYTES, peak_flops, training_flops
from sleeptrain.model.pointwise import PLAIN, use
from sleeptrain.model.visits import plan
from sleeptrain.parallel.backend import LocalBackend, speed_up
from sleeptrain.parallel.kernel_check import check_kernels

NO_DEVICE = 2  # exit code
STARTED = time.perf_counter()
WARMUP_STEPS = 2
BAR, BAR_GRAPHS, BAR_SLOPE, BAR_DETERMINISTIC = 1.5, 2.0, 1.3, 1.1
BAR_FIRST_STEP_SECONDS, BAR_GRAPHS_DIFFER = 90, 0.02
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


class Variant(NamedTuple):
    """How a pass is run: ``sleep.activation_checkpointing``, whether as a graph, whether by torch.compile."""

    policy: str
    graphs: bool
    is_compiled: bool = False

    def __str__(self) -> str:
        way = "graphs" if self.graphs else "kernel by kernel"
        return f"checkpointing {self.policy}, {way}{', compiled' if self.is_compiled else ''}"


EAGER, GRAPHED, COMPILED = Variant("pass", False), Variant("pass", True), Variant("pass", True, True)


class Setup(NamedTuple):
    """Sizes of a measurement."""

    model: ModelConfig = OURO_JET
    vocab_size: int = 49152
    num_sequences: int = 2
    num_tokens: int = 12_288
    windows: tuple[int, ...] = (2048, 1024, 4096)
    num_passes: tuple[int, ...] = (1, 2, 4)
    variants: tuple[Variant, ...] = (EAGER, GRAPHED, COMPILED, Variant("both", True, True))


QUICK = Setup(ModelConfig(d_model=32, norm_placement="sandwich"), 64, 1, 48, (24,), (1, 2), (EAGER, GRAPHED))


class Planned(NamedTuple):
    """What a step does: tokens that pass through the looped blocks, passes of one sequence, FLOPs."""

    pass_tokens: int
    num_passes: int
    model_flops: float
    hardware_flops: float


class Measured(NamedTuple):
    """Medians in seconds: forward and backward, update; and the peak of the device's memory in bytes, of
    tensors that PyTorch sees."""

    backward: float
    update: float
    peak_bytes: int
    reserved_bytes: int  # at the peak, with the memory of graphs, in which a replayed pass has its tensors

    @property
    def step(self) -> float:
        return self.backward + self.update


def main() -> None:
    parser = measure.parser(__doc__ or "", rounds=3)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="trace a step with N = 1")
    parser.add_argument("--windows", type=int, nargs="+", metavar="TOKENS", help="these alone")
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        print("error: train_gpu.py measures a CUDA device, and torch sees none here", file=sys.stderr)
        sys.exit(NO_DEVICE)
    measure.begin()
    setup = QUICK if options.quick else Setup()
    if options.windows:
        setup = setup._replace(windows=tuple(options.windows))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("device:", torch.cuda.get_device_name() if device == "cuda" else "cpu")
    if device == "cuda":
        print("gradient check of the kernels, in the sizes of the model")
        check_kernels(config_of(setup, device))
    backend = LocalBackend(config_of(setup, device), setup.vocab_size)
    first_step(backend, setup, judged=not options.quick)
    compare_graphs(backend, setup)
    for window_tokens in setup.windows:
        seconds: dict[Variant, dict[int, float]] = {}
        for variant in setup.variants:
            found = over_passes(backend, setup, window_tokens, variant, options.rounds)
            seconds[variant] = {n: measured.step for n, (_, measured) in found.items()}
            show(setup, window_tokens, variant, found)
            if device == "cuda" and len(found) > 1:
                show_slope(setup, window_tokens, found)
        for n in seconds[EAGER].keys() & seconds[GRAPHED].keys():
            ratio = seconds[EAGER][n] / seconds[GRAPHED][n]
            print(f"ratio kernel by kernel / graphs, windows of {window_tokens}, N = {n}: {ratio:.3f}")
            if not options.quick and window_tokens == 2048:
                measure.judge(f"graphs, N = {n}", ratio, at_least=BAR_GRAPHS)
    determinism(backend, setup, options.rounds, judged=not options.quick)
    if options.profile:
        profile(backend, setup, options.profile)


def config_of(setup: Setup, device: str) -> Config:
    return Config(
        run=RunConfig(device=device),  # type: ignore[arg-type]
        model=setup.model,
        task=TextConfig(sequence_tokens=setup.num_tokens),
        sleep=SleepConfig(setup.windows[-1]),
        data=DataConfig(batch_sequences=setup.num_sequences, micro_batch_sequences=1),
    )


def first_step(backend: LocalBackend, setup: Setup, judged: bool) -> None:
    window_tokens = setup.windows[0]
    prepared(backend, setup, window_tokens, EAGER, setup.num_passes[-1])[0]()
    seconds = time.perf_counter() - STARTED
    print(f"seconds to the end of the first step: {seconds:.1f}")
    if judged:
        measure.judge("seconds to the first step", seconds, at_most=BAR_FIRST_STEP_SECONDS)


def over_passes(
    backend: LocalBackend, setup: Setup, window_tokens: int, variant: Variant, rounds: int
) -> dict[int, tuple[Planned, Measured]]:
    """By N, but for those that fail."""
    found = {}
    for num_passes in setup.num_passes:
        try:
            step, planned = prepared(backend, setup, window_tokens, variant, num_passes)
            found[num_passes] = planned, timed(step, backend.device.type == "cuda", rounds)
        except Exception as error:  # out of memory, or what a compiler raises
            print(f"FAIL  N = {num_passes}, windows of {window_tokens}, {variant}: {measure.failure(error)}")
            for parameter in backend.model.parameters():
                parameter.grad = None
    return found


def compare_graphs(backend: LocalBackend, setup: Setup) -> None:
    """Loss and norm of the gradient of replayed passes over those of passes started kernel by kernel."""
    window_tokens, num_passes = setup.windows[0], 2
    found = []
    for variant in (GRAPHED, EAGER):
        prepared(backend, setup, window_tokens, variant, num_passes)
        loss = backend.forward_backward(make_batch(setup, window_tokens), num_passes).loss
        gradients = [p.grad for p in backend.model.parameters() if p.grad is not None]
        found.append((float(loss), float(torch.nn.utils.get_total_norm(gradients))))
        for parameter in backend.model.parameters():
            parameter.grad = None
    for name, replayed, started in zip(("loss", "gradient norm"), *found):
        ratio = replayed / started
        print(f"ratio {name}, graphs / kernel by kernel: {ratio:.5f}")
        measure.judge(f"{name} of graphs", abs(ratio - 1), at_most=BAR_GRAPHS_DIFFER)


def show(
    setup: Setup, window_tokens: int, variant: Variant, found: dict[int, tuple[Planned, Measured]]
) -> None:
    """The table of a variant, and how its speed stands to the paper's."""
    is_cuda = torch.cuda.is_available()
    peak = peak_flops(torch.cuda.get_device_name()) if is_cuda else None
    rows, ratios = [], {}
    for num_passes, (planned, measured) in found.items():
        speed = setup.num_sequences * setup.num_tokens / measured.step
        published = PAPER.get((window_tokens, num_passes))
        if published:
            ratios[num_passes] = speed / published
        rows.append(
            (
                str(num_passes),
                f"{measured.step:.3f}",
                f"{1e3 * measured.update:.0f}",
                f"{speed:,.0f}",
                f"{planned.pass_tokens / measured.step:,.0f}",
                share(planned.model_flops / measured.step, peak),
                share(planned.hardware_flops / measured.step, peak),
                f"{measured.peak_bytes / 2**30:.1f}" if is_cuda else "-",
                f"{measured.reserved_bytes / 2**30:.1f}" if is_cuda else "-",
                f"{speed / published:.2f}" if published else "-",
            )
        )
    print(f"\nwindows of {window_tokens}, {variant}")
    speeds = ("N", "s/step", "update ms", "tokens/s", "pass-tokens/s", "MFU %", "HFU %")
    measure.show((*speeds, "peak GiB", "reserved", "over paper"), rows)
    for num_passes, ratio in ratios.items():
        name = f"tokens/s over the paper's, N = {num_passes}, windows of {window_tokens}, {variant}"
        print(f"ratio {name}: {ratio:.3f}")
        measure.judge(name, ratio, at_least=BAR)


def show_slope(setup: Setup, window_tokens: int, found: dict[int, tuple[Planned, Measured]]) -> None:
    """Bytes that one more pass over one window adds to the peak, over those of h and S."""
    counts = [planned.num_passes for planned, _ in found.values()]
    slope = measure.slope(counts, [measured.peak_bytes for _, measured in found.values()])
    model = setup.model
    num_memories = sum(block.is_fast_weight for block in model.blocks)
    memory = num_memories * model.memory_heads * model.memory_key_dim * model.memory_value_dim
    ratio = slope / (FLOAT32_BYTES * (window_tokens * model.d_model + memory))
    print(f"ratio peak memory per pass / h and S: {ratio:.3f} ({slope / 2**20:.1f} MiB)")
    measure.judge("peak memory per pass / h and S", ratio, at_most=BAR_SLOPE)


def prepared(
    backend: LocalBackend, setup: Setup, window_tokens: int, variant: Variant, num_passes: int
) -> tuple[Callable[[], float], Planned]:
    """A whole step, which returns the seconds of its update, and what is known of it beforehand. The weights
    stay those of the step before."""
    sleep = SleepConfig(window_tokens, num_passes, activation_checkpointing=variant.policy)  # type: ignore[arg-type]
    backend.model.sleep, batch = sleep, make_batch(setup, window_tokens)
    backend.model.graphs = None
    use(backend.model, PLAIN)
    gc.collect()  # graphs and their kinds of passes know each other
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()
    run = replace(backend.config.run, cuda_graphs=variant.graphs, compile=variant.is_compiled)
    speed_up(backend.model, replace(backend.config, run=run, sleep=sleep))
    windows = backend.model.windows(batch)
    visits = plan(windows, num_passes, setup.model, sleep)
    cost = training_flops(setup.model, sleep, windows, visits, setup.vocab_size)
    of_core = [windows[v.window].stop - windows[v.window].start for v in visits if v.segment == "core"]
    num_sequences = setup.num_sequences

    def step() -> float:
        result = backend.forward_backward(batch, num_passes)
        wait(backend.device)
        start = time.perf_counter()
        assert backend.step(1e-3, result.loss).applied
        wait(backend.device)
        return time.perf_counter() - start

    totals = (num_sequences * sum(of_core), len(of_core), num_sequences * cost.model)
    return step, Planned(*totals, num_sequences * cost.hardware)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_batch(setup: Setup, window_tokens: int) -> Batch:
    """Random tokens, a loss on the last window."""
    shape, draw = (setup.num_sequences, setup.num_tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(setup.vocab_size, shape, generator=draw)
    num_windows = setup.num_tokens // window_tokens
    loss_mask = torch.zeros_like(ids, dtype=torch.bool)
    loss_mask[:, -window_tokens:] = True
    return Batch(
        ids=ids,
        targets=ids.roll(-1, 1),
        loss_mask=loss_mask,
        valid=None,
        reset_state=None,
        difficulty=torch.zeros(setup.num_sequences, dtype=torch.int64),
        windows_with_loss=(*[False] * (num_windows - 1), True),
        num_targets=setup.num_sequences * window_tokens,
    )


def timed(step: Callable[[], float], is_cuda: bool, rounds: int) -> Measured:
    for _ in range(WARMUP_STEPS):
        step()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    steps, updates = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        updates.append(step())
        steps.append(time.perf_counter() - start)
    update = median(updates)
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if is_cuda else (0, 0)
    return Measured(median(steps) - update, update, *peaks)


def determinism(backend: LocalBackend, setup: Setup, rounds: int, judged: bool) -> None:
    """A step with deterministic algorithms only, in turn with one without; and twice the same gradients."""
    window_tokens, num_passes = setup.windows[0], setup.num_passes[-1]
    step, _ = prepared(backend, setup, window_tokens, EAGER, num_passes)
    batch = make_batch(setup, window_tokens)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as in a run

    def under(mode: str) -> Callable[[], float]:
        def run() -> float:
            torch.set_deterministic_debug_mode(mode)
            return step()

        return run

    times = measure.interleaved({mode: under(mode) for mode in ("error", "default")}, rounds)
    ratio = measure.ratio(times["error"], times["default"])
    print(f"\nratio deterministic / not, windows of {window_tokens}, N = {num_passes}: {ratio}")
    torch.set_deterministic_debug_mode("error")
    found = []
    for _ in range(2):
        backend.forward_backward(batch, num_passes)
        found.append([p.grad for p in backend.model.parameters() if p.grad is not None])
        for parameter in backend.model.parameters():
            parameter.grad = None
    torch.set_deterministic_debug_mode("default")
    is_equal = all(torch.equal(a, b) for a, b in zip(*found))
    print(f"{'PASS' if is_equal else 'FAIL'}  two deterministic steps have equal gradients")
    if judged:
        measure.judge("deterministic / not", ratio.wall, at_most=BAR_DETERMINISTIC)


def share(flops_per_second: float, peak: float | None) -> str:
    return f"{100 * flops_per_second / peak:.1f}" if peak else "-"


def profile(backend: LocalBackend, setup: Setup, folder: Path) -> None:
    """One step of one sequence with N = 1: more are the same again, and all of it is too much to look at."""
    setup = setup._replace(num_sequences=1)
    window_tokens, num_passes, variant = setup.windows[0], 1, EAGER
    step, _ = prepared(backend, setup, window_tokens, variant, num_passes)
    for _ in range(WARMUP_STEPS):
        step()
    kind = "CUDA" if backend.device.type == "cuda" else "CPU"
    activities = [getattr(torch.profiler.ProfilerActivity, kind)]
    with torch.profiler.profile(activities=activities) as trace:
        step()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_n{num_passes}_window{window_tokens}_{variant.policy}.json.gz"
    trace.export_chrome_trace(str(path))
    order = f"self_{backend.device.type}_time_total"
    print(trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
