"""Running averages of a layer's covariances.

An estimate changes with every captured batch. Whether a batch is finite is decided on the device,
so the host never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfac_fast import ops
from kfac_fast.layers import Count

Damping = float | Sequence[float]
"""One number for all layers, or one for each."""
Sum = tuple[Tensor, Count]
"""Outer products added up, and the number of terms to average them over."""

ENTRIES_A_PART = 2**17


class RunningAverage:
    r"""A running average with bias correction, of the batches that are finite.

    .. math:: C_t = \frac{\sum_i \rho^{t-i} c_i}{\sum_i \rho^{t-i}}

    over the batches :math:`c_i` that were finite.

    Everything is changed in place, so that a captured graph of a step finds it where it was.

    Attributes:
        total: The numerator, times :math:`1 - \rho`.
        weight: The denominator, times :math:`1 - \rho`; zero before the first finite batch.
        skipped: Batches left out because they held NaN or infinity.
    """

    STATE = ("total", "weight", "skipped")
    KIND = "factors"

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)
        self.weight = like.new_zeros(())
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)

    def restart(self) -> None:
        """Forget all batches."""
        self.total.zero_()
        self.weight.zero_()

    def mean(self) -> Tensor:
        """The average, zero before the first finite batch."""
        return means_of([self])[0]

    def witnesses(self, batch: Tensor) -> Tensor:
        """Entries that are all finite only if the whole batch is."""
        return batch


class Factor(RunningAverage):
    """The running average of a covariance.

    Matrices are ``[*, n, n]``; a covariance that is diagonal by construction is its diagonal,
    ``[n]``. NaN or infinity in any of the rows that a covariance is made of shows on its diagonal.
    """

    def witnesses(self, batch: Tensor) -> Tensor:
        """The diagonal."""
        return diagonal_of(batch)


def update_averages(averages: Sequence[RunningAverage], sums: Sequence[Sum], decay: float) -> None:
    """Average in one batch each, unless it is not finite.

    Args:
        averages: All on one device.
        sums: What a batch has added up, of the average's shape, and its number of terms.
        decay: Weight of the past, in [0, 1).
    """
    if not averages:
        return
    witnesses = [a.witnesses(total) for a, (total, _) in zip(averages, sums, strict=True)]
    totals = [average.total for average in averages]
    largest = torch._foreach_norm(witnesses, math.inf)
    means = _divided(totals, largest, [terms for _, terms in sums])
    finite = torch.stack(means).isfinite()
    known = known_true(finite)
    for pieces in _pieces(averages, sums, finite):
        old, new, terms, are_finite = map(list, zip(*pieces, strict=True))
        taken = _divided(old, new, terms)
        if not known:
            taken = [torch.where(*each) for each in zip(are_finite, taken, old, strict=True)]
        torch._foreach_lerp_(old, taken, 1 - decay)
    weights = [average.weight for average in averages]
    ones = torch.where(finite, 1, torch.stack(weights))
    torch._foreach_lerp_(weights, list(ones.unbind()), 1 - decay)
    skipped = (~finite).to(torch.int64).unbind()
    torch._foreach_add_([average.skipped for average in averages], list(skipped))


def known_true(flags: Tensor) -> bool:
    """Whether all are true, as far as the host knows without waiting for a device."""
    return flags.is_cpu and bool(flags.all())


def _divided(
    like: Sequence[Tensor], sums: Sequence[Tensor], terms: Sequence[Count]
) -> list[Tensor]:
    """Each sum over its number of terms, in the dtype of the tensor beside it."""
    numbers = [count for count in terms if not isinstance(count, Tensor)]
    if len(numbers) == len(terms):
        means = list(torch._foreach_div(list(sums), numbers))
    else:
        means = [total / count for total, count in zip(sums, terms, strict=True)]
    pairs = zip(means, like, strict=True)
    return [mean if mean.dtype == old.dtype else mean.to(old.dtype) for mean, old in pairs]


Piece = tuple[Tensor, Tensor, Count, Tensor]
"""Rows of a total and of what is added up, the number of terms, and whether it is finite."""


def _pieces(
    averages: Sequence[RunningAverage], sums: Sequence[Sum], finite: Tensor
) -> Iterator[list[Piece]]:
    """What to work on together: on a CPU what its caches hold, so that memory is read once."""
    together: list[Piece] = []
    entries = 0
    for average, (total, terms), is_finite in zip(averages, sums, finite.unbind(), strict=True):
        parts = _parts(average.total), _parts(total)
        for old, new in zip(*parts, strict=True):
            together.append((old, new, terms, is_finite))
            entries += old.numel() if old.is_cpu else 0
            if entries >= ENTRIES_A_PART:
                yield together
                together, entries = [], 0
    if together:
        yield together


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Rows of a few entries, or on other devices than a CPU, all."""
    if not tensor.is_cpu or tensor.numel() <= ENTRIES_A_PART:
        return (tensor,)
    parts: Sequence[Tensor] = tensor.split(max(1, ENTRIES_A_PART * len(tensor) // tensor.numel()))
    return parts


def means_of(averages: Sequence[RunningAverage]) -> list[Tensor]:
    """The averages, each zero before its first finite batch."""
    weights = torch.stack([average.weight for average in averages])
    weights = torch.where(weights > 0, weights, 1)
    totals = [average.total for average in averages]
    return list(torch._foreach_div(totals, list(weights.unbind())))


def of_each(damping: Damping, layers: Sequence[object]) -> Sequence[float]:
    """The damping of each layer, where one number may stand for all."""
    return [damping] * len(layers) if isinstance(damping, int | float) else damping


def diagonal_of(covariance: Tensor) -> Tensor:
    """The diagonals ``[*, n]`` of matrices ``[*, n, n]``, or of one given by its diagonal."""
    return covariance if covariance.dim() == 1 else covariance.diagonal(dim1=-2, dim2=-1)


def multiply_sides(
    grads: Sequence[Tensor], right: Sequence[Tensor], left: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    r"""All layers' gradients between two matrices each.

    .. math:: P_i = L_i V_i R_i, \qquad p = \sum_i \langle V_i, P_i \rangle

    Args:
        grads: Matrices ``[*, out, in]``.
        right: Matrices ``[*, in, in]``, or diagonals ``[in]``.
        left: Matrices ``[*, out, out]``; None stands for ones ``[*, 1, 1]``.

    Returns:
        The products, and :math:`p` as a scalar tensor.
    """
    full = [i for i, side in enumerate(right) if side.dim() > 1]
    lefts = [
        grad.new_ones(*grad.shape[:-2], 1, 1) if side is None else side
        for grad, side in zip(grads, left, strict=True)
    ]
    lists = (grads, right, lefts)
    products, inner = ops.precondition(*([tensors[i] for i in full] for tensors in lists))
    results = dict(zip(full, products, strict=True))
    for i, diagonal in enumerate(right):
        if diagonal.dim() == 1:
            results[i] = lefts[i] @ (grads[i] * diagonal)
            inner = inner.to(diagonal) + (grads[i] * results[i]).sum()
    return [results[i] for i in range(len(grads))], inner
