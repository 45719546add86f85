"""A Ray cluster on this machine: the real daemons, started as a user does, in a folder of their own."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
QUICK = {  # a node that is gone is noticed within seconds
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
LAUNCHED = dict(re.findall(r"^(RAY_\w+)=(.*)", (ROOT / "launchers" / "ray.env").read_text(), re.MULTILINE))
STOP_WAITS = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}  # as launchers/runtime_env.yaml says
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # as launchers/ray_local.sh does


def take_turn(alone: bool = False) -> IO[str]:
    """Until the file is closed, tests that run beside this one start no Ray if ``alone``, and else wait with
    being alone: ``ray symmetric-run`` refuses a machine on which a Ray runs."""
    lock = (Path(tempfile.gettempdir()) / "sleeptrain_tests_ray.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    return lock


class Ray:
    """Context manager: a head with ``num_cpus`` inside of it, and the nodes that ``add_node`` starts. Without
    ``on_loopback`` it listens on the network, as a cluster of several machines must."""

    def __init__(self, num_cpus: int = 2, authenticated: bool = True, on_loopback: bool = True) -> None:
        self.num_cpus, self.on_loopback = num_cpus, on_loopback
        self.port, self.dashboard_port = free_port(), free_port()
        self.token = secrets.token_hex(32)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environ = without | LAUNCHED | QUICK | {"PATH": path, "PYTHONPATH": str(ROOT)}
        self.environ |= LOOPBACK if on_loopback else {}
        self.environ |= auth if authenticated else {"RAY_AUTH_MODE": "disabled"}

    def __enter__(self) -> "Ray":
        self._turn = take_turn()
        self._temp = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")  # sockets want a short path
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", "--include-dashboard=true"]
        ports.append(f"--ray-client-server-port={free_port()}")
        self._start("--head", *ports, f"--temp-dir={self._temp.name}")
        wait_for(lambda: listens(self.dashboard_port), 60)  # it comes after ray start has returned
        return self

    def __exit__(self, *_: object) -> None:
        pids = self.processes()
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        wait_for(lambda: not any(map(is_alive, pids)), 20)
        self._temp.cleanup()
        self._turn.close()

    def add_node(self, num_cpus: int = 1) -> int:
        """Another node on this machine; the process id of its raylet."""
        before = set(self.processes("raylet/raylet"))
        self._start(f"--address=localhost:{self.port}", num_cpus=num_cpus)
        (raylet,) = set(self.processes("raylet/raylet")) - before
        return raylet

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def processes(self, program: str = "") -> list[int]:
        """Of this cluster: those with its folder or port in their command line, and what they started."""
        commands, children, found = {}, defaultdict(list), {}
        for process in psutil.process_iter(["ppid", "cmdline"]):
            commands[process.pid] = " ".join(process.info["cmdline"] or ())
            children[process.info["ppid"]].append(process.pid)
        marks = (self._temp.name, f"--address=127.0.0.1:{self.port} ")
        unseen = [pid for pid, command in commands.items() if any(mark in command for mark in marks)]
        while unseen:
            pid = unseen.pop()
            found[pid] = commands.get(pid, "")
            unseen += [child for child in children[pid] if child not in found]
        return [pid for pid, command in found.items() if program in command and pid != os.getpid()]

    def drivers(self) -> list[int]:
        """Of the jobs that run: not the shells around them."""
        pids = self.processes("sleeptrain.pretrain")
        return [pid for pid in pids if psutil.Process(pid).cmdline()[1:3] == ["-m", "sleeptrain.pretrain"]]

    def submit(self, *settings: str, name: str = "") -> subprocess.Popen[str]:
        """``ray job submit`` over HTTP, as launchers/ray_submit.sh does; it follows the job's log."""
        named = ["--submission-id", name] if name else []
        return subprocess.Popen(
            [
                *("ray", "job", "submit", "--address", self.dashboard, *named),
                *("--runtime-env-json", json.dumps({"env_vars": STOP_WAITS}), "--"),
                *("python", "-m", "sleeptrain.pretrain", "cluster=ray", *settings),
            ],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ask(self, path: str, method: str = "GET") -> Any:
        """What the REST API of jobs answers: it does as the commands of ``ray job``, without their start."""
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def call(self, *arguments: str) -> str:
        """The output of a command of ``ray``."""
        done = subprocess.run(
            ["ray", *arguments], env=self.environ, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    def _start(self, *arguments: str, num_cpus: int | None = None) -> None:
        size = [f"--num-cpus={num_cpus or self.num_cpus}", "--object-store-memory=80000000"]
        # Jobs go through the agent of a node, which stays mute where another cluster has its port.
        size.append(f"--dashboard-agent-listen-port={free_port()}")
        done = subprocess.run(
            ["ray", "start", *arguments, *size],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
