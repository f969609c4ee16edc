"""Damped inverses of all factors of a network, and the gradients preconditioned with them."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import torch
from measure import Case, poisoned
from shapes import INVERSES, NETWORKS, Layer
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


def _sizes(shape: str) -> list[int]:
    if shape in INVERSES:
        count, size = INVERSES[shape]
        return count * [size]
    return [size for layer in _layers(shape) for size in (layer.inputs, layer.outputs)]


@pytest.mark.parametrize("shape", [*INVERSES, *NETWORKS])
def bench_damped_inverse(shape: str, compare: Callable[[Case], None], device: str) -> None:
    sizes = _sizes(shape)
    matrices = [_covariance(size, device) for size in sizes]
    out = [poisoned(size, size, device=device) for size in sizes]
    ways = baselines.damped_inverse(matrices, DAMPING)
    flops = sum(size**3 for size in sizes)
    beside = {name: ways[name] for name in ("cholesky, one by one", "cholesky, grouped by size")}
    arguments = (matrices, DAMPING)
    compare(Case("damped_inverse", shape, arguments, {}, out, ways, flops, beside=beside))


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
    beside = {"mm, one by one": ways["mm, one by one"]}
    compare(Case("precondition", shape, arguments, {}, out, ways, flops, beside=beside))
