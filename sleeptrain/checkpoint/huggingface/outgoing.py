"""Export: a checkpoint becomes a Hugging Face folder, shard by shard: again where it was imported from one,
else one that sleeps (``sleeping.py``)."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sleeptrain.checkpoint.durable import write_new
from sleeptrain.checkpoint.huggingface.card import model_card
from sleeptrain.checkpoint.huggingface.families import SLEEPING, pairs_of
from sleeptrain.checkpoint.huggingface.folder import CARD, CONFIG, INDEX
from sleeptrain.checkpoint.huggingface.incoming import from_text
from sleeptrain.checkpoint.huggingface.mapping import Described, read_config
from sleeptrain.checkpoint.huggingface.sleeping import MODELLING_FILE, sleeping_config
from sleeptrain.checkpoint.manifest import differences
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.config import ModelConfig
from sleeptrain.schema import ConfigError, RunError, from_dict, reason_of, to_dict

SHARD_BYTES = 2**30
ORIGIN = "origin"


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    tell: Callable[[str], None],
    shard_bytes: int = SHARD_BYTES,
    sleeping: bool = False,
) -> bool:
    """Writes config.json, safetensors and a model card; returns whether it is a folder that sleeps.

    A model that was imported, and still is what its config.json describes, is written back as it came unless
    ``sleeping``; any other one sleeps, and its modelling file is written, too. Raises ConfigError where that
    cannot be, RunError where the disk cannot take it.
    """
    origin = checkpoint.documents.get(ORIGIN)
    described = None if origin is None or sleeping else _still_described(checkpoint, origin)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output={output} is not empty; choose another folder")
    if origin is not None and described is not None:
        config, tensors = origin["config"], _as_it_came(checkpoint, origin, described, tell)
    else:
        config, tensors = sleeping_config(checkpoint, origin), _as_it_is(checkpoint, tell)
    sleeps = config["model_type"] == SLEEPING
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_shards(output, tensors, shard_bytes)
        if sleeps:
            write_new(output / MODELLING_FILE.name, MODELLING_FILE.read_bytes())
        write_new(output / CARD, model_card(checkpoint, origin, sleeps).encode())
        write_new(output / CONFIG, json.dumps(config, indent=2).encode())  # without it, no model
    except OSError as error:
        raise RunError(f"{output} cannot be written: {reason_of(error)}") from error
    return sleeps


def _still_described(checkpoint: Checkpoint, origin: dict[str, Any]) -> Described | None:
    """What the config.json of its origin says of the model; None where it has become another one."""
    described = read_config(origin["config"], origin["name"], "head.weight" in checkpoint.names("model"))
    saved = from_dict(ModelConfig, checkpoint.documents["config"]["model"], "model.")
    is_same = described.family.mixer is not None and _predicts_alike(described.model, saved)
    return described if is_same else None


def _predicts_alike(described: ModelConfig, saved: ModelConfig) -> bool:
    """Apart from what does not shape a prediction of one pass."""
    free: dict[str, Any] = {
        name: getattr(described, name)
        for name in ("prelude_blocks", "coda_blocks", "dropout", "init_std", "embedding_init_std")
    }
    same: dict[str, Any] = {
        "pattern": " ".join(saved.pattern.split() * saved.pattern_repeats),
        "pattern_repeats": 1,
    }
    return not differences(to_dict(described), to_dict(replace(saved, **free, **same)))


def _as_it_came(
    checkpoint: Checkpoint, origin: dict[str, Any], described: Described, tell: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """Under the names, in the types and beside the other tensors of the origin."""
    names, dtypes = origin["names"], origin["dtypes"]
    for pair in pairs_of(described.family, described.model, checkpoint.names("model")):
        tell(pair.theirs[0])
        ours = [checkpoint.read("model", own) for own in pair.ours]
        rows = [origin["rows"][theirs] for theirs in pair.theirs if theirs in origin["rows"]]
        for usual, tensor in pair.join(ours, rows).items():
            name = names.get(usual, usual)
            yield name, tensor.to(getattr(torch, dtypes.get(name, origin["dtype"])))
    for name, said in origin["kept"].items():
        yield name, from_text(said)


def _as_it_is(checkpoint: Checkpoint, tell: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
    """Our names and types."""
    for name in checkpoint.names("model"):
        tell(name)
        yield name, checkpoint.read("model", name)


def _write_shards(output: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """At most ``shard_bytes`` are in memory, or one tensor. Several shards have an index."""
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, int] = {}
    total = 0

    def flush() -> None:
        path = output / f".shard_{len(files):05d}"
        safetensors.torch.save_file(shard, path, metadata={"format": "pt"})
        files.append(path)
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name], weight_map[name] = tensor, len(files)
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(output / "model.safetensors")
        return
    final = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for path, name in zip(files, final):
        path.rename(output / name)
    index: dict[str, Any] = {"metadata": {"total_size": total}}
    index["weight_map"] = {name: final[i] for name, i in weight_map.items()}
    write_new(output / INDEX, json.dumps(index, indent=2).encode())
