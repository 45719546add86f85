"""Whether a run can be spread as asked: all checks of degrees, before anything expensive starts."""

from sleeptrain.config import Config
from sleeptrain.parallel.layout import blocks_of_stage, check_tensor_size, micro_batch_of
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


def check_rows(config: Config, replicas: int) -> None:
    """Raises ConfigError where a batch cannot be shared out among so many replicas."""
    batch, stages = config.data.batch_sequences, config.parallel.pipeline_size
    if batch % replicas:
        raise ConfigError(
            f"data.batch_sequences={batch} does not divide among {replicas} data-parallel replicas; choose a "
            f"multiple of {replicas}"
        )
    rows = batch // replicas
    if config.data.micro_batch_sequences is None and rows % stages:
        raise ConfigError(
            f"parallel.pipeline_size={stages} needs a multiple of {stages} rows in each of {replicas} "
            f"replicas, and data.batch_sequences={batch} gives it {rows}; choose a multiple of "
            f"{stages * replicas}"
        )
    micro = micro_batch_of(config, rows)
    if rows % micro:
        raise ConfigError(
            f"data.micro_batch_sequences={config.data.micro_batch_sequences} does not divide the {rows} rows "
            f"of each of {replicas} replicas; choose a divisor of {rows}"
        )
    if (rows // micro) % stages:
        raise ConfigError(
            f"parallel.pipeline_size={stages} needs a multiple of {stages} microbatches and has "
            f"{rows // micro} ({rows} rows by data.micro_batch_sequences={micro}); lower "
            "data.micro_batch_sequences or leave it out"
        )


def _check_windows(config: Config, sequence_tokens: int) -> None:
    size, length = config.parallel.tensor_size, config.window_tokens
    for tokens in {min(length, sequence_tokens), sequence_tokens % length or length}:
        if tokens % size:
            raise ConfigError(
                f"parallel.sequence_parallel=true splits windows over parallel.tensor_size={size} ranks, and "
                f"one has {tokens} tokens; leave sequence_parallel out, or change sleep.window_tokens"
            )
