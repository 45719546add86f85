"""What Slurm says of a task, in the words of torchrun."""

import re
import shutil
import subprocess
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 20000, 10000  # below those that Linux hands out by itself


def num_tasks(environ: Mapping[str, str]) -> int | None:
    """Of the step that srun started; None outside of one (in a batch script, or without Slurm)."""
    if "SLURM_STEP_NUM_TASKS" not in environ or "SLURM_PROCID" not in environ:
        return None
    return int(environ["SLURM_STEP_NUM_TASKS"])


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK and its company. MASTER_ADDR and MASTER_PORT stay where they are set already."""
    first_node = environ["SLURM_STEP_NODELIST"]
    port = FIRST_PORT + int(environ["SLURM_JOB_ID"]) % NUM_PORTS
    tasks_per_node = expand(environ["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or address_of(first_host(first_node)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def expand(counts: str) -> list[int]:
    """``2(x3),1`` -> [2, 2, 2, 1]."""
    found: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found


def first_host(nodes: str) -> str:
    """``gpu[07-09,12],login`` -> ``gpu07``."""
    matched = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    assert matched, nodes
    return "".join(part or "" for part in matched.groups())


def address_of(host: str) -> str:
    """The address under which Slurm itself reaches the node, or else its name."""
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "node", host, "-o"], capture_output=True, text=True)
        if found := re.search(r"\bNodeAddr=(\S+)", shown.stdout):
            return found[1]
    return host
