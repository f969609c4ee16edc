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
    """

    STATE = ("total", "weight", "skipped", "inverse", "failed")

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)
        self.weight = like.new_zeros(())
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)
        self.inverse = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).repeat(
            *like.shape[:-2], 1, 1
        )
        self.failed = torch.zeros((), dtype=torch.int64, device=like.device)

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
    whatever the other lacks.

    Args:
        pairs: The factors of each layer.
        damping: Tikhonov damping, at least 0.
        mode: ``"factored"`` as :func:`factored_damping`; ``"plain"`` adds ``damping`` to both
            factors.
    """
    covariances = [factor.covariance() for pair in pairs for factor in pair]
    dampings: list[Tensor | float] = []
    for a, g in zip(covariances[::2], covariances[1::2], strict=True):
        dampings += factored_damping(a, g, damping) if mode == "factored" else (damping, damping)
    inverses, info, _ = ops.damped_inverse(covariances, dampings)
    failed = torch.split(info != 0, [math.prod(c.shape[:-2]) for c in covariances])
    for i, pair in enumerate(pairs):
        sides = slice(2 * i, 2 * i + 2)
        seen = (pair[0].weight > 0) & (pair[1].weight > 0)
        valid = seen & ~(failed[2 * i] | failed[2 * i + 1])
        for factor, inverse, failure in zip(pair, inverses[sides], failed[sides], strict=True):
            factor.keep_inverse(inverse, valid)
            factor.failed = factor.failed + failure.sum()
