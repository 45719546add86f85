"""Before a run: do the kernels that write its fast weights compute what the recurrence computes, here?"""

import torch

from sleeptrain.config import Config
from sleeptrain.memory.dispatch import KERNELS
from sleeptrain.parallel.backend import choose_device, compute_dtype, memory_backend
from sleeptrain.parallel.rows import micro_batch_of


def check_kernels(config: Config, num_replicas: int = 1) -> None:
    """A few problems of the run's rule, sizes and type on this process's device, all gradients against the
    recurrence in float64. Nothing to do where torch alone runs the rule, as on a CPU.

    Raises ConfigError where one is wrong: trying again would not help.
    """
    model, backend = config.model, memory_backend(config).backend
    if backend not in KERNELS or not any(block.is_fast_weight for block in model.blocks):
        return
    from sleeptrain.memory.kernels.check import Case, check_run

    device = choose_device(config.run.device)
    run = Case(
        rule=model.rule,
        num_sequences=micro_batch_of(config, config.data.batch_sequences // num_replicas),
        num_tokens=config.window_tokens,
        num_heads=model.memory_heads // config.parallel.tensor_size,
        num_key_heads=model.qk_heads // config.parallel.tensor_size,
        key_dim=model.memory_key_dim,
        value_dim=model.memory_value_dim,
        dtype=compute_dtype(config, device),
    )
    check_run(run, device.type, backend)
    if device.type == "cuda":  # what it took is no part of the run's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
