"""Batches of windows and masks, from the examples of a task."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleeptrain.tasks.base import Examples


@dataclass(frozen=True)
class Batch:
    """``ids``, ``targets`` ``[B, T]`` int64 (targets explicit: no hidden shift); ``loss_mask`` ``[B, T]``
    bool.

    ``valid`` ``[B, T]`` is False on pads, None where there are none; ``reset_state`` ``[B, W]`` is True where
    a sequence starts a document at a window, None where none does beyond the first. ``windows_with_loss``
    holds, for the W windows, whether any row has a loss there: the window plan is one for the whole batch.
    ``difficulty`` ``[B]``. ``example_keys`` ``[B]`` tell the examples of a run apart, in training.
    """

    ids: Tensor
    targets: Tensor
    loss_mask: Tensor
    valid: Tensor | None
    reset_state: Tensor | None
    difficulty: Tensor
    windows_with_loss: tuple[bool, ...]
    num_targets: int
    example_keys: Tensor | None = None

    def rows(self, chosen: slice | Tensor) -> "Batch":
        """Some sequences, with the window plan of the whole; ``num_targets`` is theirs."""
        part = self._map(lambda x: x[chosen])
        return replace(part, num_targets=int(part.loss_mask.sum()))

    def with_windows(self, windows_with_loss: tuple[bool, ...]) -> "Batch":
        """The same with the window plan of a larger batch of which it is a part."""
        return replace(self, windows_with_loss=windows_with_loss)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, function: Any) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in tensors.items() if isinstance(x, Tensor)})


def make_batch(
    examples: Examples,
    window_tokens: int,
    example_keys: Sequence[int] | np.ndarray | None = None,
    reset_state: np.ndarray | None = None,
) -> Batch:
    """``window_tokens`` 0: the whole sequence is one window."""
    length = window_tokens or examples.ids.shape[1]
    has_loss = np.asarray(examples.loss_mask.any(axis=0))
    return Batch(
        ids=torch.from_numpy(examples.ids),
        targets=torch.from_numpy(examples.targets),
        loss_mask=torch.from_numpy(examples.loss_mask),
        valid=None if examples.valid.all() else torch.from_numpy(examples.valid),
        reset_state=None if reset_state is None else torch.from_numpy(reset_state),
        difficulty=torch.from_numpy(examples.difficulty),
        windows_with_loss=tuple(
            bool(has_loss[s : s + length].any()) for s in range(0, len(has_loss), length)
        ),
        num_targets=int(np.count_nonzero(examples.loss_mask)),
        example_keys=None if example_keys is None else torch.as_tensor(example_keys),
    )
