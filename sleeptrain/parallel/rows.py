"""How a batch is shared out among replicas and their stages. Without torch, for who only plans a run."""

from sleeptrain.config import Config
from sleeptrain.schema import ConfigError


def micro_batch_of(config: Config, rows: int) -> int:
    """Rows of one forward/backward of a replica that has ``rows``: as set, else as many as fill the
    pipeline once."""
    return config.data.micro_batch_sequences or rows // config.parallel.pipeline_size


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
