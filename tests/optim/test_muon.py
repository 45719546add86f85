"""Muon against a plain float64 step, written from the method's section 4."""

import pytest
import torch
from torch import Tensor

from sleeptrain.optim.muon import Muon, orthogonalise


def plain_orthogonalise(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps on one matrix; wide matrices as they are, tall ones transposed."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(8, 8), (24, 6), (6, 24), (3, 2, 7, 11)])
def test_singular_values_are_driven_to_about_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), 5))
    assert 0.5 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("shape", [(8, 8), (48, 12), (2, 12, 48)])
def test_in_bfloat16_it_drives_them_there_too(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    found = orthogonalise(matrices, 5, "bfloat16")
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert 0.5 < values.min() < values.max() < 1.3
    expected = orthogonalise(matrices, 5)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    assert torch.equal(orthogonalise(matrices, 5, "auto"), expected)  # on a CPU


def test_a_batch_is_its_matrices_and_keeps_their_type() -> None:
    batch = torch.randn(3, 9, 4, dtype=torch.float64)
    expected = torch.stack([plain_orthogonalise(m) for m in batch])
    found = orthogonalise(batch, 5)
    assert found.dtype == torch.float64
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert torch.isfinite(orthogonalise(torch.zeros(2, 3), 5)).all()


@pytest.mark.parametrize("scale", ["original", "match_rms"])
def test_steps_equal_the_plain_ones(scale: str) -> None:
    lr, decay, momentum = 0.1, 0.3, 0.95
    shapes = [(12, 4), (4, 12), (12, 4), (5, 5)]  # equal shapes go as one batch
    weights = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    expected = [w.detach().clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in expected]
    optimizer = Muon(weights, lr, momentum, 5, scale, decay)
    for _ in range(3):
        for i, (rows, columns) in enumerate(shapes):
            gradient = torch.randn(rows, columns, dtype=torch.float64)
            weights[i].grad = gradient.clone()
            buffers[i] = momentum * buffers[i] + (1 - momentum) * gradient
            update = plain_orthogonalise((1 - momentum) * gradient + momentum * buffers[i])
            factor = max(1, rows / columns) ** 0.5 if scale == "original" else 0.2 * max(rows, columns) ** 0.5
            expected[i] = (1 - lr * decay) * expected[i] - lr * factor * update
        optimizer.step()
    for weight, reference in zip(weights, expected):
        assert (weight - reference).norm() < 1e-5 * reference.norm()


def test_a_weight_without_gradient_is_left_alone() -> None:
    weights = [torch.randn(3, 3, requires_grad=True) for _ in range(2)]
    before = weights[1].detach().clone()
    weights[0].grad = torch.randn(3, 3)
    Muon(weights, 0.1, 0.95, 5, "original", 0.1).step()
    assert torch.equal(weights[1], before)
