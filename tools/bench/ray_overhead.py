"""What Ray costs a step: the same run under torchrun and as a run on a Ray cluster.

Once with a process less than the machine has cores, so that Ray's daemons have one, as they have beside GPUs;
and once with a process on every core, where they take their time from the training.

Each round runs both, in folders of their own, on a cluster of this machine that is started for it. A figure
is the median of train/step_seconds over the rows of a run, the first ones left out; then the median of the
rounds. No time outside of steps counts: Ray's own start is shown beside it.
"""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import measure
import psutil

SETTINGS = ("experiment=quickstart", "run.device=cpu", "run.num_threads=1", "eval.every_steps=0")
LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
NUM_CORES = len(os.sched_getaffinity(0))
WARMUP_ROWS = 2
BAR = 1.05


def main() -> None:
    options = measure.parser(__doc__ or "", rounds=5).parse_args()
    measure.begin(["ray"])
    settings = [*SETTINGS, "log.every_steps=2", f"optim.num_steps={12 if options.quick else 40}"]
    if options.quick:
        settings += ["model.d_model=32", "data.batch_sequences=4"]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name:  # Ray's sockets want a short path
        environment = start_ray(Path(name) / "ray")
        try:
            for num_workers in {NUM_CORES} if options.quick else sorted({max(1, NUM_CORES - 1), NUM_CORES}):
                folder = Path(name) / f"of_{num_workers}"
                compare(num_workers, folder, settings, environment, options.rounds, options.quick)
        finally:
            stop_ray(Path(name) / "ray")


def compare(
    num_workers: int,
    folder: Path,
    settings: list[str],
    environment: dict[str, str],
    rounds: int,
    quick: bool,
) -> None:
    """Prints the steps of so many processes."""
    found: dict[str, list[tuple[float, float]]] = {"torchrun": [], "ray": []}
    for number in range(rounds):
        for side in found:
            where = [f"cluster.num_workers={num_workers}", f"run.dir={folder}/{side}_{number}"]
            found[side].append(run(side, folder / f"{side}_{number}", [*settings, *where], environment))
    rows = []
    for side, runs in found.items():
        steps, wholes = (median(values) for values in zip(*runs))
        rows.append((side, f"{1e3 * steps:.1f}", f"{wholes:.1f}"))
    processes = f"{num_workers} processes on {NUM_CORES} cores"
    print(f"\nmedians over {rounds} rounds, {processes}")
    measure.show(("", "ms per step", "whole run s"), rows)
    ratio = median(ours[0] / theirs[0] for ours, theirs in zip(found["ray"], found["torchrun"]))
    print(f"ratio step under ray / under torchrun, {processes}: {ratio:.3f}")
    if not quick:
        measure.judge(f"step under ray / under torchrun, {processes}", ratio, at_most=BAR)


def run(side: str, folder: Path, settings: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds per step and of the whole run."""
    cluster = "ray" if side == "ray" else "local_procs"
    start = time.perf_counter()
    command = [sys.executable, "-m", "sleeptrain.pretrain", *settings, f"cluster={cluster}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    seconds = time.perf_counter() - start
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [row["train/step_seconds"] for row in rows if "train/step_seconds" in row]
    return median(steps[WARMUP_ROWS:]), seconds


def start_ray(folder: Path) -> dict[str, str]:
    """A head by the launcher, with a token of its own; the environment of its users."""
    environment = os.environ | dict(
        re.findall(r"^(RAY_\w+)=(.*)", (LAUNCHERS / "ray.env").read_text(), re.MULTILINE)
    )
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # who joins a cluster on loopback needs it, too
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    size = [f"--num-cpus={NUM_CORES}", "--object-store-memory=80000000", f"--temp-dir={folder}", "--port=0"]
    command = [str(LAUNCHERS / "ray_local.sh"), "--include-dashboard=false", *size]
    started = subprocess.run(command, env=environment, capture_output=True, text=True)
    if started.returncode:
        raise SystemExit(started.stdout + started.stderr)
    address = (folder / "ray_current_cluster").read_text().strip()
    return environment | {"RAY_ADDRESS": address}


def stop_ray(folder: Path) -> None:
    """That of this benchmark alone, where ``ray stop`` would end every cluster on the machine."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()):
                for one in (*process.children(recursive=True), process):
                    one.kill()


if __name__ == "__main__":
    main()
