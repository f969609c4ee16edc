"""Damped inverses of all factors of a network, and the gradients preconditioned with them."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import torch
from measure import Case, poisoned
from shapes import NETWORKS, Layer
from torch import Tensor

DAMPING = 1e-3


def _layers(network: str) -> list[Layer]:
    return [layer for layer in NETWORKS[network] for _ in range(layer.count)]


def _covariance(size: int, device: str) -> Tensor:
    """A symmetric positive definite matrix whose eigenvalues fall over two decades.

    Over three, two orders of one elimination can already differ by more than the error budget.
    """
    factors = torch.randn(size, 16, device=device)
    product = factors @ factors.T / size
    return torch.diag(torch.logspace(0, -2, size, device=device)) + (product + product.T) / 2


@pytest.mark.parametrize("shape", NETWORKS)
def bench_damped_inverse(shape: str, compare: Callable[[Case], None], device: str) -> None:
    sizes = [size for layer in _layers(shape) for size in (layer.inputs, layer.outputs)]
    matrices = [_covariance(size, device) for size in sizes]
    out = [poisoned(size, size, device=device) for size in sizes]
    ways = baselines.damped_inverse(matrices, DAMPING)
    flops = sum(size**3 for size in sizes)
    compare(Case("damped_inverse", shape, (matrices, DAMPING), {}, out, ways, flops))


@pytest.mark.parametrize("shape", NETWORKS)
def bench_precondition(shape: str, compare: Callable[[Case], None], device: str) -> None:
    layers = _layers(shape)
    grads = [torch.randn(layer.outputs, layer.inputs, device=device) for layer in layers]
    # Times and rounding do not ask whether these are inverses.
    input_sides = [_covariance(layer.inputs, device) for layer in layers]
    gradient_sides = [_covariance(layer.outputs, device) for layer in layers]
    out = [poisoned(*grad.shape, device=device) for grad in grads]
    flops = sum(2 * v.numel() * (sum(v.shape) + 1) for v in grads)
    arguments = (grads, input_sides, gradient_sides)
    ways = baselines.precondition(*arguments)
    compare(Case("precondition", shape, arguments, {}, out, ways, flops))
