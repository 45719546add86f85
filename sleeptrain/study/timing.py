"""How long a step of each model of a study takes here, and how much memory: a few steps of each, in turn.

A shape is timed in a forked process of its own, several times, with those of the others in between: what
else the machine does then falls on all of them. The median counts. Written to ``timings.json`` of the
study's folder, so that a plan does not change by being looked at again.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.config import Config
from sleeptrain.engine.metrics import peak_memory_gib
from sleeptrain.parallel.backend import LocalBackend, choose_device
from sleeptrain.schema import with_changes
from sleeptrain.study.cost import stream_of, task_of
from sleeptrain.study.forks import forks
from sleeptrain.study.plan import shape_id

FILE = "timings.json"
ROUNDS, WARMUP_STEPS, TIMED_STEPS = 3, 1, 3
MOST_CPU_TOKENS = 4096  # of a step; beyond that a CPU takes as long as there are tokens


class Timing(NamedTuple):
    """``step_seconds`` of one optimizer step; ``memory_mib``: peak beyond what the process had before."""

    step_seconds: float
    memory_mib: float
    device: str


def read_timings(folder: Path) -> dict[str, Timing]:
    """By shape."""
    path = folder / FILE
    return {k: Timing(**v) for k, v in json.loads(path.read_text()).items()} if path.exists() else {}


def measure(folder: Path, configs: Sequence[Config]) -> dict[str, Timing]:
    """Those of ``configs`` that are not known yet; returns all."""
    known = read_timings(folder)
    missing = {shape_id(config): config for config in configs if shape_id(config) not in known}
    found: dict[str, list[Timing]] = {shape: [] for shape in missing}
    todo = [(shape, config) for _ in range(ROUNDS) for shape, config in missing.items()]
    with forks().Pool(1, maxtasksperchild=1) as pool:
        timed = pool.imap(time_steps, [config for _, config in todo])
        bar = tqdm(timed, desc="timing a step of each model", total=len(todo), disable=not todo, leave=False)
        for (shape, _), timing in zip(todo, bar):
            found[shape].append(timing)
    for shape, timings in found.items():
        seconds, memory = (median(column) for column in list(zip(*timings))[:2])
        known[shape] = Timing(seconds, memory, timings[0].device)
    known |= read_timings(folder)  # where another process was first, all go by what it found
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        document = {shape: timing._asdict() for shape, timing in known.items()}
        replace_file(folder / FILE, json.dumps(document, indent=1).encode())
    return known


def time_steps(config: Config) -> Timing:
    """A few steps of a run, here."""
    device = choose_device(config.run.device)
    torch.set_num_threads(config.run.num_threads or torch.get_num_threads())
    sequences = config.data.batch_sequences
    enough = max(1, MOST_CPU_TOKENS // config.task.sequence_tokens)
    if device.type == "cpu" and sequences > enough:
        few = {"data.batch_sequences": enough, "data.micro_batch_sequences": None, "data.num_streams": None}
        config = with_changes(config, few)
    scale = sequences / config.data.batch_sequences
    vocab_size = config.model.rounded_vocab(task_of(config.task).vocab_size)
    backend, stream = LocalBackend(config, vocab_size), stream_of(config)
    before, seconds = peak_memory_gib(device), []
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        loss = backend.forward_backward(stream.batch(step), config.sleep.num_passes).loss
        backend.step(1e-3, loss)
        seconds.append(scale * (time.perf_counter() - start))
    stream.close()
    memory = 1024 * (peak_memory_gib(device) - before)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Timing(median(seconds[WARMUP_STEPS:]), memory, name)
