"""The ways to average and to look at covariances in plain PyTorch; see :mod:`baselines`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from baselines import Ways, by_reference
from torch import Tensor

from kfac_fast import reference


def update_averages(
    sums: Sequence[Tensor],
    terms: Sequence[float],
    decay: float,
    *,
    weights: Sequence[Tensor],
    skipped: Sequence[Tensor],
) -> Ways:
    """Ways to average in a batch of all factors, where it is finite."""
    one = weights[0].new_ones(())
    loop_weights, sum_weights = ([weight.clone() for weight in weights] for _ in range(2))

    def in_place(out: Sequence[Tensor]) -> Sequence[Tensor]:
        lists = (sums, terms, out, sum_weights, skipped)
        for total, count, average, weight, skips in zip(*lists, strict=True):
            if total.diagonal().isfinite().all():
                weight.lerp_(one, 1 - decay)
                rate = (1 - decay) / weight.item()
                average.mul_(1 - rate).add_(total, alpha=rate / count)
            else:
                skips += 1
        return out

    def loop(out: Sequence[Tensor]) -> Sequence[Tensor]:
        lists = (sums, terms, out, loop_weights, skipped)
        for total, count, average, weight, skips in zip(*lists, strict=True):
            if total.diagonal().isfinite().all():
                weight.lerp_(one, 1 - decay)
                average.lerp_(total / count, (1 - decay) / weight)
            else:
                skips += 1
        return out

    def run_reference(out: Sequence[Tensor]) -> Sequence[Tensor]:
        reference.update_averages(sums, terms, decay, True, out, weights, skipped)
        return out

    return {
        "lerp, one by one": loop,
        "mul and add, one by one": in_place,
        "reference": run_reference,
    }


def mean_eigenvalues(matrices: Sequence[Tensor]) -> Ways:
    """Ways to the average eigenvalue of every matrix."""

    def traces(out: Tensor) -> Tensor:
        return torch.stack([matrix.trace() / len(matrix) for matrix in matrices], out=out)

    def means(out: Tensor) -> Tensor:
        return torch.stack([matrix.diagonal().mean() for matrix in matrices], out=out)

    ways = by_reference(reference.mean_eigenvalues, matrices)
    return {"trace, one by one": traces, "mean, one by one": means, **ways}
