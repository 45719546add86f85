"""Dropout without a random number generator: what is dropped is a pure function of example, visit, block,
token and channel.

So it is the same when a pass is computed again in the backward pass, on every tensor rank, for any split
of the batch and after every restart, and there is no generator state to save. Shape letters: B batch, T
tokens, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF


class Dropout(NamedTuple):
    """``rate``: the share that is dropped. ``keys`` ``[B, T]``: a number for each token of each example
    in this visit. ``part``: which part of how many equal parts of the tokens h holds (sequence
    parallelism)."""

    rate: float
    keys: Tensor
    part: tuple[int, int]

    def apply(self, h_BTD: Tensor, place: int) -> Tensor:
        """Drops elements and scales the others up; ``place`` tells the places in the network apart."""
        index, num_parts = self.part
        keys = self.keys.chunk(num_parts, dim=1)[index]
        channels = _mixed(torch.arange(h_BTD.shape[-1], device=h_BTD.device) + (place + 1) * 0x9E3779B1)
        kept = _mixed(keys[..., None] ^ channels) >= int(self.rate * 2**32)
        return h_BTD * kept * (1 / (1 - self.rate))


def token_keys(example_keys: Tensor, visit: int, num_tokens: int, first_token: int) -> Tensor:
    """``[B, T]`` from a number for each example ``[B]``, the index of the visit and the tokens' places."""
    of_example = _mixed(example_keys ^ _mixed(example_keys >> 32))
    of_visit = _mixed(of_example + visit)
    places = torch.arange(first_token, first_token + num_tokens, device=example_keys.device)
    return _mixed(of_visit[:, None] ^ _mixed(places))


def _mixed(x: Tensor) -> Tensor:
    """Spreads integers evenly over 32 bits (the finalizer of MurmurHash3), in int64."""
    x = x & LOW_32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & LOW_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & LOW_32
    return x ^ (x >> 16)
