"""The state of a model as an explicit tree of tensors: what its blocks remember of the tokens read so far.

Every tensor has the batch as its first dimension, so a state can be saved, moved, split by batch and
compared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeptrain.model.dropout import Dropout


class KVCache(NamedTuple):
    """Keys (unrotated) and values of earlier tokens ``[B, S, heads, head_dim]``, and for each its position
    relative to the current window and whether it is a real token ``[B, S]``."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor

    def newest(self, num_tokens: int) -> "KVCache":
        """The newest ``num_tokens`` entries that are no pads, in order; pads fill up where there are
        fewer."""
        if num_tokens >= self.keys.shape[1]:
            return self
        order = self.valid.to(torch.int8).argsort(dim=1, stable=True)[:, self.keys.shape[1] - num_tokens :]
        wide = order[..., None, None].expand(-1, -1, *self.keys.shape[2:])
        return KVCache(
            self.keys.gather(1, wide),
            self.values.gather(1, wide),
            self.positions.gather(1, order),
            self.valid.gather(1, order),
        )

    def compact(self, num_places: int) -> "KVCache":
        """The same in so many places: pads, then what is real, in order."""
        return self.padded(num_places + 1).newest(num_places)  # which takes order from dropping one at least

    def padded(self, num_places: int) -> "KVCache":
        """With pads before what is there, at least ``num_places`` in all."""
        missing = max(0, num_places - self.keys.shape[1])
        return KVCache(*(F.pad(part, [0, 0] * (part.dim() - 2) + [missing, 0]) for part in self))

    def followed_by(self, newer: "KVCache") -> "KVCache":
        return KVCache(*(torch.cat(pair, dim=1) for pair in zip(self, newer)))

    def shifted(self, num_tokens: Tensor) -> "KVCache":
        """Positions as seen from a window that starts ``num_tokens`` ``[B]`` later."""
        return self._replace(positions=self.positions - num_tokens[:, None])


class Ring(NamedTuple):
    """Keys as they are, keys rotated and values of the newest tokens ``[B, width, heads, head_dim]``: the one
    thing of a state that is written in place, each token over the oldest. Only ``decoder.py`` makes them."""

    keys: Tensor
    rotated: Tensor
    values: Tensor

    def write(self, place: Tensor, *newest: Tensor) -> None:
        """Puts those of one token to ``place`` ``[1]``."""
        for part, new in zip(self, newest):
            part.index_copy_(1, place, new.to(part.dtype))


class RingToken(NamedTuple):
    """Of the one token that is read into rings of a width: its ``place`` ``[1]``, and ``[B, 1, 1, width]`` 0
    where it may look, else -inf."""

    place: Tensor
    mask: Tensor


class BlockState(NamedTuple):
    """What a block remembers: fast weights ``[B, H, K, V]`` and convolution tail ``[B, W-1, C]``, or KV
    caches, or a ring of the decoder.

    A pass reads and leaves at most one cache; across a border the caches of several passes may survive.
    """

    memory: Tensor | None = None
    tail: Tensor | None = None
    caches: tuple[KVCache, ...] = ()
    ring: Ring | None = None

    @property
    def cache(self) -> KVCache | None:
        return self.caches[0] if self.caches else None


State = tuple[BlockState, ...]


class Tokens(NamedTuple):
    """What a block knows of the tokens of a call beside their hidden states.

    ``positions`` ``[B or 1, T]`` count real tokens from the start of the window; ``valid`` ``[B, T]`` is
    False on pads, None where there are none; ``rotary`` is the table of these positions. ``keeps_cache`` and
    ``keeps_tail`` ask for the keys, values and convolution inputs that later tokens will need. ``rings``, by
    width, are there where attention has rings. ``dropout`` is there in training, where the config asks for
    it.
    """

    positions: Tensor
    valid: Tensor | None
    rotary: tuple[Tensor, Tensor]
    window_tokens: int
    keeps_cache: bool
    keeps_tail: bool
    rings: Mapping[int, RingToken] | None = None
    dropout: Dropout | None = None


def map_tensors(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Applies ``function`` to each tensor in a tree of tuples, or to the corresponding tensors of several;
    what is no tensor stays as it is in the first."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if not isinstance(tree, tuple):
        return tree
    fields = [map_tensors(function, *inner) for inner in zip(tree, *others)]
    return type(tree)(*fields) if hasattr(tree, "_fields") else tuple(fields)


def reset(state: State, starts_anew: Tensor, initial: State) -> State:
    """Those sequences that start a document here (``starts_anew`` ``[B]``) get the initial fast weights, zero
    convolution tails and invalid caches."""

    def choose(value: Tensor, start: Tensor) -> Tensor:
        return torch.where(starts_anew.view(-1, *[1] * (value.dim() - 1)), start, value)

    cleared = map_tensors(lambda value: choose(value, torch.zeros_like(value)), state)
    return tuple(
        new
        if old.memory is None or first.memory is None
        else new._replace(memory=choose(old.memory, first.memory))
        for new, old, first in zip(cleared, state, initial)
    )
