"""Muon: momentum orthogonalised by Newton-Schulz, for matrices (Jordan et al. 2024; scales after arXiv
2502.16982)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_ELEMENTS = 64_000_000  # of matrices that are orthogonalised together


def orthogonalise(matrices: Tensor, num_steps: int, precision: str = "float32") -> Tensor:
    """Newton-Schulz iteration on ``[..., rows, columns]``: singular values are driven to about 1.

    Products are of ``precision``: float32, bfloat16, or auto, which takes bfloat16 on CUDA; the coefficients
    were chosen for it, and the iteration corrects what an earlier step rounded.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_low = precision == "bfloat16" or (precision == "auto" and matrices.is_cuda)
    x = x.to(torch.bfloat16 if is_low else torch.float32).reshape(-1, *x.shape[-2:])
    for _ in range(num_steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


def matrices_at_once(shape: torch.Size) -> int:
    """How many of one shape are orthogonalised together."""
    return max(1, MUON_ELEMENTS // math.prod(shape))


def update_scale(shape: torch.Size, kind: str) -> float:
    """Factor on an orthogonal update of a weight ``[out, in]``."""
    rows, columns = shape[-2:]
    return max(1.0, rows / columns) ** 0.5 if kind == "original" else 0.2 * max(rows, columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix (equal shapes as one batch), decoupled weight decay."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float,
        num_steps: int,
        scale: str,
        weight_decay: float,
        precision: str = "float32",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "num_steps": num_steps,
            "scale": scale,
            "precision": precision,
            "weight_decay": weight_decay,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                scale, size = update_scale(shape, group["scale"]), matrices_at_once(shape)
                for start in range(0, len(parameters), size):
                    self._update(parameters[start : start + size], scale, group)

    def _update(self, parameters: list[Tensor], scale: float, group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalise(torch.stack(nesterov), group["num_steps"], group["precision"]).unbind()
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] * scale)
