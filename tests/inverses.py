"""Matrices to invert, their exact inverses, and the bound on the errors of many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from oracle import assert_symmetric
from torch import Tensor

import kfac_fast
from kfac_fast import ops


def covariance(size: int, dtype: torch.dtype = torch.float32, decades: float = 2) -> Tensor:
    """Symmetric, with eigenvalues over so many decades."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.logspace(0, -decades, size, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def exact_inverses(matrices: Sequence[Tensor], damping: float) -> list[Tensor]:
    """In float64, or for float64 matrices in extended precision, by a step of Newton's method."""
    damped = [m.double() + damping * torch.eye(m.shape[-1]).to(m).double() for m in matrices]
    inverses = [torch.linalg.inv(m) for m in damped]
    if matrices[0].dtype == torch.float32:
        return inverses
    refined = []
    for matrix, inverse in zip(damped, inverses, strict=True):
        a, x = (t.cpu().numpy().astype(np.longdouble) for t in (matrix, inverse))
        step = (x + x @ (np.eye(len(a)) - a @ x)).astype(np.float64)
        refined.append(torch.from_numpy(step).to(inverse))
    return refined


def assert_as_accurate(
    result: ops.DampedInverses, matrices: Sequence[Tensor], damping: float
) -> None:
    """Check that errors, root mean square over the matrices, are at most twice PyTorch's.

    One matrix may come out better or worse by chance.

    Args:
        result: The inverses under test and their log-determinants.
        matrices: What was inverted, each ``[n, n]``.
        damping: The damping of all.
    """
    with kfac_fast.use("reference"):
        theirs = ops.damped_inverse(matrices, damping, logdet=True)
    exact = exact_inverses(matrices, damping)

    def error(inverses: Sequence[Tensor]) -> Tensor:
        pairs = zip(inverses, exact, strict=True)
        errors = torch.stack([(x.double() - e).norm() / e.norm() for x, e in pairs])
        return errors.square().mean().sqrt()

    eps = torch.finfo(matrices[0].dtype).eps
    assert not result.info.any()
    assert error(result.matrices) <= 2 * error(theirs.matrices) + 4 * eps
    for inverse in result.matrices:
        assert_symmetric(inverse)
    logdets = torch.stack([-torch.logdet(inverse) for inverse in exact])

    def logdet_error(found: Tensor | None) -> Tensor:
        assert found is not None
        return (found.double() - logdets).square().mean().sqrt()

    allowed = 2 * logdet_error(theirs.logdet) + 4 * eps * logdets.abs().max()
    assert logdet_error(result.logdet) <= allowed
