"""One run of a study: trains it, or goes on with it, scores it on held-out examples, and writes the result.

``python -m sleeptrain.study.trial FOLDER`` reads ``trial.json`` of the folder. A run is done once its
``result.json`` answers what is asked; what is trained already is not trained again when more is asked of it.
"""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from safetensors.numpy import save

from sleeptrain.checkpoint.durable import replace_file
from sleeptrain.cluster.launch import EXIT_FAILED, work
from sleeptrain.cluster.training_process import die_with_parent
from sleeptrain.config import Config
from sleeptrain.engine import restored
from sleeptrain.engine.evaluation import evaluate
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.engine.resilience import RunLock, RunLockedError
from sleeptrain.engine.resume import versions
from sleeptrain.model.halting import Stop
from sleeptrain.schema import ConfigError, RunError, from_dict, setting, to_dict, with_changes
from sleeptrain.study import probes
from sleeptrain.study.cost import task_of

EXIT_TAKEN = 76  # beside those of the training
CLAIM = "claim"  # whoever trains or scores holds the lock in this folder
TRIAL, RESULT, SCORES, ERROR = "trial.json", "result.json", "scores.safetensors", "error.txt"


@dataclass(frozen=True)
class Request:
    """What is asked of a trained run, on the test split."""

    num_passes: tuple[int, ...] = setting((), "N")
    difficulties: tuple[int, ...] = setting((), "difficulties; empty: the task's own")
    task: dict[str, Any] = setting({}, "settings of the task that differ from those of the training")
    num_examples: int = setting(1024, "examples per difficulty")
    probes: tuple[str, ...] = setting((), "further measurements")
    tolerances: tuple[float, ...] = setting((), "also with the N of the training, until the state settles")
    halt_thresholds: tuple[float, ...] = setting((), "also, where halting is learned, until it reaches this")


def prepare(folder: Path, config: Config, request: Request) -> None:
    """Writes what the run is to be into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    named = with_changes(config, {"run.dir": str(folder), "run.id": folder.name})
    document = json.dumps({"config": to_dict(named), "request": to_dict(request)}, indent=1)
    replace_file(folder / TRIAL, document.encode())


def result_of(folder: Path, request: Request | None = None) -> dict[str, Any] | None:
    """What a run that is done has written; None where it does not answer the request."""
    path = folder / RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if request is None or from_dict(Request, result["request"]) == request else None


def run(folder: Path) -> int:
    """Trains and scores; returns the exit code of the training, or EXIT_TAKEN where another process is at
    it. Why it failed is in ``error.txt``."""
    document = json.loads((folder / TRIAL).read_text())
    config, request = from_dict(Config, document["config"]), from_dict(Request, document["request"])
    try:
        with RunLock(folder / CLAIM):
            return 0 if result_of(folder, request) else _train_and_score(folder, config, request)
    except RunLockedError:
        return EXIT_TAKEN


def is_taken(folder: Path) -> bool:
    """Whether another process makes the run."""
    try:
        RunLock(folder / CLAIM).check()
    except RunLockedError:
        return True
    return False


def _train_and_score(folder: Path, config: Config, request: Request) -> int:
    (folder / ERROR).unlink(missing_ok=True)
    code = _train(config, folder)
    if code:
        return code
    try:
        score(folder, config, request)
    except (ConfigError, RunError) as error:
        replace_file(folder / ERROR, f"{error}\n".encode())
        return EXIT_FAILED
    return 0


def _train(config: Config, folder: Path) -> int:
    """Here, or by torchrun where the run has several processes."""
    frozen = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    if config.cluster.kind != "local_procs":
        return work(config, frozen)
    described = folder / "run.json"
    replace_file(described, json.dumps({"config": to_dict(config), "frozen": frozen}).encode())
    num_workers = config.cluster.workers(config.parallel)
    group = ["--nproc-per-node", str(num_workers), "--max-restarts", str(config.cluster.max_restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *group]
    started = subprocess.Popen([*command, "-m", "sleeptrain.cluster.training_process", str(described)])
    before = signal.signal(signal.SIGTERM, lambda number, frame: started.send_signal(number))
    try:
        return started.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def score(folder: Path, config: Config, request: Request) -> None:
    """Writes ``scores.safetensors`` and then ``result.json``."""
    found = restored.find(folder)
    config = with_changes(config, {f"task.{name}": value for name, value in request.task.items()})
    backend, task = restored.with_weights(found, config), task_of(config.task)
    sizes = (request.num_examples, config.eval.batch_sequences, config.sleep.window_tokens)
    results = {"": evaluate(backend, task, "test", request.num_passes, request.difficulties, *sizes)}
    trained = (config.sleep.num_passes,)
    for name, stop in stops_of(request, config).items():
        results[name] = evaluate(backend, task, "test", trained, request.difficulties, *sizes, stop=stop)
    evaluations = [(stop, one) for stop, of_stop in results.items() for one in of_stop]
    result = {
        "request": to_dict(request),
        "step": found.step,
        "evaluations": [one.summary() | {"stop": stop} for stop, one in evaluations],
        "training": training_summary(folder),
        "probes": {name: probes.PROBES[name](backend) for name in request.probes},
        "versions": versions(),
    }
    arrays = {
        key(name, one.difficulty, one.num_passes, stop): array
        for stop, one in evaluations
        for name, array in one.scores.items()
    }
    replace_file(folder / SCORES, save({name: array.astype(np.float32) for name, array in arrays.items()}))
    replace_file(folder / RESULT, json.dumps(result, indent=1).encode())


def stops_of(request: Request, config: Config) -> dict[str, Stop]:
    """By name, the rules by which sequences stop before all passes are made, where there is more than one."""
    if config.sleep.num_passes == 1:
        return {}
    if config.sleep.halting == "learned":
        return {f"threshold {h:g}": Stop(halt_threshold=h) for h in request.halt_thresholds}
    return {f"tolerance {tolerance:g}": Stop(tolerance=tolerance) for tolerance in request.tolerances}


def key(metric: str, difficulty: int, num_passes: int, stop: str) -> str:
    """The name of the scores of single examples."""
    return "/".join([metric, str(difficulty), str(num_passes), *([stop] if stop else [])])


def training_summary(folder: Path) -> dict[str, Any]:
    """Seconds and speed over the rows of the training, and its last held-out figures."""
    rows = read_metrics(folder)
    trained = [row for row in rows if "train/step_seconds" in row]
    evaluated = [row for row in rows if "eval_seconds" in row]
    steps = np.diff([0, *(row["step"] for row in trained)])
    return {
        "seconds": float(sum(n * row["train/step_seconds"] for n, row in zip(steps, trained))),
        "tokens_per_second": median(row["train/tokens_per_second"] for row in trained),
        "memory_gib": max(row["train/memory_gib"] for row in trained),
        "validation": {k: v for k, v in evaluated[-1].items() if k.startswith("eval/") and k.count("/") == 1},
    }


def main(arguments: list[str]) -> int:
    die_with_parent()
    return run(Path(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
