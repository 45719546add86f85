"""Export: a checkpoint of a model that was imported becomes a Hugging Face folder again, shard by shard."""

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
from sleeptrain.checkpoint.huggingface.families import pairs_of
from sleeptrain.checkpoint.huggingface.folder import CARD, CONFIG, INDEX
from sleeptrain.checkpoint.huggingface.incoming import from_text
from sleeptrain.checkpoint.huggingface.mapping import read_config
from sleeptrain.checkpoint.manifest import differences
from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.config import ModelConfig
from sleeptrain.schema import ConfigError, RunError, from_dict, reason_of, to_dict

SHARD_BYTES = 2**30
ORIGIN = "origin"


def export_checkpoint(
    checkpoint: Checkpoint, output: Path, tell: Callable[[str], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json, safetensors and a model card. Raises ConfigError where the model did not come from
    such a folder or is no longer of its architecture, RunError where the disk cannot take it."""
    origin = checkpoint.documents.get(ORIGIN)
    if origin is None:
        raise ConfigError(
            f"{checkpoint.path} does not stem from a Hugging Face folder, so no config.json describes it; "
            "export a model that was imported"
        )
    saved = from_dict(ModelConfig, checkpoint.documents["config"]["model"], "model.")
    family, model = read_config(origin["config"], origin["name"], "head.weight" in checkpoint.names("model"))
    _require_same(model, saved)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output={output} is not empty; choose another folder")
    names, dtypes = origin["names"], origin["dtypes"]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for pair in pairs_of(family, model):
            tell(pair.theirs[0])
            ours = [checkpoint.read("model", own) for own in pair.ours]
            rows = [origin["rows"][theirs] for theirs in pair.theirs if theirs in origin["rows"]]
            for usual, tensor in pair.join(ours, rows).items():
                name = names.get(usual, usual)
                yield name, tensor.to(getattr(torch, dtypes.get(name, origin["dtype"])))
        for name, said in origin["kept"].items():
            yield name, from_text(said)

    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_shards(output, tensors(), shard_bytes)
        write_new(output / CARD, model_card(checkpoint, origin).encode())
        write_new(output / CONFIG, json.dumps(origin["config"], indent=2).encode())  # without it, no model
    except OSError as error:
        raise RunError(f"{output} cannot be written: {reason_of(error)}") from error


def _require_same(described: ModelConfig, saved: ModelConfig) -> None:
    """Apart from what does not shape a prediction of one pass."""
    free: dict[str, Any] = {
        name: getattr(described, name)
        for name in ("prelude_blocks", "coda_blocks", "dropout", "init_std", "embedding_init_std")
    }
    same: dict[str, Any] = {
        "pattern": " ".join(saved.pattern.split() * saved.pattern_repeats),
        "pattern_repeats": 1,
    }
    changed = differences(to_dict(described), to_dict(replace(saved, **free, **same)))
    if changed:
        raise ConfigError(
            f"the model is no longer what its config.json describes ({'; '.join(changed)}), and transformers "
            "has no architecture for it; keep it as a checkpoint"
        )


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
