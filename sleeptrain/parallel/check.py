"""Whether a run can be spread as asked: all checks of degrees, before anything expensive starts."""

from sleeptrain.config import Config
from sleeptrain.parallel.layout import blocks_of_stage, check_tensor_size
from sleeptrain.parallel.rows import check_rows
from sleeptrain.parallel.topology import check_world
from sleeptrain.schema import ConfigError


def check_degrees(config: Config, vocab_size: int, sequence_tokens: int, world_size: int) -> int:
    """The data-parallel degree; raises ConfigError where heads, layers, vocabulary, rows or windows do
    not divide."""
    parallel = config.parallel
    replicas = check_world(parallel, world_size)
    check_tensor_size(config.model, vocab_size, parallel.tensor_size)
    blocks_of_stage(config.model, 0, parallel.pipeline_size)
    check_rows(config, replicas)
    if parallel.sequence_parallel:
        _check_windows(config, sequence_tokens)
    return replicas


def _check_windows(config: Config, sequence_tokens: int) -> None:
    size, length = config.parallel.tensor_size, config.window_tokens
    for tokens in {min(length, sequence_tokens), sequence_tokens % length or length}:
        if tokens % size:
            raise ConfigError(
                f"parallel.sequence_parallel=true splits windows over parallel.tensor_size={size} ranks, and "
                f"one has {tokens} tokens; leave sequence_parallel out, or change sleep.window_tokens"
            )
