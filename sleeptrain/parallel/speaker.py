"""Who says on the terminal what ends a run: of several processes that have it to say, the lowest.

They hear of each other through the store where they met or, before that, the one that torchrun keeps for
them. Without either (srun, before they met) each speaks for itself.
"""

import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

KEY = "sleeptrain/sentence"
MET_SECONDS = (
    1.25  # how far apart processes may be that work together; twice that is less than failure.py waits
)
STARTED_SECONDS = 10.0  # the same of processes that were only started together
POLL_SECONDS = 0.05


def say(sentence: str) -> None:
    """Prints it to standard error unless another process has. Each that has it to say calls this once, before
    it ends."""
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if is_alone or _is_first():
        print(sentence, file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Rank 0 is at once. The others leave it some time to come as far, the higher ones more of it."""
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = _store()
    except Exception:  # of any kind: nobody to listen to
        return True
    patience = (MET_SECONDS if dist.is_initialized() else STARTED_SECONDS) * (1 + rank / size)
    deadline = time.monotonic() + (patience if rank else 0)
    try:
        while time.monotonic() < deadline:
            if store.check(["said"]):
                time.sleep(POLL_SECONDS)  # torchrun ends all when the first of them ends: not before it spoke
                return False
            time.sleep(POLL_SECONDS)
        return store.compare_set("said", "", str(rank)) == str(rank).encode()
    except Exception:  # of any kind: the store went with rank 0, which said why
        return rank == 0


def _store() -> "Store":
    """Raises LookupError where there is none yet, an error of torch where it is gone."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.PrefixStore(KEY, dist.distributed_c10d._get_default_store())
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        raise LookupError("the processes have not met")
    address, patience = os.environ["MASTER_ADDR"], timedelta(seconds=STARTED_SECONDS)
    store = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), timeout=patience, wait_for_workers=False)
    return dist.PrefixStore(f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
