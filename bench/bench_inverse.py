"""Damped inverses and eigenbases of all factors of a network, and preconditioning with inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import baselines
import pytest
import torch
from measure import Case, poisoned
from shapes import EIGENBASES, INVERSES, NETWORKS, factor_sizes, layers_of
from torch import Tensor

DAMPING = 1e-3


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
    return factor_sizes(shape)


def _each(*ops: str, shapes: Sequence[str]) -> list[tuple[str, str]]:
    """Every operator with every shape but the Cholesky factors of the largest network."""
    pairs = [(op, shape) for op in ops for shape in shapes]
    return [(op, shape) for op, shape in pairs if shape != "resnet18" or "cholesky" not in op]


@pytest.mark.parametrize(
    ("op", "shape"), _each("damped_inverse", "damped_cholesky", shapes=[*INVERSES, *NETWORKS])
)
def bench_damped(op: str, shape: str, compare: Callable[[Case], None], device: str) -> None:
    sizes = _sizes(shape)
    matrices = [_covariance(size, device) for size in sizes]
    out = [poisoned(size, size, device=device) for size in sizes]
    ways = getattr(baselines, op)(matrices, DAMPING)
    flops = sum(size**3 for size in sizes)
    if op == "damped_cholesky":
        flops //= 3
    beside = {name: ways[name] for name in ("cholesky, one by one", "cholesky, grouped by size")}
    compare(Case(op, shape, (matrices, DAMPING), {}, out, ways, flops, beside=beside))


def _products(results: list[Tensor]) -> list[Tensor]:
    """Eigenvalues, and the matrices that they make with the eigenvectors, whose signs are free."""
    values, vectors = results[: len(results) // 2], results[len(results) // 2 :]
    pairs = zip(values, vectors, strict=True)
    return [*values, *((q.double() * s.double()) @ q.double().mT for s, q in pairs)]


@pytest.mark.parametrize("shape", EIGENBASES)
def bench_eigh(shape: str, compare: Callable[[Case], None], device: str) -> None:
    sizes = _sizes(shape)
    matrices = [_covariance(size, device) for size in sizes]
    out = [
        [poisoned(size, device=device) for size in sizes],
        [poisoned(size, size, device=device) for size in sizes],
    ]
    ways = baselines.eigh(matrices)
    flops = sum(9 * size**3 for size in sizes)
    beside = {name: ways[name] for name in ("eigh, one by one", "eigh, grouped by size")}
    case = Case("eigh", shape, (matrices,), {}, out, ways, flops, beside=beside)
    compare(replace(case, compared=_products))


@pytest.mark.parametrize(
    ("op", "shape"), _each("precondition", "cholesky_precondition", shapes=list(NETWORKS))
)
def bench_precondition(op: str, shape: str, compare: Callable[[Case], None], device: str) -> None:
    layers = layers_of(shape)
    grads = [torch.randn(layer.outputs, layer.inputs, device=device) for layer in layers]
    # Times and rounding do not ask whether these are inverses.
    sides = [
        [_covariance(size, device) for size in sizes]
        for sizes in zip(*((layer.inputs, layer.outputs) for layer in layers), strict=True)
    ]
    if op == "cholesky_precondition":
        sides = [[torch.linalg.cholesky(side) for side in each] for each in sides]
    out = [poisoned(*grad.shape, device=device) for grad in grads]
    flops = sum(2 * v.numel() * (sum(v.shape) + 1) for v in grads)
    ways = getattr(baselines, op)(grads, *sides)
    loop = next(iter(ways))
    beside = {loop: ways[loop]}
    compare(Case(op, shape, (grads, *sides), {}, out, ways, flops, beside=beside))
