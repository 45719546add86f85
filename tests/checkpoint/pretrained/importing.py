"""A folder as our model, by way of a checkpoint, and what it predicts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.incoming import import_folder
from sleeptrain.checkpoint.huggingface.mapping import map_folder
from sleeptrain.config import Config
from sleeptrain.convert import run_config
from sleeptrain.engine.restored import restore
from sleeptrain.model import session as sessions
from sleeptrain.model.sleep import SleepModel


def import_to(source: Path, run_folder: Path, **changes: Any) -> Config:
    """Writes the checkpoint; its settings come back."""
    folder = Folder(source)
    mapped = map_folder(folder)
    config = run_config(mapped, run_folder, folder, changes)
    import_folder(folder, mapped, config, run_folder, lambda name: None)
    return config


def imported(source: Path, run_folder: Path) -> SleepModel:
    import_to(source, run_folder)
    return restore(run_folder, "cpu").backend.model


def fed(model: SleepModel, ids: Tensor, piece_tokens: int | None = None) -> Tensor:
    """Logits ``[B, T, V]`` of our session, which gets the ids at once or in pieces."""
    session, logits = sessions.begin(model, len(ids)), []
    for piece in ids.split(piece_tokens or ids.shape[1], dim=1):
        part, session = sessions.feed(model, session, piece, num_passes=1)
        logits.append(part)
    return torch.cat(logits, dim=1)
