"""A Slurm of two nodes on this machine: the real daemons, in a folder of their own."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("fake1", "fake2")
CLEANUP_SECONDS = 4.0
CONFIG = """\
ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=5
NodeName=fake1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=fake2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=fake1,fake2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in (*DAEMONS, "sbatch", "srun", "scontrol") if not shutil.which(_path(name))]


class Slurm:
    """Context manager: the daemons run inside of it."""

    def __init__(self) -> None:
        self._temp = tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp")  # sockets want a short path
        self.folder = Path(self._temp.name)
        self.environ = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Slurm":
        folder = self.folder
        for name in ("munge", "state", *(f"spool_{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o711)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        user = os.environ.get("USER") or "root"
        text = CONFIG.format(folder=folder, host=host, user=user, ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text)
        munge = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self._start("munged", "-F", "--force", *(f"--{o}={folder}/munge/{name}" for o, name in munge.items()))
        _wait(lambda: (folder / "munge" / "socket").exists())
        self._start("slurmctld", "-D", "-i")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        _wait(lambda: self.call("sinfo", "-h", "-o", "%D %t", check=False).strip() == "2 idle")
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "-u", os.environ.get("USER") or "root", check=False)
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._temp.cleanup()

    def call(self, program: str, *arguments: str, check: bool = True, **options: object) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            [_path(program), *arguments],
            env=os.environ | self.environ,
            capture_output=True,
            text=True,
            timeout=120,
            **options,  # type: ignore[call-overload]
        )
        assert not check or done.returncode == 0, done.stderr
        return str(done.stdout)

    def submit(self, cwd: Path, *arguments: str) -> str:
        """The number of the job that ``sbatch`` makes."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def field(self, job: str, name: str) -> str:
        """What ``scontrol show job`` says of it."""
        fields = self.call("scontrol", "show", "job", job, "-o").split()
        return next(value for key, _, value in (f.partition("=") for f in fields) if key == name)

    def wait_for(self, job: str, states: Sequence[str], seconds: float = 180.0) -> str:
        """Until the job is in one of the states; a requeued one need not wait its two minutes, but until what
        it was before is cleaned up."""
        deadline, waits_since = time.monotonic() + seconds, None
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"{state}, not {states}"
            waits_since = (waits_since or time.monotonic()) if state == "PENDING" else None
            if waits_since and time.monotonic() > waits_since + CLEANUP_SECONDS:
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.3)
        return state

    def bring_back(self, node: str) -> None:
        """A node that was set DOWN; it may be back by itself, once its daemon has told that it lives."""

        def is_back() -> bool:
            self.call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return self.call("sinfo", "-h", "-n", node, "-o", "%t").strip() in ("idle", "mix", "alloc")

        _wait(is_back)

    def _start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    [_path(name), *arguments],
                    env=os.environ | self.environ,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )


def _path(name: str) -> str:
    """Debian has daemons where a user's PATH has not."""
    return shutil.which(name) or f"/usr/sbin/{name}"


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
