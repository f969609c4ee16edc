"""Damped inverses of the factors: refreshed now and then, for all layers in one call.

Whether a matrix could be inverted is decided on the device, so the host never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fast import ops
from kfac_fast.factors import Damping, Factor, multiply_sides, of_each
from kfac_fast.host_copy import known_true
from kfac_fast.reference import diagonal_of


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

    def replace(self, matrix: Tensor, valid: Tensor) -> None:
        """Take over the new inverses that are valid.

        Args:
            matrix: New inverses, in the factor's shape.
            valid: Bool of the batch shape, or an entry for each matrix.
        """
        valid = valid[:, None, None] if matrix.dim() > 2 else valid
        torch.where(valid, matrix, self.matrix, out=self.matrix)

    def condition_number(self) -> Tensor:
        """Spectral condition number of each matrix, by its eigenvalues; of the batch shape."""
        full = self.matrix.dim() > 1
        values = torch.linalg.eigvalsh(self.matrix) if full else self.matrix
        return values.amax(-1) / values.amin(-1)


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
    input_mean, gradient_mean = (
        diagonal_of(matrix).mean(-1) for matrix in (input_covariance, gradient_covariance)
    )
    return _split_damping(input_mean, gradient_mean, math.sqrt(damping))


def _split_damping(
    input_mean: Tensor, gradient_mean: Tensor, root: float | Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`factored_damping`, from average eigenvalues and the root of the damping."""
    ratio = input_mean / gradient_mean
    usable = (input_mean > 0) & (ratio > 0) & ratio.isfinite()
    pi = torch.where(usable, ratio, 1).sqrt()
    return root * pi, root / pi


def raised_damping(damping: Tensor, mean: Tensor, raised: Tensor) -> Tensor:
    r"""The damping of each matrix at the next refresh.

    .. math:: 10^r (\lambda + [r > 0]\, \varepsilon \operatorname{tr} C / n)

    Args:
        damping: :math:`\lambda`.
        mean: Average eigenvalue :math:`\operatorname{tr} C / n`.
        raised: :math:`r`, int64.

    Returns:
        Tensor of the same shape. The second term lets a damping of zero be raised, too.
    """
    least = torch.finfo(mean.dtype).eps * mean.abs()
    return 10 ** raised.to(mean.dtype) * (damping + torch.where(raised > 0, least, 0))


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
    if not layers:
        return
    joined = _join(layers)
    inverses, slices = joined.inverses, joined.slices
    matrices, failed = _invert(joined, _dampings(joined, of_each(damping, layers), mode))
    counted = _counted(joined)
    failed = failed & counted
    valid = counted & ~failed
    if joined.none_raised and known_true(valid):  # as mostly: there is nothing to count
        torch._foreach_copy_([inverse.matrix for inverse in inverses], matrices)
        return
    raised = (joined.raised + torch.where(failed, 1, -1)).clamp(0, Inverse.MOST_RAISED)
    sums = [own.sum() if own.dim() else own for own in _of_each(inverses, failed.long())]
    torch._foreach_copy_([inverse.raised for inverse in inverses], _of_each(inverses, raised))
    torch._foreach_add_([inverse.failed for inverse in inverses], sums)
    valid = valid.split(joined.counts)
    for own in slices:
        taken = reduce(torch.logical_and, valid[own])
        for inverse, matrix in zip(inverses[own], matrices[own], strict=True):
            inverse.replace(matrix, taken)


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
    if not layers:
        return
    joined = _join(layers)
    dampings = _of_each(joined.inverses, _dampings(joined, of_each(damping, layers), mode))
    for inverse, factor, shift in zip(joined.inverses, joined.factors, dampings, strict=True):
        covariance = factor.mean
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


class _Joined(NamedTuple):
    """All layers together; numbers of a matrix each are entries of one array for all of them.

    Attributes:
        factors: Those of all layers.
        inverses: Of each factor.
        slices: Where those of each layer are.
        counts: Number of each factor's matrices.
        raised: Of each matrix, by how many powers of ten its damping is raised.
        none_raised: Whether that is known to be zero for all.
    """

    factors: list[Factor]
    inverses: list[Inverse]
    slices: list[slice]
    counts: list[int]
    raised: Tensor
    none_raised: bool


def _join(layers: Sequence[Inverted]) -> _Joined:
    factors = [factor for own, _ in layers for factor in own]
    inverses = [inverse for _, own in layers for inverse in own]
    ends = list(accumulate(len(own) for own, _ in layers))
    slices = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    counts = [inverse.raised.numel() for inverse in inverses]
    raised = torch.hstack([inverse.raised for inverse in inverses])
    return _Joined(factors, inverses, slices, counts, raised, known_true(raised == 0))


def _of_each(inverses: Sequence[Inverse], joined: Tensor) -> list[Tensor]:
    """The numbers of each inverse's matrices, of the batch shape, from one array for all."""
    shapes = [inverse.raised.shape for inverse in inverses]
    if not any(shapes):
        return list(joined.unbind())
    parts = joined.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _counted(joined: _Joined) -> Tensor:
    """Of each matrix, whether all factors of its layer have seen a finite batch."""
    seen = torch.stack([factor.weight for factor in joined.factors]) > 0
    if known_true(seen):
        return seen.new_ones(sum(joined.counts))
    each, counts = seen.unbind(), joined.counts
    return torch.cat(
        [reduce(torch.logical_and, each[own]).expand(sum(counts[own])) for own in joined.slices]
    )


def _dampings(joined: _Joined, damping: Sequence[float], mode: str) -> Tensor:
    """The damping of each matrix, from that of each layer."""
    joined_means = ops.mean_eigenvalues([factor.mean for factor in joined.factors])
    means = joined_means.split(joined.counts)
    shares = list(means)  # of the same shapes; each is replaced
    pairs, numbers = [], []
    for own, number in zip(joined.slices, damping, strict=True):
        if mode == "factored" and own.stop - own.start == 2:
            pairs.append(own.start)
            numbers.append(number)
        else:
            shares[own] = [torch.full_like(mean, number) for mean in means[own]]
    if pairs:
        inputs, gradients = (torch.cat([means[i + side] for i in pairs]) for side in (0, 1))
        roots: float | Tensor = math.sqrt(numbers[0])
        if len(set(numbers)) > 1:
            each = zip(pairs, map(math.sqrt, numbers), strict=True)
            roots = torch.cat([torch.full_like(means[i], root) for i, root in each])
        lengths = [joined.counts[i] for i in pairs]
        for side, split in enumerate(_split_damping(inputs, gradients, roots)):
            for i, share in zip(pairs, split.split(lengths), strict=True):
                shares[i + side] = share
    total = torch.cat(shares)
    if joined.none_raised:
        return total
    return raised_damping(total, joined_means, joined.raised)


def _invert(joined: _Joined, dampings: Tensor) -> tuple[list[Tensor], Tensor]:
    """The damped inverse of every factor, and which of all their matrices failed."""
    covariances = [factor.mean for factor in joined.factors]
    if all(covariance.dim() > 1 for covariance in covariances):
        inverses, info, _ = ops.damped_inverse(covariances, dampings)
        return inverses, info != 0
    systems = list(zip(covariances, _of_each(joined.inverses, dampings), strict=True))
    full = [system for system in systems if system[0].dim() > 1]
    solved: Iterator[tuple[Tensor, Tensor]] = iter(())
    if full:
        inverses, info, _ = ops.damped_inverse([m for m, _ in full], [shift for _, shift in full])
        failures = torch.split(info != 0, [math.prod(m.shape[:-2]) for m in inverses])
        solved = iter(zip(inverses, failures, strict=True))
    found: list[tuple[Tensor, Tensor]] = []
    for covariance, shift in systems:
        if covariance.dim() > 1:
            found.append(next(solved))
        else:
            damped = covariance + shift
            found.append((1 / damped, ~(damped > 0).all()[None]))
    return [matrix for matrix, _ in found], torch.cat([failure for _, failure in found])
