"""The ways to average and to look at covariances in plain PyTorch; see :mod:`baselines`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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

    def one_by_one(add: Callable[[Tensor, Tensor, float, Tensor], Any]) -> Callable[[Any], Any]:
        own_weights = [weight.clone() for weight in weights]

        def run(out: Sequence[Tensor]) -> Sequence[Tensor]:
            lists = (sums, terms, out, own_weights, skipped)
            for total, count, average, weight, skips in zip(*lists, strict=True):
                if total.diagonal().isfinite().all():
                    weight.lerp_(one, 1 - decay)
                    add(average, total, count, weight)
                else:
                    skips += 1
            return out

        return run

    def interpolate(average: Tensor, total: Tensor, count: float, weight: Tensor) -> None:
        average.lerp_(total / count, (1 - decay) / weight)

    def multiply_and_add(average: Tensor, total: Tensor, count: float, weight: Tensor) -> None:
        rate = (1 - decay) / weight.item()
        average.mul_(1 - rate).add_(total, alpha=rate / count)

    def run_reference(out: Sequence[Tensor]) -> Sequence[Tensor]:
        reference.update_averages(sums, terms, decay, True, out, weights, skipped)
        return out

    return {
        "lerp, one by one": one_by_one(interpolate),
        "mul and add, one by one": one_by_one(multiply_and_add),
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
