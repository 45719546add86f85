"""Measurements on a trained model that are no score: name -> function of its backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from sleeptrain.config import Config
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import with_changes
from sleeptrain.study.cost import first_batch


def gradient_cosine(backend: LocalBackend) -> float:
    """Cosine between the gradient of the training, where it goes back through the last
    ``sleep.backprop_passes`` passes alone, and the one through all passes: on the first batch of the run."""
    through_all = with_changes(backend.config, {"sleep.backprop_passes": 0})
    own, whole = _gradient(backend, backend.config), _gradient(backend, through_all)
    return float(torch.cosine_similarity(own, whole, dim=0))


def _gradient(backend: LocalBackend, config: Config) -> Tensor:
    """Of the same weights under other settings, all in one vector."""
    other = LocalBackend(config, backend.model.embed.num_embeddings)
    other.model.load_state_dict(backend.model.state_dict())
    other.forward_backward(first_batch(config), config.sleep.num_passes)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in other.model.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


PROBES: dict[str, Callable[[LocalBackend], float]] = {"gradient_cosine": gradient_cosine}
