"""Eigenbases of the factors, in which the damping of the whole Kronecker product is exact.

The gradient is rotated into the basis of Kronecker-factored eigenvectors, divided by the damped
eigenvalues, and rotated back. The eigenvalues are the products of the factors' own, or, for EKFAC,
the average squared gradients in that basis.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fast import ops
from kfac_fast.factors import Damping, Factor, RunningAverage, multiply_sides, of_each


class Eigendecomposition(NamedTuple):
    r"""Eigenvectors and eigenvalues of symmetric matrices.

    .. math:: M = Q \operatorname{diag}(s) \, Q^\top

    Attributes:
        vectors: :math:`Q`, one eigenvector a column, ``[*, n, n]``.
        values: :math:`s`, ascending, ``[*, n]``.
        valid: Bool of the batch shape: whether both are finite.
    """

    vectors: Tensor
    values: Tensor
    valid: Tensor


def eigendecompositions(matrices: Sequence[Tensor]) -> list[Eigendecomposition]:
    """Eigendecompositions of symmetric matrices of mixed sizes, in one call for each dtype.

    A finite matrix on which the iteration does not converge is decomposed again in float64, with a
    warning; one that fails there, too, is not valid.

    Args:
        matrices: As :func:`kfac_fast.ops.eigh` takes them, of one or of both dtypes.

    Returns:
        One decomposition for each entry, in its dtype.
    """
    results: dict[int, Eigendecomposition] = {}
    for dtype in {matrix.dtype for matrix in matrices}:
        alike = [i for i, matrix in enumerate(matrices) if matrix.dtype == dtype]
        found = ops.eigh([matrices[i] for i in alike])
        infos = found.info.split([matrices[i].shape[:-2].numel() for i in alike])
        for i, vectors, values, info in zip(alike, found.vectors, found.values, infos, strict=True):
            own = Eigendecomposition(vectors, values, (info == 0).view(matrices[i].shape[:-2]))
            results[i] = own if dtype == torch.float64 else _repaired(own, matrices[i])
    return [results[i] for i in range(len(matrices))]


def _repaired(found: Eigendecomposition, matrix: Tensor) -> Eigendecomposition:
    """A float32 decomposition, in float64 where there is none of a finite matrix."""
    if bool(found.valid.all()):  # PyTorch's solver has made the host wait already
        return found
    missing = ~found.valid & matrix.tril().isfinite().flatten(-2).all(-1)
    if not bool(missing.any()):
        return found
    size = matrix.shape[-1]
    warnings.warn(
        f"the eigendecomposition of a {size} x {size} matrix did not converge in {matrix.dtype}; "
        "it is done again in torch.float64",
        RuntimeWarning,
        stacklevel=3,
    )
    again = ops.eigh([matrix[missing].double()])
    found.vectors[missing] = again.vectors[0].to(matrix.dtype)
    found.values[missing] = again.values[0].to(matrix.dtype)
    found.valid[missing] = again.info == 0
    return found


class Eigenbasis:
    """The eigendecomposition of one factor.

    Attributes:
        vectors: As of the last refresh, ``[*, n, n]``; the identity before it. That of a diagonal
            factor is the identity always, and given by its diagonal, ``[n]``.
        values: Eigenvalues, ``[*, n]``, none of them negative; one before the first refresh.
        failed: Refreshes that kept a previous basis, one count for each matrix that has none.
    """

    STATE = ("vectors", "values", "failed")
    KIND = "inverses"

    def __init__(self, like: Tensor) -> None:
        size = like.shape[-1]
        identity = torch.eye(size, dtype=like.dtype, device=like.device)
        self.vectors = (
            torch.ones_like(like) if like.dim() == 1 else identity.expand_as(like).clone()
        )
        self.values = like.new_ones(like.shape if like.dim() == 1 else like.shape[:-1])
        self.failed = torch.zeros((), dtype=torch.int64, device=like.device)

    def replace(self, new: Eigendecomposition, valid: Tensor) -> None:
        """Take over the decompositions that are valid.

        Args:
            new: Decomposition of the factor.
            valid: Bool of the batch shape.
        """
        if self.vectors.dim() > 1:
            torch.where(valid[..., None, None], new.vectors, self.vectors, out=self.vectors)
        values = new.values.clamp(min=0)  # a covariance has no negative ones but by rounding
        torch.where(valid[..., None], values, self.values, out=self.values)

    def condition_number(self) -> Tensor:
        """Spectral condition number of each matrix, infinite if singular; of the batch shape."""
        largest, least = self.values.amax(-1), self.values.amin(-1)
        return torch.where(least > 0, largest / least, math.inf)


Decomposed = tuple[Sequence[Factor], Sequence[Eigenbasis]]
"""A layer's factors, (input, gradient) or a single one for both, and their eigenbases."""


def refresh_eigenbases(layers: Sequence[Decomposed]) -> None:
    """Refresh the eigenbases of all layers' factors.

    A layer takes over new bases only if all of its own are valid, as
    :func:`kfac_fast.inverses.refresh_inverses` does with inverses.

    Args:
        layers: The factors of each layer, and their eigenbases.
    """
    covariances = [factor.mean for factors, _ in layers for factor in factors]
    full = iter(eigendecompositions([c for c in covariances if c.dim() > 1]))
    solved = iter([next(full) if c.dim() > 1 else _of_diagonal(c) for c in covariances])
    for factors, bases in layers:
        seen = torch.stack([factor.weight > 0 for factor in factors]).all()
        own = [next(solved) for _ in factors]
        valid = seen & torch.stack([new.valid for new in own]).all(0)
        for basis, new in zip(bases, own, strict=True):
            basis.replace(new, valid)
            basis.failed += (seen & ~new.valid).sum()


def _of_diagonal(covariance: Tensor) -> Eigendecomposition:
    return Eigendecomposition(torch.ones_like(covariance), covariance, covariance.isfinite().all())


def apply_eigenbases(
    grads: Sequence[Tensor],
    bases: Sequence[Sequence[Eigenbasis]],
    corrections: Sequence[RunningAverage | None],
    damping: Damping,
) -> tuple[list[Tensor], Tensor]:
    r"""Precondition all layers' gradients with the exactly damped Kronecker products.

    .. math:: P = Q_G \frac{Q_G^\top V Q_A}{\Lambda + \lambda} Q_A^\top, \qquad
        \Lambda = s_G s_A^\top

    or :math:`\Lambda` the corrected eigenvalues, where there are any.

    Args:
        grads: Matrices :math:`V`, ``[*, out, in]``.
        bases: (input, gradient) of each layer; a single one is the input's, of a gradient with one
            row.
        corrections: Running averages of each layer's corrected eigenvalues ``[*, out, in]``, or
            None.
        damping: :math:`\lambda`, above 0: one number for all or one for each layer.

    Returns:
        The preconditioned gradients, and the sum of their inner products with the gradients.

    Source: George et al. (2018), section 3.
    """
    rotated, inner = _rotated(grads, bases)
    scaled = []
    shifts = of_each(damping, bases)
    for part, own, correction, shift in zip(rotated, bases, corrections, shifts, strict=True):
        scaled.append(part / (eigenvalues(own, correction) + shift))
        inner = inner + (part * scaled[-1]).sum()
    return _rotated_back(scaled, bases), inner


def scale_in_eigenbases(
    matrices: Sequence[Tensor], bases: Sequence[Sequence[Eigenbasis]], scales: Iterable[Tensor]
) -> list[Tensor]:
    r"""Multiply all layers' matrices by symmetric ones that have the Kronecker eigenbases.

    .. math:: P = Q_G (S \odot Q_G^\top V Q_A) Q_A^\top

    Args:
        matrices: :math:`V`, ``[*, out, in]``.
        bases: (input, gradient) of each layer; a single one is the input's, of a matrix with one
            row.
        scales: Eigenvalues :math:`S` of each, ``[*, out, in]``.

    Returns:
        The products.
    """
    rotated, _ = _rotated(matrices, bases)
    # In the scales' dtype, which may not fit into the parts' although the products do.
    scaled = [(part * scale).to(part.dtype) for part, scale in zip(rotated, scales, strict=True)]
    return _rotated_back(scaled, bases)


def quadratic_form(
    steps: Sequence[Tensor],
    bases: Sequence[Sequence[Eigenbasis]],
    corrections: Sequence[RunningAverage | None],
) -> Tensor:
    r"""Curvature along a step by the undamped blocks that :func:`apply_eigenbases` inverts.

    .. math:: \sum_l \langle \Lambda_l, (Q_{G,l}^\top \delta_l Q_{A,l})^2 \rangle

    Args:
        steps: Matrices :math:`\delta_l`, ``[*, out, in]``.
        bases: As there.
        corrections: As there.

    Returns:
        Scalar tensor.
    """
    rotated, total = _rotated(steps, bases)
    for part, own, correction in zip(rotated, bases, corrections, strict=True):
        total = total + (eigenvalues(own, correction) * part.square()).sum()
    return total


def _sides(bases: Sequence[Sequence[Eigenbasis]]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The eigenvectors of each layer's inputs and outputs."""
    left = [own[1].vectors if len(own) > 1 else None for own in bases]
    return [own[0].vectors for own in bases], left


def _rotated(
    matrices: Sequence[Tensor], bases: Sequence[Sequence[Eigenbasis]]
) -> tuple[list[Tensor], Tensor]:
    """Matrices in the eigenbases, and a zero to add to."""
    right, left = _sides(bases)
    rotated, inner = multiply_sides(matrices, right, [None if q is None else q.mT for q in left])
    return rotated, inner.zero_()


def _rotated_back(
    matrices: Sequence[Tensor], bases: Sequence[Sequence[Eigenbasis]]
) -> list[Tensor]:
    right, left = _sides(bases)
    return multiply_sides(matrices, [q if q.dim() == 1 else q.mT for q in right], left)[0]


def eigenvalues(
    bases: Sequence[Eigenbasis],
    correction: RunningAverage | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Eigenvalues of a layer's block, ``[*, out, in]``.

    Args:
        bases: Its (input, gradient) bases, or a single one.
        correction: Running average of the corrected eigenvalues, or None.
        dtype: In which they are formed; that of the bases if None.

    Returns:
        The corrected eigenvalues once there are any, else the products :math:`s_G s_A^\top`.
    """
    values = [basis.values.to(dtype or basis.values.dtype) for basis in bases]
    inputs = values[0][..., None, :]
    products = values[1][..., :, None] * inputs if len(bases) > 1 else inputs
    if correction is None:
        return products
    return torch.where(correction.weight > 0, correction.mean.to(products.dtype), products)
