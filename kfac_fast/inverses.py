"""Damped inverses of the factors: refreshed now and then, for all layers in one call.

Whether a matrix could be inverted is decided on the device, so the host never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfac_fast import ops
from kfac_fast.factors import Damping, Factor, diagonal_of, multiply_sides, of_each


class Inverse:
    """The damped inverse of one factor.

    Attributes:
        matrix: As of the last refresh, in the factor's shape; the identity before it.
        failed: Refreshes that kept a previous inverse, one count for each matrix that was not
            positive definite.
        raised: By how many powers of ten the next refresh raises each matrix' damping: one more
            after a refresh that failed, up to 6, one less after one that did not.
    """

    STATE = ("matrix", "failed", "raised")
    KIND = "inverses"
    MOST_RAISED = 6

    def __init__(self, like: Tensor) -> None:
        self.matrix = torch.zeros_like(like)
        diagonal_of(self.matrix).fill_(1)
        self.failed = torch.zeros((), dtype=torch.int64, device=like.device)
        self.raised = torch.zeros(like.shape[:-2], dtype=torch.int64, device=like.device)

    def raised_damping(self, covariance: Tensor, damping: Tensor | float) -> Tensor:
        r"""The damping of each matrix at the next refresh.

        .. math:: 10^r (\lambda + [r > 0]\, \varepsilon \operatorname{tr} C / n)

        Args:
            covariance: :math:`C`, the factor's.
            damping: :math:`\lambda`, a number or of the batch shape.

        Returns:
            Tensor of the batch shape. The second term lets a damping of zero be raised, too.
        """
        scale = diagonal_of(covariance).mean(-1).abs()
        least = torch.finfo(scale.dtype).eps * scale
        raised = self.raised.to(scale.dtype)
        return 10**raised * (damping + torch.where(raised > 0, least, 0))

    def replace(self, matrix: Tensor, valid: Tensor) -> None:
        """Take over the new inverses that are valid.

        Args:
            matrix: New inverses, in the factor's shape.
            valid: Bool of the batch shape.
        """
        valid = valid.reshape(valid.shape + (1,) * (matrix.dim() - valid.dim()))
        torch.where(valid, matrix, self.matrix, out=self.matrix)

    def condition_number(self) -> Tensor:
        """Spectral condition number of each matrix, by its eigenvalues; of the batch shape."""
        full = self.matrix.dim() > 1
        values = torch.linalg.eigvalsh(self.matrix) if full else self.matrix
        return values.amax(-1) / values.amin(-1)

    def count_failures(self, failure: Tensor) -> None:
        """Take note of which matrices were not positive definite.

        Args:
            failure: Bool of the batch shape.
        """
        self.failed += failure.sum()
        self.raised.add_(torch.where(failure, 1, -1)).clamp_(0, self.MOST_RAISED)


Inverted = tuple[Sequence[Factor], Sequence[Inverse]]
"""A layer's factors, (input, gradient) or a single one for both, and their inverses."""


def factored_damping(
    input_covariance: Tensor, gradient_covariance: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    r"""Tikhonov damping split between two factors in proportion to their average eigenvalues.

    .. math:: \pi \sqrt\lambda, \quad \sqrt\lambda / \pi, \qquad
        \pi^2 = \frac{\operatorname{tr} A / \dim A}{\operatorname{tr} G / \dim G}

    Args:
        input_covariance: ``[*, in, in]``, or a diagonal ``[in]``.
        gradient_covariance: ``[*, out, out]``.
        damping: :math:`\lambda`, at least 0.

    Returns:
        The dampings of the input and of the gradient covariance, of the batch shape. :math:`\pi` is
        1 where a trace is zero or not finite.

    Source: Martens & Grosse (2015), section 6.3.
    """
    means = [diagonal_of(m).mean(-1) for m in (input_covariance, gradient_covariance)]
    ratio = means[0] / means[1]
    usable = (means[0] > 0) & (means[1] > 0) & ratio.isfinite() & (ratio > 0)
    pi = torch.where(usable, ratio, 1).sqrt()
    return math.sqrt(damping) * pi, math.sqrt(damping) / pi


def refresh_inverses(layers: Sequence[Inverted], damping: Damping, mode: str = "factored") -> None:
    """Refresh the damped inverses of all layers' factors in one call.

    A layer takes over new inverses only if all of its own are valid: one alone would scale its step
    by whatever the other lacks. A matrix that was not positive definite is damped more at the next
    refresh.

    Args:
        layers: The factors of each layer, and their inverses.
        damping: Tikhonov damping, at least 0: one number for all or one for each layer.
        mode: ``"factored"`` as :func:`factored_damping`; ``"plain"`` adds ``damping`` to each
            factor. A layer with a single factor has it in both modes.
    """
    systems = list(_systems(layers, damping, mode))
    solved = iter(_invert(systems))
    for factors, inverses in layers:
        seen = torch.stack([factor.weight > 0 for factor in factors]).all()
        own = [next(solved) for _ in factors]
        failures = [
            failure.reshape(inverse.raised.shape) & seen
            for inverse, (_, failure) in zip(inverses, own, strict=True)
        ]
        valid = seen & ~torch.stack(failures).any(0)
        for inverse, (matrix, _), failure in zip(inverses, own, failures, strict=True):
            inverse.replace(matrix, valid)
            inverse.count_failures(failure)


def refine_inverses(
    layers: Sequence[Inverted], damping: Damping, mode: str = "factored", *, steps: int
) -> None:
    r"""Follow factors that have changed since the last refresh by Newton-Schulz iterations.

    .. math:: X \leftarrow X + X (I - M X), \qquad M = C + \lambda I

    starting from the present inverse. The residual :math:`I - M X` is squared by every step, as far
    as rounding allows: what remains is about the condition number of :math:`M` times the machine's
    epsilon. An inverse whose residual is not below 1 in the Frobenius norm is left as it is, for
    the iteration might diverge. A step costs two products, which on a CPU is more than
    :func:`refresh_inverses`; it pays where products are the only thing that is fast.

    Args:
        layers: The factors of each layer, and their inverses.
        damping: As in :func:`refresh_inverses`.
        mode: As in :func:`refresh_inverses`.
        steps: Number of iterations.

    Source: Higham (2008), Functions of Matrices, section 7.3; Ben-Israel (1965).
    """
    inverses = [inverse for _, own in layers for inverse in own]
    for inverse, (covariance, shift) in zip(inverses, _systems(layers, damping, mode), strict=True):
        if covariance.dim() == 1:
            inverse.matrix.copy_(1 / (covariance + shift))
            continue
        damped = covariance.clone()
        diagonal_of(damped).add_(shift[..., None])
        identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
        matrix = inverse.matrix
        residual = identity - damped @ matrix
        near = torch.linalg.matrix_norm(residual) < 1
        for step in range(steps):
            residual = identity - damped @ matrix if step else residual
            matrix = matrix + matrix @ residual
            matrix = (matrix + matrix.mT) / 2
        inverse.replace(matrix, near)


def apply_inverses(
    grads: Sequence[Tensor], inverses: Sequence[Sequence[Inverse]]
) -> tuple[list[Tensor], Tensor]:
    """Precondition all layers' gradients with their damped inverses.

    Args:
        grads: Matrices ``[*, out, in]``.
        inverses: (input, gradient) of each layer; a single one is the input's, of a gradient with
            one row.

    Returns:
        As of :func:`kfac_fast.ops.precondition`.
    """
    right = [own[0].matrix for own in inverses]
    left = [own[1].matrix if len(own) > 1 else None for own in inverses]
    return multiply_sides(grads, right, left)


def _systems(
    layers: Sequence[Inverted], damping: Damping, mode: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every factor's covariance, and its damping of the batch shape."""
    for (factors, inverses), own in zip(layers, of_each(damping, layers), strict=True):
        covariances = [factor.mean() for factor in factors]
        shares: Sequence[Tensor | float] = [own] * len(factors)
        if mode == "factored" and len(factors) == 2:
            shares = factored_damping(covariances[0], covariances[1], own)
        for inverse, covariance, share in zip(inverses, covariances, shares, strict=True):
            yield covariance, inverse.raised_damping(covariance, share)


def _invert(systems: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The damped inverse of every system, and whether it failed."""
    full = [system for system in systems if system[0].dim() > 1]
    inverses, info, _ = ops.damped_inverse([m for m, _ in full], [shift for _, shift in full])
    failures = torch.split(info != 0, [math.prod(m.shape[:-2]) for m in inverses])
    solved = iter(zip(inverses, failures, strict=True))
    for covariance, shift in systems:
        if covariance.dim() > 1:
            yield next(solved)
        else:
            damped = covariance + shift
            yield 1 / damped, ~(damped > 0).all()
