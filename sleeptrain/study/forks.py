"""Processes that begin with all imports behind them: forks of a server that made them once."""

import multiprocessing
from multiprocessing.context import ForkServerContext

# The second is what every optimizer of torch imports when it is made: 800 modules. The third draws the
# learning curve of a run.
IMPORTS = ["sleeptrain.study.trial", "torch._dynamo", "matplotlib.pyplot"]


def forks() -> ForkServerContext:
    """For ``Process`` and ``Pool``. Not plain forks: these would hold locks of threads that they do not
    have."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context
