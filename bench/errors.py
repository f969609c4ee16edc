"""Errors relative to float64, and how large they may be."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

WRONG_ABOVE = 1e-3


def _norms(x: Tensor) -> Tensor:
    """Frobenius and max norm of each matrix in a stack, ``[2, stack]``."""
    flat = x.reshape(math.prod(x.shape[:-2]), -1)
    return torch.stack([torch.linalg.vector_norm(flat, p, dim=-1) for p in (2, math.inf)])


def relative_error(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    """Largest error of a matrix relative to float64 in the Frobenius norm."""
    pairs = zip(results, oracle, strict=True)
    return max(float((_norms(out.double() - ref)[0] / _norms(ref)[0]).max()) for out, ref in pairs)


def check_ways(errors: dict[str, float]) -> None:
    """Fail if a way's error is one that no rounding explains: it computes something else."""
    wrong = [way for way, error in errors.items() if not error < WRONG_ABOVE]
    assert not wrong, f"errors {errors}: {wrong} compute something else"


def check_budget(
    results: Sequence[Tensor], reference: Sequence[Tensor], oracle: Sequence[Tensor]
) -> None:
    """Fail if matrices of ``results`` are too far from float64.

    The bound is ``2 |reference - ref64| + 4 eps |ref64|`` in the Frobenius and in the max norm,
    where the reference is the library's own pure-PyTorch version, whatever the fastest way is. In a
    list it holds for the root mean square over the results of one shape, of which some come out
    better and some worse by chance.
    """
    by_shape = defaultdict(list)
    for out, theirs, ref in zip(results, reference, oracle, strict=True):
        norms = (_norms(out.double() - ref), _norms(theirs.double() - ref), _norms(ref))
        by_shape[out.shape].append(torch.stack(norms))
    for shape, norms in by_shape.items():
        error, theirs, size = torch.stack(norms).square().mean(0).sqrt()
        budget = 2 * theirs + 4 * torch.finfo(results[0].dtype).eps * size
        if not (error <= budget).all():
            pytest.fail(f"{shape}: the error {error.tolist()} is over {budget.tolist()}")
