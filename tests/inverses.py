"""Matrices to invert, their exact inverses and factors, and the bound on the errors of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def uncentred(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The second moments of rows about a mean far from zero, which is most of each entry."""
    rows = 1 + 0.1 * torch.randn(4 * size, size, dtype=torch.float64)
    return (rows.mT @ rows / len(rows)).to(dtype)


def random_rows(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The second moments of rows of independent entries."""
    rows = torch.randn(4 * size, size, dtype=torch.float64)
    return (rows.mT @ rows / len(rows)).to(dtype)


def exact_factor(damped: Tensor, extended: bool) -> Tensor:
    """The Cholesky factor in float64, or column by column in extended precision."""
    if not extended:
        return torch.linalg.cholesky(damped)
    a = damped.cpu().numpy().astype(np.longdouble)
    factor = np.zeros_like(a)
    for i in range(len(a)):
        column = a[i:, i] - factor[i:, :i] @ factor[i, :i]
        factor[i:, i] = column / np.sqrt(column[0])
    return torch.from_numpy(factor.astype(np.float64)).to(damped)


def exact_inverse(damped: Tensor, extended: bool) -> Tensor:
    """In float64, or in extended precision by a step of Newton's method."""
    inverse = torch.linalg.inv(damped)
    if not extended:
        return inverse
    a, x = (t.cpu().numpy().astype(np.longdouble) for t in (damped, inverse))
    step = (x + x @ (np.eye(len(a)) - a @ x)).astype(np.float64)
    return torch.from_numpy(step).to(inverse)


def assert_as_accurate(
    result: ops.DampedInverses,
    matrices: Sequence[Tensor],
    damping: float,
    op: Callable[..., ops.DampedInverses] = ops.damped_inverse,
    times: float = 2,
) -> None:
    """Check that errors, root mean square over the matrices, are at most twice PyTorch's.

    One matrix may come out better or worse by chance.

    Args:
        result: The inverses or factors under test and their log-determinants.
        matrices: What was inverted or factorised, each ``[n, n]``.
        damping: The damping of all.
        op: :func:`kfac_fast.ops.damped_inverse` or :func:`kfac_fast.ops.damped_cholesky`.
        times: The bound, if it is another one than twice.
    """
    with kfac_fast.use("reference"):
        theirs = op(matrices, damping, logdet=True)
    extended = matrices[0].dtype == torch.float64
    damped = [m.double() + damping * torch.eye(m.shape[-1]).to(m).double() for m in matrices]
    inverts = op is ops.damped_inverse
    exact = [(exact_inverse if inverts else exact_factor)(m, extended) for m in damped]

    def error(found: Sequence[Tensor]) -> Tensor:
        pairs = zip(found, exact, strict=True)
        errors = torch.stack([(x.double() - e).norm() / e.norm() for x, e in pairs])
        return errors.square().mean().sqrt()

    eps = torch.finfo(matrices[0].dtype).eps
    assert not result.info.any()
    assert error(result.matrices) <= times * error(theirs.matrices) + 4 * eps
    for matrix in result.matrices:
        if inverts:
            assert_symmetric(matrix)
        else:
            assert torch.equal(matrix, matrix.tril())
    logdets = torch.stack(
        [-torch.logdet(e) if inverts else 2 * e.diagonal().log().sum() for e in exact]
    )

    def logdet_error(found: Tensor | None) -> Tensor:
        assert found is not None
        return (found.double() - logdets).square().mean().sqrt()

    allowed = 2 * logdet_error(theirs.logdet) + 4 * eps * logdets.abs().max()
    assert logdet_error(result.logdet) <= allowed
