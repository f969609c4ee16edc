"""Running averages of a layer's covariances.

An estimate changes with every captured batch. Whether a batch is finite is decided on the device,
so the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_fast import ops
from kfac_fast.layers import Count

Damping = float | Sequence[float]
"""One number for all layers, or one for each."""
Sum = tuple[Tensor, Count]
"""Outer products added up, and the number of terms to average them over."""


class RunningAverage:
    r"""A running average with bias correction, of the batches that are finite.

    .. math:: C_t = \frac{\sum_i \rho^{t-i} c_i}{\sum_i \rho^{t-i}}

    over the batches :math:`c_i` that were finite.

    Everything is changed in place, so that a captured graph of a step finds it where it was.

    Attributes:
        mean: The average; zero before the first finite batch.
        weight: The denominator, times :math:`1 - \rho`; zero before the first finite batch.
        skipped: Batches left out because they held NaN or infinity.
    """

    STATE = ("mean", "weight", "skipped")
    KIND = "factors"
    is_covariance = False

    def __init__(self, like: Tensor) -> None:
        self.mean = torch.zeros_like(like)
        self.weight = like.new_zeros(())
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)

    def restart(self) -> None:
        """Forget all batches."""
        self.mean.zero_()
        self.weight.zero_()


class Factor(RunningAverage):
    """The running average of a covariance.

    Matrices are ``[*, n, n]``; a covariance that is diagonal by construction is its diagonal,
    ``[n]``. NaN or infinity in any of the rows that a covariance is made of shows on its diagonal.
    """

    is_covariance = True


def update_averages(averages: Sequence[RunningAverage], sums: Sequence[Sum], decay: float) -> None:
    """Average in one batch each, unless it is not finite.

    Args:
        averages: All on one device.
        sums: What a batch has added up, of the average's shape, and its number of terms.
        decay: Weight of the past, in [0, 1).
    """
    for covariances in (True, False):
        own = [i for i, a in enumerate(averages) if a.is_covariance == covariances]
        if not own:
            continue
        chosen = [averages[i] for i in own]
        totals, terms = zip(*(_numbered(averages[i], *sums[i]) for i in own), strict=True)
        ops.update_averages(
            totals,
            terms,
            decay,
            out=[average.mean for average in chosen],
            weights=[average.weight for average in chosen],
            skipped=[average.skipped for average in chosen],
            covariances=covariances,
        )


def _numbered(average: RunningAverage, total: Tensor, terms: Count) -> tuple[Tensor, float]:
    """A sum in the average's dtype, and a number of terms that the host knows."""
    if isinstance(terms, Tensor) or total.dtype != average.mean.dtype:
        return (total / terms).to(average.mean.dtype), 1.0
    return total, terms


def of_each(damping: Damping, layers: Sequence[object]) -> Sequence[float]:
    """The damping of each layer, where one number may stand for all."""
    return [damping] * len(layers) if isinstance(damping, int | float) else damping


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
