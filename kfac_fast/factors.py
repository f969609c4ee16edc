"""A layer's two factors: running averages of its covariances, and their cached damped inverses.

An estimate changes with every captured batch; the inverses are refreshed now and then, for all
layers in one call. Whether a batch is finite and whether a matrix could be inverted is decided on
the device, so the host never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kfac_fast import ops

DampingMode = Literal["factored", "plain"]


class Factor:
    r"""A running average of covariance matrices with bias correction.

    .. math:: C_t = \frac{\sum_i \rho^{t-i} c_i}{\sum_i \rho^{t-i}}

    over the batches :math:`c_i` that were finite.

    Attributes:
        total: The numerator, times :math:`1 - \rho`.
        weight: The denominator, times :math:`1 - \rho`; zero before the first finite batch.
        skipped: Batches left out because they held NaN or infinity.
        inverse: Damped inverse as of the last refresh; the identity before it.
        failed: Refreshes that kept a previous inverse, one count for each matrix that was not
            positive definite.
        raised: By how many powers of ten the next refresh raises each matrix' damping: one more
            after a refresh that failed, up to 6, one less after one that did not.
    """

    STATE = ("total", "weight", "skipped", "inverse", "failed", "raised")
    MOST_RAISED = 6

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)
        self.weight = like.new_zeros(())
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)
        self.inverse = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).repeat(
            *like.shape[:-2], 1, 1
        )
        self.failed = torch.zeros((), dtype=torch.int64, device=like.device)
        self.raised = torch.zeros(like.shape[:-2], dtype=torch.int64, device=like.device)

    def update(self, batch: Tensor, decay: float) -> None:
        """Average in one batch's covariance, unless it is not finite.

        Args:
            batch: Covariance ``[*, n, n]``. NaN or infinity anywhere in its rows shows on its
                diagonal.
            decay: Weight of the past, in [0, 1).
        """
        finite = batch.diagonal(dim1=-2, dim2=-1).isfinite().all()
        self.total = torch.where(finite, torch.lerp(self.total, batch, 1 - decay), self.total)
        self.weight = torch.where(finite, 1 - decay + decay * self.weight, self.weight)
        self.skipped = self.skipped + ~finite

    def covariance(self) -> Tensor:
        """The running average, zero before the first finite batch."""
        return self.total / torch.where(self.weight > 0, self.weight, 1)

    def raised_damping(self, covariance: Tensor, damping: Tensor | float) -> Tensor:
        r"""The damping of each matrix at the next refresh.

        .. math:: 10^r (\lambda + [r > 0]\, \varepsilon \operatorname{tr} C / n)

        Args:
            covariance: :math:`C`, as :meth:`covariance` gives it.
            damping: :math:`\lambda`, a number or of the batch shape.

        Returns:
            Tensor of the batch shape. The second term lets a damping of zero be raised, too.
        """
        scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).abs()
        least = torch.finfo(scale.dtype).eps * scale
        raised = self.raised.to(scale.dtype)
        return 10**raised * (damping + torch.where(raised > 0, least, 0))

    def count_failures(self, failure: Tensor) -> None:
        """Take note of which matrices were not positive definite.

        Args:
            failure: Bool of the batch shape, flat. Before the first finite batch it means nothing.
        """
        failure = failure & (self.weight > 0)
        self.failed = self.failed + failure.sum()
        step = torch.where(failure, 1, -1).reshape(self.raised.shape)
        self.raised = (self.raised + step).clamp(0, self.MOST_RAISED)

    def keep_inverse(self, inverse: Tensor, valid: Tensor) -> None:
        """Take over the new inverses that are valid.

        Args:
            inverse: New inverses ``[*, n, n]``.
            valid: Bool of the batch shape, flat.
        """
        self.inverse = torch.where(valid.reshape(*inverse.shape[:-2], 1, 1), inverse, self.inverse)


def factored_damping(
    input_covariance: Tensor, gradient_covariance: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    r"""Tikhonov damping split between two factors in proportion to their average eigenvalues.

    .. math:: \pi \sqrt\lambda, \quad \sqrt\lambda / \pi, \qquad
        \pi^2 = \frac{\operatorname{tr} A / \dim A}{\operatorname{tr} G / \dim G}

    Args:
        input_covariance: ``[*, in, in]``.
        gradient_covariance: ``[*, out, out]``.
        damping: :math:`\lambda`, at least 0.

    Returns:
        The dampings of the input and of the gradient covariance, of the batch shape. :math:`\pi` is
        1 where a trace is zero or not finite.

    Source: Martens & Grosse (2015), section 6.3.
    """
    means = [m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (input_covariance, gradient_covariance)]
    ratio = means[0] / means[1]
    usable = (means[0] > 0) & (means[1] > 0) & ratio.isfinite() & (ratio > 0)
    pi = torch.where(usable, ratio, 1).sqrt()
    return math.sqrt(damping) * pi, math.sqrt(damping) / pi


def refresh_inverses(
    pairs: Sequence[tuple[Factor, Factor]], damping: float, mode: DampingMode = "factored"
) -> None:
    """Refresh the damped inverses of all layers' (input, gradient) factors in one call.

    A pair takes over new inverses only if both are valid: one alone would scale the layer's step by
    whatever the other lacks. A matrix that was not positive definite is damped more at the next
    refresh.

    Args:
        pairs: The factors of each layer.
        damping: Tikhonov damping, at least 0.
        mode: ``"factored"`` as :func:`factored_damping`; ``"plain"`` adds ``damping`` to both
            factors.
    """
    covariances = [factor.covariance() for pair in pairs for factor in pair]
    dampings: list[Tensor | float] = []
    for pair, a, g in zip(pairs, covariances[::2], covariances[1::2], strict=True):
        shares: tuple[Tensor | float, Tensor | float] = (damping, damping)
        if mode == "factored":
            shares = factored_damping(a, g, damping)
        dampings += [
            factor.raised_damping(covariance, share)
            for factor, covariance, share in zip(pair, (a, g), shares, strict=True)
        ]
    inverses, info, _ = ops.damped_inverse(covariances, dampings)
    failed = torch.split(info != 0, [math.prod(c.shape[:-2]) for c in covariances])
    for i, pair in enumerate(pairs):
        sides = slice(2 * i, 2 * i + 2)
        seen = (pair[0].weight > 0) & (pair[1].weight > 0)
        valid = seen & ~(failed[2 * i] | failed[2 * i + 1])
        for factor, inverse, failure in zip(pair, inverses[sides], failed[sides], strict=True):
            factor.keep_inverse(inverse, valid)
            factor.count_failures(failure)
